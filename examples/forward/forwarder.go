package main

import (
	"context"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/tcprelay/relay"
)

// A forwarder has all mappings of the process.
type forwarder struct {
	relay    string
	drain    time.Duration
	log      *slog.Logger
	out      io.Writer // for public addresses; nil: a view shows them
	mappings []*mapping
	asking   sync.WaitGroup // mappings that name a port, until they have their first answer
}

// newForwarder returns one that has yet to serve.
func newForwarder(c *config, services targets, opts []relay.RegisterOption, log *slog.Logger, out io.Writer) *forwarder {
	f := &forwarder{relay: c.relay, drain: c.drain, log: log, out: out}
	for _, t := range services {
		log := log
		if len(services) > 1 {
			log = log.With("to", t.text)
		}
		m := newMapping(f, t, log)
		m.shared = c.shared
		m.opts = slices.Concat(opts, t.options(), []relay.RegisterOption{relay.WithLogger(log)})
		f.mappings = append(f.mappings, m)
	}
	return f
}

// several reports that it takes a target's name to tell mappings apart.
func (f *forwarder) several() bool { return len(f.mappings) > 1 }

// serve carries clients until ctx ends, or the relay refuses one of the mappings for good;
// then those who are there may go on for a while. It returns why mappings failed, and
// whether it left clients behind.
func (f *forwarder) serve(ctx context.Context) (failed []error, cut bool) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	over := make(chan struct{}) // closed when the time to leave is
	defer context.AfterFunc(ctx, func() {
		time.AfterFunc(f.drain, func() { close(over) }) // first, for a log may have to wait
		f.logStop(context.Cause(ctx))
	})()
	type end struct {
		cut bool
		err error
	}
	ends := make(chan end)
	for _, m := range f.mappings {
		if m.port != 0 {
			f.asking.Add(1)
		}
	}
	for _, m := range f.mappings {
		go func() {
			if m.port == 0 && m.hostname == "" {
				f.asking.Wait() // or it might be given the port that another one names
			}
			cut, err := m.serve(ctx, stop, over)
			ends <- end{cut, err}
		}()
	}
	for left := len(f.mappings) - 1; left >= 0; left-- {
		e := <-ends
		cut = cut || e.cut
		if e.err != nil {
			failed = append(failed, e.err)
			if left > 0 {
				stop(e.err)
			}
		}
	}
	return failed, cut
}

// logStop says that no more clients are taken and why, if that was not asked for. What has
// failed is an error in the end.
func (f *forwarder) logStop(cause error) {
	if cause == context.Canceled {
		f.log.Info("stopping", "drain", f.drain)
	} else {
		f.log.Warn("stopping", "drain", f.drain, "err", cause)
	}
}
