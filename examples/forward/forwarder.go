package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/tally"
)

// A forwarder has all mappings of the process.
type forwarder struct {
	relay    string
	drain    time.Duration
	log      *slog.Logger
	out      io.Writer // for public addresses; nil: a view shows them
	mappings []*mapping
}

// newForwarder returns one that has yet to serve.
func newForwarder(c *config, services targets, opts []relay.RegisterOption, log *slog.Logger, out io.Writer) *forwarder {
	f := &forwarder{relay: c.relay, drain: c.drain, log: log, out: out}
	for _, t := range services {
		m := &mapping{target: t, f: f, log: log, since: time.Now()}
		if len(services) > 1 {
			m.log = log.With("to", t.text)
		}
		m.missed = tally.New(m.log)
		m.opts = slices.Concat(opts, t.options(), []relay.RegisterOption{relay.WithLogger(m.log), relay.WithEvents(m.event)})
		f.mappings = append(f.mappings, m)
	}
	return f
}

// several reports that it takes a target's name to tell mappings apart.
func (f *forwarder) several() bool { return len(f.mappings) > 1 }

// errCut is the end of a mapping whose clients had no more time to leave.
var errCut = errors.New("clients were cut off")

// serve carries clients until ctx ends, or the relay refuses one of the mappings for good;
// then those who are there may go on for a while. It returns why mappings failed, and
// whether it left clients behind.
func (f *forwarder) serve(ctx context.Context) (failed []error, cut bool) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	over := make(chan struct{}) // closed when the time to leave is
	defer context.AfterFunc(ctx, func() {
		f.log.Info("stopping", "drain", f.drain)
		time.AfterFunc(f.drain, func() { close(over) })
	})()
	ended := make(chan error)
	for _, m := range f.mappings {
		go func() { ended <- m.serve(ctx, over) }()
	}
	for left := len(f.mappings) - 1; left >= 0; left-- {
		err := <-ended
		switch {
		case err == nil:
		case errors.Is(err, errCut):
			cut = true
		default:
			if f.several() {
				f.log.Error("mapping failed", "err", err)
			}
			failed = append(failed, err)
			if left > 0 {
				stop()
			}
		}
	}
	return failed, cut
}
