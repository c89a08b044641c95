// Package tally counts refusals, and logs them without letting those who are refused
// fill the log.
package tally

import (
	"context"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// A Tally counts what happened by its kind. It may be used from any goroutine.
type Tally struct {
	log *slog.Logger

	mu    sync.Mutex
	kinds map[string]entry
}

type entry struct {
	count  int64
	logged time.Time // when a line of this kind was last
	held   int64     // how many were held back since
}

// New returns a Tally that logs to log, if that is not nil.
func New(log *slog.Logger) *Tally {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Tally{log: log, kinds: make(map[string]entry)}
}

// Add counts one of the given kind, and logs msg at level Warn, with args as slog has
// them and the attribute "kind", unless a line of that kind was logged less than a
// second ago. The attribute "suppressed" says how many were held back for that since
// the last line; those behind the last line of all show only in Counts.
//
// Kinds are kept for good, so they come from the program and never from a peer.
func (t *Tally) Add(kind, msg string, args ...any) {
	held, ok := t.count(kind)
	if !ok {
		return
	}
	attrs := []any{slog.String("kind", kind)}
	if held > 0 {
		attrs = append(attrs, slog.Int64("suppressed", held))
	}
	t.log.Warn(msg, append(attrs, args...)...)
}

// count reports whether a line may be logged, and how many could not be before it.
func (t *Tally) count(kind string) (held int64, ok bool) {
	logs := t.log.Enabled(context.Background(), slog.LevelWarn)
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.kinds[kind]
	e.count++
	if logs {
		held = e.held
		if now := time.Now(); now.Sub(e.logged) >= time.Second {
			e.logged, e.held, ok = now, 0, true
		} else {
			e.held++
		}
	}
	t.kinds[kind] = e
	return held, ok
}

// Counts returns how many there were of each kind.
func (t *Tally) Counts() map[string]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	counts := make(map[string]int64, len(t.kinds))
	for kind, e := range t.kinds {
		counts[kind] = e.count
	}
	return counts
}

// Total returns how many there were.
func (t *Tally) Total() (n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.kinds {
		n += e.count
	}
	return n
}

// maxClean is how many bytes of a text Clean keeps.
const maxClean = 128

// Clean makes text that is not to be trusted fit for a log: it keeps no more than its
// first 128 bytes, whole characters, and says "…" behind what it cut. If not all of
// that is printable, or there is a double quote in it, it is quoted as by
// strconv.QuoteToASCII, which may make it four times as long.
func Clean(s string) string {
	if len(s) <= maxClean {
		return quote(s)
	}
	end := maxClean
	// A character has at most four bytes. Where there are more that cannot start one,
	// none is cut in two.
	for i := range utf8.UTFMax {
		if utf8.RuneStart(s[maxClean-i]) {
			end = maxClean - i
			break
		}
	}
	return quote(s[:end]) + "…"
}

func quote(s string) string {
	odd := func(r rune) bool { return r == '"' || !strconv.IsPrint(r) }
	if utf8.ValidString(s) && !strings.ContainsFunc(s, odd) {
		return s
	}
	return strconv.QuoteToASCII(s)
}
