package main

import (
	"encoding/xml"
	"fmt"
	"io"
	"strings"
)

// Measures of the image, in its own units.
const (
	width       = 880
	plotLeft    = 84
	plotWidth   = width - plotLeft - 28
	plotHeight  = 170
	headHeight  = 94
	panelHeight = plotHeight + 92
	maxColumns  = 400 // of a series: what is more would only blur the lines
)

// style has the image follow the colors that its reader's system prefers.
const style = `
	svg { color-scheme: light dark; font: 13px system-ui, "DejaVu Sans", sans-serif; }
	.ground { fill: #fcfcfb; }
	text { fill: #52514e; }
	.title { fill: #1b1b1a; font-weight: 600; font-size: 15px; }
	.axis { stroke: #a5a39c; fill: none; }
	.grid { stroke: #e6e5e0; fill: none; }
	.a, .b { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
	.a { stroke: #2a78d6; }
	.b { stroke: #d9691e; }
	.dot { fill: #2a78d6; stroke: #fcfcfb; stroke-width: 2; }
	.mark { stroke: #fcfcfb; stroke-width: 4; stroke-linejoin: round; paint-order: stroke; }
	.area { fill: #2a78d6; opacity: .12; }
	.bad { fill: #d03b3b; }
	@media (prefers-color-scheme: dark) {
		.ground { fill: #1a1a19; }
		text { fill: #c3c2b7; }
		.title { fill: #f4f4f2; }
		.axis { stroke: #75746d; }
		.grid { stroke: #33332f; }
		.a { stroke: #5598e7; }
		.b { stroke: #e8894a; }
		.dot { fill: #5598e7; stroke: #1a1a19; }
		.mark { stroke: #1a1a19; }
		.area { fill: #5598e7; }
		.bad { fill: #e66767; }
	}
`

