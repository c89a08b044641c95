package tally

import (
	"bytes"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// logger returns a logger, and what returns the lines logged since it was last called.
func logger(level slog.Level) (log *slog.Logger, lines func() string) {
	var buf bytes.Buffer
	h := slog.NewTextHandler(&buf, &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})
	return slog.New(h), func() string {
		defer buf.Reset()
		return buf.String()
	}
}

func TestAdd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, lines := logger(slog.LevelWarn)
		tally := New(log)
		expect := func(want string) {
			t.Helper()
			if got := lines(); got != want {
				t.Errorf("logged %q, want %q", got, want)
			}
		}
		tally.Add("full", "no room", "addr", "a")
		expect("level=WARN msg=\"no room\" kind=full addr=a\n")
		tally.Add("full", "no room", "addr", "b")
		tally.Add("full", "no room", "addr", "c")
		expect("")
		tally.Add("odd", "no sense", "odd") // an odd argument is for the logger to show
		expect("level=WARN msg=\"no sense\" kind=odd !BADKEY=odd\n")
		time.Sleep(time.Second - 1)
		tally.Add("full", "no room", "addr", "d")
		expect("")
		time.Sleep(time.Nanosecond)
		tally.Add("full", "no room", "addr", "e")
		expect("level=WARN msg=\"no room\" kind=full suppressed=3 addr=e\n")
		tally.Add("full", "no room")
		expect("")
		time.Sleep(time.Second)
		tally.Add("odd", "no sense")
		expect("level=WARN msg=\"no sense\" kind=odd\n")
		tally.Add("full", "no room")
		expect("level=WARN msg=\"no room\" kind=full suppressed=1\n")
		if got := tally.Counts(); !maps.Equal(got, map[string]int64{"full": 7, "odd": 2}) || tally.Total() != 9 {
			t.Errorf("counts %v, %d in all", got, tally.Total())
		}
		clear(tally.Counts()) // the caller's own
		if tally.Total() != 9 {
			t.Errorf("%d in all", tally.Total())
		}
	})
}

// The caller's arguments stay as they are, also when there is room behind them.
func TestArgs(t *testing.T) {
	log, lines := logger(slog.LevelWarn)
	args := []any{"a", 1, "b", 2}
	New(log).Add("kind", "msg", args[:2]...)
	if args[2] != "b" || args[3] != 2 || !strings.Contains(lines(), "kind=kind a=1\n") {
		t.Errorf("args are now %v", args)
	}
}

func TestQuiet(t *testing.T) {
	log, lines := logger(slog.LevelError)
	for _, tally := range []*Tally{New(nil), New(log)} {
		for range 3 {
			tally.Add("kind", "msg")
		}
		if tally.Total() != 3 || lines() != "" || tally.kinds["kind"].held != 0 {
			t.Errorf("%d in all, %d held back", tally.Total(), tally.kinds["kind"].held)
		}
	}
}

func TestConcurrent(t *testing.T) {
	tally := New(slog.New(slog.NewTextHandler(new(bytes.Buffer), nil)))
	var wg sync.WaitGroup
	for _, kind := range []string{"a", "b", "a", "b"} {
		wg.Go(func() {
			for range 1000 {
				tally.Add(kind, "msg")
			}
		})
	}
	wg.Wait()
	if got := tally.Counts(); !maps.Equal(got, map[string]int64{"a": 2000, "b": 2000}) {
		t.Errorf("counts %v", got)
	}
}

func TestClean(t *testing.T) {
	long := strings.Repeat("x", 127)
	for _, test := range []struct{ in, want string }{
		{"", ""},
		{"plain text, with it's \\ own `signs`", "plain text, with it's \\ own `signs`"},
		{"Größe 日本", "Größe 日本"},
		{`say "no"`, `"say \"no\""`},
		{"two\nlines", `"two\nlines"`},
		{"\x1b[31mred", `"\x1b[31mred"`},
		{"right\u202eleft ü", `"right\u202eleft \u00fc"`},
		{"\xff\xfe", `"\xff\xfe"`},
		{"\ufffd", "\ufffd"},
		{long + "y", long + "y"},
		{long + "yz", long + "y…"},
		{long + "ü", long + "…"}, // the ü lies across the border
		{long[1:] + "üz", long[1:] + "ü…"},
		{long[2:] + "日", long[2:] + "日"},
		{long[2:] + "日日", long[2:] + "日…"},
		{long[1:] + "日", long[1:] + "…"},
		{long[:125] + "😀", long[:125] + "…"},
		{long + "\n", `"` + long + `\n"`},
		{long + "\n.", `"` + long + `\n"…`},
		{long + ".\n", long + ".…"},
		{strings.Repeat("\x80", 200), `"` + strings.Repeat(`\x80`, 128) + `"…`},
		{strings.Repeat("\xf0", 200), `"` + strings.Repeat(`\xf0`, 128) + `"…`},
	} {
		if got := Clean(test.in); got != test.want {
			t.Errorf("Clean(%q) = %q, want %q", test.in, got, test.want)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("plain")
	f.Add("\x00\xff\u2028\"")
	f.Add(strings.Repeat("\xf0\x9f\x98", 100))
	f.Fuzz(func(t *testing.T, s string) {
		got := Clean(s)
		if len(got) > 4*maxClean+len(`""…`) || !utf8.ValidString(got) {
			t.Errorf("Clean(%q) = %q", s, got)
		}
		if strings.ContainsFunc(got, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\u2028' || r == '\u202e' }) {
			t.Errorf("Clean(%q) = %q, which is not fit for a log", s, got)
		}
		if inner := strings.TrimSuffix(got, "…"); !strings.HasPrefix(inner, `"`) && !strings.HasPrefix(s, inner) {
			t.Errorf("Clean(%q) = %q", s, got)
		}
	})
}
