package main

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	keptNotes = 100         // more than a screen is going to show
	foldTime  = time.Second // notes of a kind that come so soon are one line
)

// A note is a line of the log as the view shows it.
type note struct {
	at   time.Time // when the first of them came
	warn bool
	kind string // its message, and the mapping it is about
	text string // of the last one
	n    int    // how many of the kind
}

// notes are the last lines of the log. A crowd of clients takes a line a second for each
// kind of thing that happens to them, and not all the room.
type notes struct {
	changed chan struct{} // has room for one, which says that there is something new

	mu  sync.Mutex
	all []note // the latest last
}

func newNotes() *notes { return &notes{changed: make(chan struct{}, 1)} }

func (n *notes) add(at time.Time, warn bool, kind, text string) {
	n.mu.Lock()
	n.addLocked(note{at, warn, kind, text, 1})
	n.mu.Unlock()
	n.nudge()
}

// nudge has the view drawn.
func (n *notes) nudge() {
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

func (n *notes) addLocked(next note) {
	for i := len(n.all) - 1; i >= 0 && next.at.Sub(n.all[i].at) < foldTime; i-- {
		if old := &n.all[i]; old.kind == next.kind {
			old.text = next.text
			old.n++
			return
		}
	}
	if len(n.all) == keptNotes {
		n.all = append(n.all[:0], n.all[1:]...)
	}
	n.all = append(n.all, next)
}

// last returns a copy of what there is.
func (n *notes) last() []note {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]note(nil), n.all...)
}

// handler returns one for package slog whose records become notes, clients included.
func (n *notes) handler() slog.Handler { return noter{notes: n} }

type noter struct {
	*notes
	attrs string // of its logger: " key=value" each
	group string // before the keys to come: "name."
}

func (h noter) Enabled(context.Context, slog.Level) bool { return true }

func (h noter) Handle(_ context.Context, r slog.Record) error {
	var why, attrs string
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "err": // what matters most, if not all has room
			why = ": " + a.Value.Resolve().String()
		case "relay", "kind": // which the view says, or the message
		default:
			attrs += h.format(a)
		}
		return true
	})
	kind := r.Message + h.attrs
	h.add(r.Time, r.Level >= slog.LevelWarn, kind, kind+attrs+why)
	return nil
}

func (h noter) format(a slog.Attr) string {
	return " " + h.group + a.Key + "=" + a.Value.Resolve().String()
}

func (h noter) WithAttrs(attrs []slog.Attr) slog.Handler {
	for _, a := range attrs {
		h.attrs += h.format(a)
	}
	return h
}

func (h noter) WithGroup(name string) slog.Handler {
	if name != "" {
		h.group += name + "."
	}
	return h
}