// writeSVG writes the report as an image: throughput and latency over time, and how
// latencies are distributed.
func (r *report) writeSVG(w io.Writer) error {
	d := new(drawing)
	height := headHeight + 3*panelHeight
	fmt.Fprintf(d, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">`+"\n", width, height, width, height)
	title := "stress " + printable(r.Parameters.To)
	fmt.Fprintf(d, "<title>%s</title>\n<style>%s</style>\n", escape(title), style)
	fmt.Fprintf(d, `<rect class="ground" width="%d" height="%d"/>`+"\n", width, height)
	d.text(20, 32, "title", "start", fit(title, 96))
	d.text(20, 54, "", "start", fit(r.done(), 116))
	d.text(20, 74, "", "start", fit(r.summary(), 116))

	columns := thin(r.Series, maxColumns)
	d.throughput(r, headHeight, columns)
	d.latencies(r, headHeight+panelHeight, columns)
	d.distribution(r, headHeight+2*panelHeight)
	fmt.Fprintln(d, "</svg>")
	_, err := io.WriteString(w, d.String())
	return err
}

// thin returns a series of n samples at most, each for as many of the given ones. Counts
// and rates are those of them all, latencies the worst.
func thin(series []sample, n int) []sample {
	each := (len(series) + n - 1) / n
	if each <= 1 {
		return series
	}
	var out []sample
	for len(series) > 0 {
		part := series[:min(each, len(series))]
		series = series[len(part):]
		s := sample{From: part[0].From, To: part[len(part)-1].To, Clients: part[len(part)-1].Clients}
		for _, p := range part {
			s.Messages += p.Messages
			s.Bytes += p.Bytes
			s.Errors += p.Errors
			s.P50 = max(s.P50, p.P50)
			s.P99 = max(s.P99, p.P99)
			s.Max = max(s.Max, p.Max)
		}
		s.MessagesPerSecond = perSecond(s.Messages, s.To-s.From)
		s.BytesPerSecond = perSecond(s.Bytes, s.To-s.From)
		out = append(out, s)
	}
	return out
}

// A drawing is the text of an SVG image.
type drawing struct{ strings.Builder }

func (d *drawing) throughput(r *report, top float64, columns []sample) {
	title, label := r.Parameters.Mode.messages()+" a second", count
	rate := func(s sample) float64 { return s.MessagesPerSecond }
	if r.Parameters.Mode == bulk {
		title, label = "verified bytes a second", func(v float64) string { return amount(v) + "/s" }
		rate = func(s sample) float64 { return s.BytesPerSecond }
	}
	highest := 0.0
	for _, s := range columns {
		highest = max(highest, rate(s))
	}
	p := panel{d, top, timeAxis(r.Elapsed), linearAxis(highest, label)}
	p.frame("Throughput", "time since the start")

	// Steps, since a rate is that of a span.
	var line strings.Builder
	for i, s := range columns {
		y := p.y(rate(s))
		command := "L"
		if i == 0 {
			command = "M"
		}
		fmt.Fprintf(&line, "%s%.1f %.1fH%.1f", command, p.x(s.From), y, p.x(s.To))
	}
	if len(columns) > 0 {
		fmt.Fprintf(d, `<path class="area" d="%sV%.1fH%.1fZ"/>`+"\n", line.String(), p.y(0), p.x(columns[0].From))
		fmt.Fprintf(d, `<path class="a" d="%s"/>`+"\n", line.String())
	}
	for _, s := range columns {
		if s.Errors > 0 {
			left := p.x(s.From)
			fmt.Fprintf(d, `<rect class="bad" x="%.1f" y="%.1f" width="%.1f" height="6"><title>%s</title></rect>`+"\n",
				left, p.y(0)-6, max(p.x(s.To)-left, 2), plural(s.Errors, "error"))
		}
	}
	entries := []entry{{"a", title}}
	if r.Totals.Errors > 0 {
		entries = append(entries, entry{"bad", "errors"})
	}
	p.legend(entries)
}

func (d *drawing) latencies(r *report, top float64, columns []sample) {
	low, high := 0.0, 0.0
	for _, s := range columns {
		if s.P50 > 0 && (low == 0 || s.P50 < low) {
			low = s.P50
		}
		high = max(high, s.P99)
	}
	p := panel{d, top, timeAxis(r.Elapsed), latencyAxis(low, high)}
	p.frame("Latency over time", "time since the start; logarithmic upwards")
	if r.Latency.Count == 0 {
		p.nothing()
		return
	}
	p.series("a", columns, func(s sample) float64 { return s.P50 })
	p.series("b", columns, func(s sample) float64 { return s.P99 })
	p.legend([]entry{{"a", "p50"}, {"b", "p99"}})
}

func (d *drawing) distribution(r *report, top float64) {
	l := &r.Latency
	p := panel{d, top, percentileAxis(l.Count), latencyAxis(l.Min, l.Max)}
	p.frame("Latency distribution", "so many of the messages took no longer; logarithmic both ways")
	if l.Count == 0 {
		p.nothing()
		return
	}
	var line strings.Builder
	for i, point := range r.Percentiles {
		command := "L"
		if i == 0 {
			command = "M"
		}
		fmt.Fprintf(&line, "%s%.1f %.1f", command, p.x(point.Percent), p.y(point.Latency))
	}
	fmt.Fprintf(d, `<path class="a" d="%s"/>`+"\n", line.String())
	const labelled = 100 // how much space a label takes
	end := float64(plotLeft + plotWidth)
	used := 0.0 // up to where there are labels
	for _, m := range []struct {
		name    string
		percent float64
		us      float64
	}{{"p50", 50, l.P50}, {"p90", 90, l.P90}, {"p99", 99, l.P99}, {"p99.9", 99.9, l.P999}} {
		// The line never falls, so that it is not below to the right of a dot.
		x, anchor := p.x(m.percent), "start"
		if x+labelled > end {
			x, anchor = x-labelled, "end"
		}
		if x < used || m.percent > highest(r.Percentiles) {
			continue
		}
		used = x + labelled
		p.mark(m.percent, m.us, 20, anchor, m.name)
	}
	p.mark(100, l.Max, -11, "end", "max")
}

// highest returns the last percentile of a curve that is not the maximum.
func highest(curve []point) float64 {
	if len(curve) < 2 {
		return 0
	}
	return curve[len(curve)-2].Percent
}

// mark draws a dot with a label below it, or above if below is negative.
func (p *panel) mark(percent, us, below float64, anchor, name string) {
	x, y := p.x(percent), p.y(us)
	fmt.Fprintf(p, `<circle class="dot" cx="%.1f" cy="%.1f" r="5"/>`+"\n", x, y)
	p.text(x, min(y+below, p.bottom()-6), "mark", anchor, name+" "+duration(us))
}

// latencyAxis is a logarithmic one of microseconds.
func latencyAxis(low, high float64) axis {
	if !(low > 0) {
		low = 1
	}
	return logAxis(low, max(high, low), duration)
}

// A panel is one plot of the drawing, from top downwards.
type panel struct {
	*drawing
	top  float64
	h, v axis
}

// x and y return where a value is in the image.
func (p *panel) x(v float64) float64 { return plotLeft + plotWidth*p.h.place(v) }
func (p *panel) y(v float64) float64 { return p.bottom() - plotHeight*p.v.place(v) }

func (p *panel) bottom() float64 { return p.top + 34 + plotHeight }

// frame draws the axes.
func (p *panel) frame(title, below string) {
	p.text(20, p.top+14, "title", "start", title)
	for _, t := range p.v.ticks {
		y := p.y(t.at)
		fmt.Fprintf(p, `<path class="grid" d="M%d %.1fh%d"/>`+"\n", plotLeft, y, plotWidth)
		p.text(plotLeft-8, y+4.5, "", "end", t.label)
	}
	for _, t := range p.h.ticks {
		x := p.x(t.at)
		fmt.Fprintf(p, `<path class="axis" d="M%.1f %.1fv5"/>`+"\n", x, p.bottom())
		p.text(x, p.bottom()+20, "", "middle", t.label)
	}
	fmt.Fprintf(p, `<path class="axis" d="M%d %.1fh%d"/>`+"\n", plotLeft, p.bottom(), plotWidth)
	p.text(plotLeft+plotWidth/2, p.bottom()+40, "", "middle", below)
}

// nothing says that there is nothing to be drawn.
func (p *panel) nothing() {
	p.text(plotLeft+plotWidth/2, p.bottom()-plotHeight/2, "", "middle", "no messages")
}

// An entry of a legend explains what is drawn in a class.
type entry struct{ class, text string }

// legend draws the legend at the right of the title.
func (p *panel) legend(entries []entry) {
	right := float64(plotLeft + plotWidth)
	for i := len(entries) - 1; i >= 0; i-- {
		e := entries[i]
		p.text(right, p.top+14, "", "end", e.text)
		right -= 7.2*float64(len(e.text)) + 10 // some more than the text is wide
		if e.class == "bad" {
			fmt.Fprintf(p, `<rect class="bad" x="%.1f" y="%.1f" width="22" height="6"/>`+"\n", right-22, p.top+7)
		} else {
			fmt.Fprintf(p, `<path class="%s" d="M%.1f %.1fh22"/>`+"\n", e.class, right-22, p.top+10)
		}
		right -= 22 + 20
	}
}

// series draws a line through a latency of each sample, at the middle of its time. Where
// there were no messages it has a gap.
func (p *panel) series(class string, columns []sample, of func(sample) float64) {
	var line strings.Builder
	pen := false // whether it is down
	for _, s := range columns {
		if s.Messages == 0 {
			pen = false
			continue
		}
		x, y := p.x((s.From+s.To)/2), p.y(of(s))
		if pen {
			fmt.Fprintf(&line, "L%.1f %.1f", x, y)
		} else {
			fmt.Fprintf(&line, "M%.1f %.1fh0", x, y) // a point, if nothing follows
		}
		pen = true
	}
	fmt.Fprintf(p, `<path class="%s" d="%s"/>`+"\n", class, line.String())
}

// text draws a line of text.
func (d *drawing) text(x, y float64, class, anchor, s string) {
	if class != "" {
		class = ` class="` + class + `"`
	}
	fmt.Fprintf(d, `<text x="%.1f" y="%.1f"%s text-anchor="%s">%s</text>`+"\n", x, y, class, anchor, escape(s))
}

// escape returns s as text of XML.
func escape(s string) string {
	var b strings.Builder
	xml.EscapeText(&b, []byte(s)) // a Builder does not fail
	return b.String()
}

// fit cuts s to n characters.
func fit(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

// count formats a number, in short.
func count(v float64) string {
	switch {
	case v >= 1e6:
		return fmt.Sprintf("%.6g M", v/1e6)
	case v >= 1e4:
		return fmt.Sprintf("%.6g k", v/1e3)
	}
	return fmt.Sprintf("%.6g", v)
}
