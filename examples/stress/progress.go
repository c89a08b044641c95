package main

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// A progress shows samples while a run goes on: each on a line, or on a terminal all on
// the same one.
type progress struct {
	w        io.Writer
	terminal bool
	mode     mode
	errors   int64 // so far
	width    int   // of the line that is on the terminal
}

// terminalWidth is how many characters a line has that no common terminal wraps.
const terminalWidth = 79

// show shows a sample.
func (p *progress) show(s sample) {
	p.errors += s.Errors
	line := fmt.Sprintf("%5.0fs  %d clients  %s  p50 %s  p99 %s  %s",
		s.To, s.Clients, p.mode.throughput(s.MessagesPerSecond, s.BytesPerSecond), latency(s.P50, s.Messages), latency(s.P99, s.Messages),
		plural(p.errors, "error"))
	if !p.terminal {
		fmt.Fprintln(p.w, line)
		return
	}
	line = fit(line, terminalWidth)
	// Blanks cover what is left of a longer line.
	width := utf8.RuneCountInString(line)
	fmt.Fprintf(p.w, "\r%s%s", line, strings.Repeat(" ", max(p.width-width, 0)))
	p.width = width
}

// end ends the line on the terminal, if there is one.
func (p *progress) end() {
	if p.width > 0 {
		fmt.Fprintln(p.w)
		p.width = 0
	}
}
