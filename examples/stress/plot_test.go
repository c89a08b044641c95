package main

import (
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func svgOf(t *testing.T, r *report) string {
	t.Helper()
	var b strings.Builder
	if err := r.writeSVG(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// checkXML fails the test unless svg is well-formed and all text is within the image. It
// returns the texts.
func checkXML(t *testing.T, svg string) (texts []string) {
	t.Helper()
	if strings.Contains(svg, "NaN") || strings.Contains(svg, "Inf") {
		t.Errorf("something is nowhere: %s", svg)
	}
	d := xml.NewDecoder(strings.NewReader(svg))
	var width, height float64
	var inText bool
	for {
		token, err := d.Token()
		if err == io.EOF {
			return texts
		}
		if err != nil {
			t.Fatalf("%v in %s", err, svg)
		}
		switch token := token.(type) {
		case xml.StartElement:
			at := make(map[string]float64)
			for _, a := range token.Attr {
				if v, err := strconv.ParseFloat(a.Value, 64); err == nil {
					at[a.Name.Local] = v
				}
			}
			if token.Name.Local == "svg" {
				width, height = at["width"], at["height"]
			}
			if inText = token.Name.Local == "text"; inText {
				if at["x"] < 0 || at["x"] > width || at["y"] < 10 || at["y"] > height-4 {
					t.Errorf("text at %v, %v of %v, %v", at["x"], at["y"], width, height)
				}
			}
		case xml.CharData:
			if inText {
				texts = append(texts, string(token))
			}
		case xml.EndElement:
			inText = false
		}
	}
}

func TestSVG(t *testing.T) {
	r := aReport()
	r.Parameters.To = `<a&"b">]]>:1`
	svg := svgOf(t, r)
	texts := checkXML(t, svg)
	for _, want := range []string{
		"stress " + r.Parameters.To, r.done(), "1.55 kB/s each way, 1.50 round trips a second, 4 connections, 2 errors, 1 of 2 due and unsent",
		"Throughput", "round trips a second", "errors", "2 s", "Latency over time", "p50", "p99", "200 µs",
		"Latency distribution", "90 %", "p50 150 µs", "max 352 µs",
	} {
		if !slices.Contains(texts, want) {
			t.Errorf("no text %q among %q", want, texts)
		}
	}
	if !strings.Contains(svg, "prefers-color-scheme: dark") || strings.Contains(svg, "href") || strings.Contains(svg, "url(") {
		t.Error("not in the colors that its reader prefers, or with something from elsewhere")
	}
}

// TestSVGOfOddRuns draws what there may be too little or too much of.
func TestSVGOfOddRuns(t *testing.T) {
	nothing := newReport(&params{mode: bulk}, newMeter(1), false)
	same := aReport()
	same.Latency = latencies{Count: 1, Min: 100, P50: 100, P90: 100, P99: 100, P999: 100, Max: 100}
	same.Percentiles = []point{{100, 100}}
	same.Series = []sample{{To: 1e-6, Messages: 1, MessagesPerSecond: 1e6, P50: 100, P99: 100, Max: 100}}
	same.Elapsed = 1e-6
	zero := aReport()
	zero.Latency = latencies{Count: 1} // a clock may be that coarse
	zero.Percentiles = []point{{100, 0}}
	zero.Series = []sample{{To: 2, Messages: 1}}
	long := aReport()
	long.Series = nil
	for i := range 100_000 {
		long.Series = append(long.Series, sample{From: float64(i), To: float64(i + 1), Messages: 7, MessagesPerSecond: 7, P50: float64(i + 1), P99: 1e9})
	}
	long.Elapsed = 100_000
	long.Parameters.To = strings.Repeat("long.", 50) + "example.com:1"
	for name, r := range map[string]*report{"nothing": nothing, "one message": same, "no time": zero, "long": long} {
		t.Run(name, func(t *testing.T) {
			svg := svgOf(t, r)
			checkXML(t, svg)
			if len(svg) > 100_000 {
				t.Errorf("%d bytes", len(svg))
			}
		})
	}
}

// TestThin has a long series become a short one that says the same.
func TestThin(t *testing.T) {
	var series []sample
	for i := range 25 {
		series = append(series, sample{From: float64(i), To: float64(i + 1), Clients: int64(i), Messages: 1, Bytes: 2, Errors: 3, P50: float64(i), P99: float64(2 * i), Max: float64(3 * i)})
	}
	got := thin(series, 10)
	want := sample{From: 21, To: 24, Clients: 23, Messages: 3, MessagesPerSecond: 1, Bytes: 6, BytesPerSecond: 2, Errors: 9, P50: 23, P99: 46, Max: 69}
	if len(got) != 9 || got[7] != want || got[8].To != 25 {
		t.Errorf("%+v", got)
	}
	if got := thin(series, 25); len(got) != 25 {
		t.Errorf("%d of 25", len(got))
	}
}

// labels are those of an axis, with where they are in percent.
func labels(a axis) (s string) {
	for _, t := range a.ticks {
		s += fmt.Sprintf(" %s@%.0f", t.label, 100*a.place(t.at))
	}
	return s
}

func TestAxes(t *testing.T) {
	for _, of := range []struct {
		got  axis
		want string
	}{
		{linearAxis(0, count), " 0@0 0.2@20 0.4@40 0.6@60 0.8@80 1@100"},
		{linearAxis(0.3, count), " 0@0 0.1@33 0.2@67 0.3@100"},
		{linearAxis(98_472, count), " 0@0 20 k@20 40 k@40 60 k@60 80 k@80 100 k@100"},
		{linearAxis(101_000, count), " 0@0 50 k@33 100 k@67 150 k@100"},
		{linearAxis(7e6, count), " 0@0 2 M@25 4 M@50 6 M@75 8 M@100"},
		{logAxis(100, 100, duration), " 100 µs@0 200 µs@100"},
		{logAxis(100, 101, duration), " 100 µs@0 200 µs@100"},
		{logAxis(965, 2300, duration), " 500 µs@0 1 ms@30 2 ms@60 5 ms@100"},
		{logAxis(20, 6000, duration), " 100 µs@26 1 ms@63 10 ms@100"},
		{logAxis(1, 1e9, duration), " 1 µs@0 10 µs@11 100 µs@22 1 ms@33 10 ms@44 100 ms@56 1 s@67 10 s@78 100 s@89 1000 s@100"},
		{timeAxis(0), " 0@0 0.1 s@10 0.2 s@20 0.3 s@30 0.4 s@40 0.5 s@50 0.6 s@60 0.7 s@70 0.8 s@80 0.9 s@90 1 s@100"},
		{timeAxis(10), " 0@0 1 s@10 2 s@20 3 s@30 4 s@40 5 s@50 6 s@60 7 s@70 8 s@80 9 s@90 10 s@100"},
		{timeAxis(0.05), " 0@0 0.01 s@20 0.02 s@40 0.03 s@60 0.04 s@80 0.05 s@100"},
		{timeAxis(150), " 0@0 20 s@13 40 s@27 60 s@40 80 s@53 100 s@67 120 s@80 140 s@93"},
		{timeAxis(1800), " 0@0 5 min@17 10 min@33 15 min@50 20 min@67 25 min@83 30 min@100"},
		{timeAxis(48 * 3600), " 0@0 5 h@10 10 h@21 15 h@31 20 h@42 25 h@52 30 h@62 35 h@73 40 h@83 45 h@94"},
		{percentileAxis(1), " 0 %@0 50 %@30 90 %@100"},
		{percentileAxis(100_000), " 0 %@0 50 %@6 90 %@20 99 %@40 99.9 %@60 99.99 %@80 99.999 %@100"},
	} {
		if got := labels(of.got); got != of.want {
			t.Errorf("%s, not %s", got, of.want)
		}
	}
}

// TestAxesHold has axes of any range hold what they were made for, with some ticks and
// not many.
func TestAxesHold(t *testing.T) {
	for low := 0.001; low < 1e12; low *= 1.7 {
		for high := low; high < 1e13; high *= 2.3 {
			a := logAxis(low, high, duration)
			if n := len(a.ticks); n < 2 || n > 20 || a.place(low) < -1e-9 || a.place(high) > 1+1e-9 {
				t.Fatalf("%v to %v: %v, with places %v to %v", low, high, labels(a), a.place(low), a.place(high))
			}
		}
		for name, a := range map[string]axis{"linear": linearAxis(low, count), "time": timeAxis(min(low, 1e9))} {
			end := low
			if name == "time" {
				end = min(low, 1e9)
			}
			if n := len(a.ticks); n < 1 || n > 11 || a.place(end) > 1+1e-9 || math.IsNaN(a.place(end)) {
				t.Fatalf("%s up to %v: %v", name, end, labels(a))
			}
		}
	}
}
