package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/tcprelay/relay"
)

// A row is a mapping at one moment.
type row struct {
	addr, target    string
	state           state
	since           time.Time
	why             string
	stats           relay.Stats
	missed          int64   // clients that could not be carried
	inRate, outRate float64 // bytes a second
}

// A snapshot is all that the view shows.
type snapshot struct {
	relay      string
	start, now time.Time
	rows       []row
	notes      []note // the latest last
}

// leastNotes is how many lines of the log the view makes room for.
const leastNotes = 4

// render returns the lines of a screen: no more than height, none longer than width. All
// that it shows is printable ASCII, whoever it came from, and with color also sequences
// for that, which have no width.
func render(s *snapshot, width, height int, color bool) []string {
	p := painter{width, color}
	leavingAll := len(s.rows) > 0
	for _, r := range s.rows {
		leavingAll = leavingAll && r.state >= leaving
	}
	status := "up " + lasting(s.now.Sub(s.start)) + ", ^C stops"
	if leavingAll {
		status = "stopping when the clients have left, ^C stops at once"
	}
	lines := []string{p.ends("forward at "+clean(s.relay), status), ""}

	blocks := p.blocks(s, p.wide)
	if len(lines)+total(blocks)+leastNotes > height {
		blocks = p.blocks(s, p.narrow)
	}
	room := height - len(lines)
	if total(blocks) > room {
		room-- // for what is said of the others
	}
	for i, b := range blocks {
		if len(b) > room {
			lines = append(lines, p.line(fmt.Sprintf("and %d more", len(blocks)-i)))
			break
		}
		lines = append(lines, b...)
		room -= len(b)
	}
	if lines[len(lines)-1] != "" {
		lines = append(lines, "")
	}
	if free := height - len(lines); free > 0 {
		for _, n := range s.notes[max(0, len(s.notes)-free):] {
			lines = append(lines, p.note(n))
		}
	}
	return lines[:min(len(lines), max(height, 0))]
}

func total(blocks [][]string) (n int) {
	for _, b := range blocks {
		n += len(b)
	}
	return n
}

// A painter makes lines that fit.
type painter struct {
	width int
	color bool
}

// blocks returns the lines of each mapping.
func (p painter) blocks(s *snapshot, form func(r *row, now time.Time) []string) (blocks [][]string) {
	for i := range s.rows {
		blocks = append(blocks, form(&s.rows[i], s.now))
	}
	return blocks
}

// wide returns the lines of a mapping where there is room.
func (p painter) wide(r *row, now time.Time) []string {
	clients := fmt.Sprintf("clients: %d (%d in all", r.stats.Live, r.stats.Accepted)
	if r.missed > 0 {
		clients += fmt.Sprintf(", %d reset", r.missed)
	}
	clients += ")"
	if n := r.stats.Reconnects; n > 0 {
		clients += fmt.Sprintf(", reconnects: %d", n)
	}
	lines := []string{
		p.paint(bold, p.line(clean(r.addr)+" -> "+clean(r.target))),
		p.columns(r.state.color(), column{fmt.Sprintf("  %v %s", r.state, lasting(now.Sub(r.since))), 30},
			column{clients, 0}),
		p.columns("", column{fmt.Sprintf("  in: %s, %s", size(r.stats.BytesIn), rate(r.inRate)), 30},
			column{fmt.Sprintf("out: %s, %s", size(r.stats.BytesOut), rate(r.outRate)), 0}),
	}
	if r.why != "" {
		lines = append(lines, p.paint(r.state.color(), p.line("  "+clean(r.why))))
	}
	return append(lines, "")
}

// narrow returns a line for a mapping, where there are many.
func (p painter) narrow(r *row, now time.Time) []string {
	text := clean(r.addr) + " -> " + clean(r.target)
	if r.why != "" {
		text += " (" + clean(r.why) + ")"
	}
	return []string{p.columns(r.state.color(), column{r.state.String(), 13},
		column{fmt.Sprintf("%d now", r.stats.Live), 10},
		column{rate(r.inRate) + " in", 15}, column{rate(r.outRate) + " out", 16}, column{text, 0})}
}

func (p painter) note(n note) string {
	text := clean(n.text)
	if n.n > 1 {
		text = fmt.Sprintf("%s (%d such)", text, n.n)
	}
	at := n.at.Format(time.TimeOnly) + " "
	line := p.line(at + text)
	if !n.warn || len(line) < len(at) {
		return line
	}
	return line[:len(at)] + p.paint(yellow, line[len(at):])
}

// A column is text in so many characters of a line, cut if it has to be; 0: in the rest.
type column struct {
	text  string
	width int
}

// columns returns a line whose first column looks as it is to.
func (p painter) columns(first sgr, columns ...column) string {
	line, left := "", p.width
	for i, c := range columns {
		room := left
		if c.width > 0 {
			room = min(c.width-1, left) // apart from the next
		}
		text := strings.TrimRight(cut(c.text, room), " ")
		width := max(len(text), min(c.width, left))
		gap := strings.Repeat(" ", width-len(text))
		if i == 0 {
			text = p.paint(first, text)
		}
		line += text + gap
		left -= width
	}
	return strings.TrimRight(line, " ")
}

// ends returns a line with a text at either end, of which the first goes first.
func (p painter) ends(left, right string) string {
	if gap := p.width - len(left) - len(right); gap > 0 {
		return left + strings.Repeat(" ", gap) + right
	}
	return p.line(left)
}

func (p painter) line(text string) string { return cut(strings.TrimRight(text, " "), p.width) }

// A sgr is what selects how characters look.
type sgr string

const (
	bold   sgr = "1"
	red    sgr = "31"
	green  sgr = "32"
	yellow sgr = "33"
)

func (s state) color() sgr {
	switch s {
	case connected:
		return green
	case refused, ended:
		return red
	}
	return yellow
}

func (p painter) paint(how sgr, text string) string {
	if !p.color || how == "" || text == "" {
		return text
	}
	return "\x1b[" + string(how) + "m" + text + "\x1b[0m"
}

// cut shortens text, of ASCII, to a number of characters.
func cut(text string, n int) string {
	switch n = max(n, 0); {
	case len(text) <= n:
		return text
	case n <= 3:
		return text[:n]
	}
	return text[:n-3] + "..."
}

// clean makes text fit for a terminal whatever is in it. What is not printable ASCII is
// escaped as Go does it: how wide anything else is only the terminal knows.
func clean(s string) string {
	var b strings.Builder
	for len(s) > 0 {
		if s[0] >= ' ' && s[0] <= '~' {
			b.WriteByte(s[0])
			s = s[1:]
			continue
		}
		end := strings.IndexFunc(s, func(r rune) bool { return r >= ' ' && r <= '~' })
		if end < 0 {
			end = len(s)
		}
		odd := strconv.QuoteToASCII(s[:end])
		b.WriteString(odd[1 : len(odd)-1])
		s = s[end:]
	}
	return b.String()
}

func lasting(d time.Duration) string { return max(d, 0).Truncate(time.Second).String() }

// size returns a number of bytes in at most eight characters.
func size[N int64 | float64](n N) string {
	if n < 1000 {
		return fmt.Sprintf("%d B", int64(n))
	}
	f := float64(n)
	for _, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		switch f /= 1024; {
		case f < 99.95:
			return fmt.Sprintf("%.1f %s", f, unit)
		case f < 999.5:
			return fmt.Sprintf("%.0f %s", f, unit)
		}
	}
	return fmt.Sprintf("%.0f PiB", f/1024)
}

func rate(n float64) string { return size(n) + "/s" }
