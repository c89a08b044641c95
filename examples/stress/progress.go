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

// latency formats one in microseconds, of so many messages.
func latency(us float64, of int64) string {
	if of == 0 {
		return "-"
	}
	return duration(us)
}

// duration formats one in microseconds with three digits.
func duration(us float64) string {
	switch {
	case us < 1e3:
		return digits(us) + " µs"
	case us < 1e6:
		return digits(us/1e3) + " ms"
	}
	return digits(us/1e6) + " s"
}

// amount formats a number of bytes, or of bytes a second, in powers of 1000.
func amount(bytes float64) string {
	switch {
	case bytes < 1e3:
		return digits(bytes) + " B"
	case bytes < 1e6:
		return digits(bytes/1e3) + " kB"
	case bytes < 1e9:
		return digits(bytes/1e6) + " MB"
	}
	return digits(bytes/1e9) + " GB"
}

// digits formats x with at least three digits, if it has as many.
func digits(x float64) string {
	switch {
	case x >= 99.95 || x == float64(int64(x)):
		return fmt.Sprintf("%.0f", x)
	case x >= 9.995:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

func plural(n int64, of string) string {
	if n == 1 {
		return "1 " + of
	}
	return fmt.Sprintf("%d %ss", n, of)
}
