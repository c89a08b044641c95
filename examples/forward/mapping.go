package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/tally"
)

// A state is how a mapping stands with the relay.
type state int

const (
	registering state = iota
	connected
	reconnecting
	refused // by the relay, and will be asked again
	leaving // no more clients are taken
	ended
)

func (s state) String() string {
	return [...]string{"registering", "connected", "reconnecting", "refused", "leaving", "ended"}[s]
}

// A mapping is a service at the relay, whose clients it carries to its target.
type mapping struct {
	target
	f      *forwarder
	log    *slog.Logger
	opts   []relay.RegisterOption
	missed *tally.Tally // clients that could not be carried

	mu    sync.Mutex
	ln    *relay.Listener // nil until it is registered
	addr  string
	state state
	since time.Time // when it came into the state
	why   string    // of reconnecting, refused and ended
}

// serve registers and carries clients until ctx ends and they have left. When over is
// closed it waits for them no longer.
func (m *mapping) serve(ctx context.Context, over <-chan struct{}) error {
	ln, err := relay.Register(ctx, m.f.relay, m.opts...)
	if err != nil {
		if ctx.Err() != nil && !answered(err) {
			return nil // that ctx ended was what it waited for, with -wait
		}
		return m.fail(err)
	}
	m.mu.Lock()
	m.ln = ln
	m.mu.Unlock()
	defer context.AfterFunc(ctx, func() {
		m.become(leaving, nil)
		ln.Close()
	})()

	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil {
			return m.fail(err)
		}
		go m.carry(c.(*relay.Conn))
	}
	select {
	case <-ln.Done(): // the clients have what was sent to them
		return nil
	case <-over:
		return errCut
	}
}

func (m *mapping) fail(err error) error {
	m.become(ended, err)
	if m.f.several() {
		return fmt.Errorf("-to %s: %w", m.text, err)
	}
	return err
}

// answered reports that err is what the relay itself said.
func answered(err error) bool {
	re, ok := errors.AsType[*relay.RegisterError](err)
	return ok && re.Err == nil
}

// event is told what happens between the listener and the relay.
func (m *mapping) event(ev relay.Event) {
	switch ev.Kind {
	case relay.EventRegistered, relay.EventResumed:
		m.become(connected, nil)
		m.announce(ev.Addr)
	case relay.EventLost:
		m.become(reconnecting, ev.Err)
	case relay.EventDraining:
		m.become(reconnecting, errors.New("the relay is going away"))
	case relay.EventRefused:
		next := reconnecting
		if answered(ev.Err) {
			next = refused
		} else if ev.Addr == "" {
			next = registering
		}
		m.become(next, ev.Err)
	case relay.EventEnded:
		m.become(ended, ev.Err)
	}
}

func (m *mapping) become(s state, why error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == leaving && s != ended {
		return
	}
	if m.state != s {
		m.state, m.since = s, time.Now()
	}
	m.why = ""
	if why != nil {
		m.why = why.Error()
	}
}

// announce prints the public address if it is another than before.
func (m *mapping) announce(addr string) {
	m.mu.Lock()
	same := m.addr == addr
	m.addr = addr
	m.mu.Unlock()
	switch {
	case same || m.f.out == nil:
	case m.f.several():
		fmt.Fprintf(m.f.out, "%s -> %s\n", clean(addr), clean(m.text))
	default:
		fmt.Fprintln(m.f.out, clean(addr))
	}
}

// row returns how the mapping is.
func (m *mapping) row() row {
	m.mu.Lock()
	r := row{addr: m.addr, target: m.text, state: m.state, since: m.since, why: m.why, missed: m.missed.Total()}
	ln := m.ln
	m.mu.Unlock()
	if r.addr == "" { // what it is going to be
		r.addr = cmp.Or(m.hostname, "any port")
		if m.port != 0 {
			r.addr = fmt.Sprintf("port %d", m.port)
		}
	}
	if ln != nil {
		r.stats = ln.Stats()
	}
	return r
}
