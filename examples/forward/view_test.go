package main

import (
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
)

var noon = time.Date(2025, 6, 1, 12, 0, 0, 0, time.UTC)

func someSnapshot() *snapshot {
	return &snapshot{
		relay: "relay.example.com:8080", start: noon.Add(-time.Hour), now: noon,
		rows: []row{
			{addr: "relay.example.com:8081", target: "localhost:3000", state: connected, since: noon.Add(-50 * time.Minute),
				stats:  relay.Stats{Accepted: 1204, Live: 3, BytesIn: 12_900_000, BytesOut: 1 << 30, Reconnects: 2},
				inRate: 1234, outRate: 3_500_000, missed: 7},
			{addr: "port 2222", target: "unix:/run/ssh.sock", state: refused, since: noon.Add(-90 * time.Second),
				why: "relay: register at relay.example.com:8080: port_unavailable (\"port 2222 is in use\")"},
		},
		notes: []note{
			{noon.Add(-2 * time.Minute), false, "registered", "registered relay=relay.example.com:8080", 1},
			{noon.Add(-time.Minute), true, "no local connection", "no local connection err=refused", 7},
			{noon, false, "client came", "client came client=192.0.2.1:51324", 1},
		},
	}
}

func wantScreen(t *testing.T, got []string, want string) {
	t.Helper()
	if got := strings.Join(got, "\n") + "\n"; got != want[1:] {
		t.Errorf("drawn:\n%swant:\n%s", got, want[1:])
	}
}

func TestRender(t *testing.T) {
	wantScreen(t, render(someSnapshot(), 80, 24, false), `
forward at relay.example.com:8080                            up 1h0m0s, ^C stops

relay.example.com:8081 -> localhost:3000
  connected 50m0s             clients: 3 (1204 in all, 7 reset), reconnects: 2
  in: 12.3 MiB, 1.2 KiB/s     out: 1.0 GiB, 3.3 MiB/s

port 2222 -> unix:/run/ssh.sock
  refused 1m30s               clients: 0 (0 in all)
  in: 0 B, 0 B/s              out: 0 B, 0 B/s
  relay: register at relay.example.com:8080: port_unavailable ("port 2222 is ...

11:58:00 registered relay=relay.example.com:8080
11:59:00 no local connection err=refused (7 such)
12:00:00 client came client=192.0.2.1:51324
`)
}

// With less height a mapping has a line, and with still less some have none.
func TestRenderSmall(t *testing.T) {
	wantScreen(t, render(someSnapshot(), 100, 10, false), `
forward at relay.example.com:8080                                                up 1h0m0s, ^C stops

connected    3 now     1.2 KiB/s in   3.3 MiB/s out   relay.example.com:8081 -> localhost:3000
refused      0 now     0 B/s in       0 B/s out       port 2222 -> unix:/run/ssh.sock (relay: reg...

11:58:00 registered relay=relay.example.com:8080
11:59:00 no local connection err=refused (7 such)
12:00:00 client came client=192.0.2.1:51324
`)
	s := someSnapshot()
	for range 3 {
		s.rows = append(s.rows, s.rows...)
	}
	wantScreen(t, render(s, 40, 6, false), `
forward at relay.example.com:8080

connected    3 now     1.2 KiB/s in   3.
refused      0 now     0 B/s in       0
connected    3 now     1.2 KiB/s in   3.
and 13 more
`)
}

func TestRenderStopping(t *testing.T) {
	s := someSnapshot()
	for i := range s.rows {
		s.rows[i].state = leaving
	}
	if first := render(s, 100, 24, false)[0]; !strings.Contains(first, "stopping") {
		t.Errorf("%q", first)
	}
}

var sgrs = regexp.MustCompile(`\x1b\[[0-9]+m`)

