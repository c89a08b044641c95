package main

import (
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

var someSamples = []sample{
	{To: 1, Clients: 100, Messages: 100_000, MessagesPerSecond: 100_000, BytesPerSecond: 12.3e6, P50: 950, P99: 2100},
	{To: 2, Clients: 3, Errors: 1},
	{To: 3, Clients: 3, Errors: 2},
}

func TestProgressLines(t *testing.T) {
	var b strings.Builder
	p := &progress{w: &b, mode: roundTrips}
	for _, s := range someSamples {
		p.show(s)
	}
	p.end()
	want := "    1s  100 clients  100000 round trips/s  p50 950 µs  p99 2.10 ms  0 errors\n" +
		"    2s  3 clients  0 round trips/s  p50 -  p99 -  1 error\n" +
		"    3s  3 clients  0 round trips/s  p50 -  p99 -  3 errors\n"
	if b.String() != want {
		t.Errorf("%s", b.String())
	}
}

// TestProgressOnTerminal has one line be written over the last, whose rest is covered.
func TestProgressOnTerminal(t *testing.T) {
	var b strings.Builder
	p := &progress{w: &b, terminal: true, mode: bulk}
	for _, s := range someSamples {
		p.show(s)
	}
	p.end()
	want := "\r    1s  100 clients  12.3 MB/s  p50 950 µs  p99 2.10 ms  0 errors" +
		"\r    2s  3 clients  0 B/s  p50 -  p99 -  1 error                  " +
		"\r    3s  3 clients  0 B/s  p50 -  p99 -  3 errors\n"
	if b.String() != want {
		t.Errorf("%q\nnot\n%q", b.String(), want)
	}
}

// TestProgressFits cuts a line that a terminal would wrap.
func TestProgressFits(t *testing.T) {
	var b strings.Builder
	p := &progress{w: &b, terminal: true, mode: roundTrips}
	p.show(sample{To: 12345, Clients: 1_000_000, Messages: 1, MessagesPerSecond: 12_345_678, P50: 1234, P99: 123_456, Errors: 1_234_567})
	if n := utf8.RuneCountInString(strings.TrimPrefix(b.String(), "\r")); n != 79 {
		t.Errorf("%d characters: %q", n, b.String())
	}
}

// TestProgressOncePerSecond lets a run go on for a while.
func TestProgressOncePerSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipesTo(stallAt(-1, 0))
		p.rate = 10
		p.time = 3800 * time.Millisecond
		var b strings.Builder
		r := run(t.Context(), p, &progress{w: &b, mode: p.mode})
		lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
		if len(lines) != 3 || !strings.HasPrefix(lines[0], "    1s  1 clients  ") || !strings.HasPrefix(lines[2], "    3s  ") {
			t.Errorf("%s", b.String())
		}
		if len(r.Series) != 4 || r.Series[3].From != 3 || r.Series[3].To != 3.8 {
			t.Errorf("%+v", r.Series)
		}
	})
}

// TestProgressEndsItsLine has a run leave the terminal's line, for the report.
func TestProgressEndsItsLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipesTo(stallAt(-1, 0))
		p.rate = 10
		p.time = 2500 * time.Millisecond
		var b strings.Builder
		run(t.Context(), p, &progress{w: &b, terminal: true, mode: p.mode})
		if s := b.String(); strings.Count(s, "\r") != 2 || strings.Index(s, "\n") != len(s)-1 {
			t.Errorf("%q", s)
		}
	})
}

// TestProgressThatNobodyReads has a run not depend on it.
func TestProgressThatNobodyReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipesTo(stallAt(-1, 0))
		p.rate = 10
		p.time = 2 * time.Second
		r, w := io.Pipe()
		r.Close()
		if report := run(t.Context(), p, &progress{w: w, mode: p.mode}); report.Totals.Messages == 0 || report.Totals.Errors != 0 {
			t.Errorf("%+v", report.Totals)
		}
	})
}