// Whatever is shown, on a terminal of whatever size, fits it and has nothing in it that
// a terminal obeys, but for the view's own colors.
func TestRenderFits(t *testing.T) {
	const evil = "\x1b[2J\x9b31m\a\r\n\t\u202e世界\xff\u0085 and a text that is too long for most terminals, if only it is told twice"
	s := someSnapshot()
	s.relay = evil
	s.rows = append(s.rows, row{addr: evil, target: evil, why: evil, state: ended, missed: 1 << 60,
		stats: relay.Stats{Accepted: 1 << 62, Live: 1 << 30, BytesIn: 1 << 62, BytesOut: 1 << 62}, inRate: 1e20, outRate: 1e20})
	s.notes = append(s.notes, note{noon, true, evil, evil, 1000})
	for width := range 130 {
		for height := range 40 {
			plain := render(s, width, height, false)
			colored := render(s, width, height, true)
			if len(plain) > height || len(plain) != len(colored) {
				t.Fatalf("%d by %d: %d lines, and %d in color", width, height, len(plain), len(colored))
			}
			for i, line := range plain {
				if len(line) > width || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r > '~' }) {
					t.Fatalf("%d by %d: %q", width, height, line)
				}
				if got := sgrs.ReplaceAllString(colored[i], ""); got != line {
					t.Fatalf("%d by %d: in color %q, without %q", width, height, colored[i], line)
				}
			}
		}
	}
	all := strings.Join(render(s, 129, 39, true), "\n")
	for _, want := range []string{"\x1b[32m", "\x1b[31m", "\x1b[33m", `\x1b[2J`} {
		if !strings.Contains(all, want) {
			t.Errorf("no %q in:\n%s", want, all)
		}
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"":                       "",
		`plain "text" \ as it ~`: `plain "text" \ as it ~`,
		"\x1b[31mred\x7f":        `\x1b[31mred\x7f`,
		"a\nb\r\tc":              `a\nb\r\tc`,
		"Größe":                  `Gr\u00f6\u00dfe`,
		"\u202e\u0085\x85\xff":   `\u202e\u0085\x85\xff`,
		"😀":                      `\U0001f600`,
	} {
		if got := clean(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestSize(t *testing.T) {
	for in, want := range map[int64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 KiB", 1024: "1.0 KiB", 102_300: "99.9 KiB", 102_400: "100 KiB",
		1_023_000: "999 KiB", 1_023_999: "1.0 MiB", 1 << 30: "1.0 GiB", 1 << 40: "1.0 TiB", 1<<63 - 1: "8192 PiB",
	} {
		if got := size(in); got != want {
			t.Errorf("%d: %s, want %s", in, got, want)
		}
	}
}

// Rates are those of the last seconds.
func TestHistory(t *testing.T) {
	var h history
	at := noon
	add := func(after time.Duration, in, out int64, wantIn, wantOut float64) {
		t.Helper()
		at = at.Add(after)
		if gotIn, gotOut := h.add(sample{at, in, out}); gotIn != wantIn || gotOut != wantOut {
			t.Errorf("%v and %v, want %v and %v", gotIn, gotOut, wantIn, wantOut)
		}
	}
	add(0, 5000, 0, 0, 0)
	add(time.Second, 6000, 10, 1000, 10)
	add(time.Second, 6000, 10, 500, 5)
	add(3*time.Second, 6000, 10, 200, 2)
	add(time.Second, 6000, 10, 0, 0) // the burst is over
	add(time.Hour, 3_606_000, 10, 1000, 0)
	for range 1000 {
		h.add(sample{at, 0, 0})
		at = at.Add(100 * time.Millisecond)
	}
	if len(h) > 52 {
		t.Errorf("%d samples are kept", len(h))
	}
}

// A crowd takes a line a second for each kind of thing that happens to it.
func TestNotes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNotes()
		log := slog.New(n.handler())
		web := log.With("to", "web").WithGroup("g")
		for i := range 1000 {
			log.Debug("client came", "client", i)
			log.Info("client was cut off", "client", i)
			web.Debug("client came", "client", i)
		}
		web.Warn("lost the relay", "relay", "r", "err", errors.New("why"), "addr", "a")
		want := []note{
			{time.Now(), false, "client came", "client came client=999", 1000},
			{time.Now(), false, "client was cut off", "client was cut off client=999", 1000},
			{time.Now(), false, "client came to=web", "client came to=web g.client=999", 1000},
			{time.Now(), true, "lost the relay to=web", "lost the relay to=web g.addr=a: why", 1},
		}
		same := func(got, want []note) {
			t.Helper()
			for i := range max(len(got), len(want)) {
				if i >= len(got) || i >= len(want) || !got[i].at.Equal(want[i].at) || fmt.Sprint(got[i].warn, got[i].kind, got[i].text, got[i].n) != fmt.Sprint(want[i].warn, want[i].kind, want[i].text, want[i].n) {
					t.Fatalf("%+v, want %+v", got, want)
				}
			}
		}
		same(n.last(), want)
		time.Sleep(time.Second)
		log.Info("client came", "client", "x")
		same(n.last(), append(want, note{time.Now(), false, "client came", "client came client=x", 1}))
		for range 2 * keptNotes {
			time.Sleep(time.Second)
			log.Info("back at the relay")
		}
		if got := n.last(); len(got) != keptNotes || got[0].kind != "back at the relay" {
			t.Errorf("%d notes, the first %+v", len(got), got[0])
		}
	})
}

func TestSizeOr(t *testing.T) {
	t.Setenv("COLUMNS", "100")
	t.Setenv("LINES", "x")
	for _, tt := range [][4]int{{0, 0, 100, 24}, {10, 5, 10, 5}} {
		if w, h := sizeOr(tt[0], tt[1]); w != tt[2] || h != tt[3] {
			t.Errorf("%d by %d: %d by %d", tt[0], tt[1], w, h)
		}
	}
	t.Setenv("COLUMNS", "-5")
	if w, _ := sizeOr(0, 0); w != 80 {
		t.Errorf("%d wide", w)
	}
}
