package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/backoff"
	"github.com/tcprelay/relay/internal/tally"
)

// A state is how a mapping stands with the relay.
type state int

const (
	registering state = iota
	connected
	reconnecting
	refused // by the relay, and will be asked again
	away    // not registered, until the target can be reached
	leaving // no more clients are taken
	ended
)

func (s state) String() string {
	return [...]string{"registering", "connected", "reconnecting", "refused", "target away", "leaving", "ended"}[s]
}

// A mapping is a service at the relay, whose clients it carries to its target.
type mapping struct {
	target
	shared bool // with others, who may have the clients when the target is away
	f      *forwarder
	log    *slog.Logger
	opts   []relay.RegisterOption
	missed *tally.Tally // clients that could not be carried
	asked  sync.Once    // when the relay has said something, or could not be reached

	mu        sync.Mutex
	turn      int               // how often the target was away: what is of an earlier turn does not count
	listeners []*relay.Listener // of this turn and, as long as they have clients, of others
	past      relay.Stats       // of listeners that have ended
	addr      string
	state     state
	since     time.Time // when it came into the state
	why       string    // of reconnecting, refused, away and ended
}

func newMapping(f *forwarder, t target, log *slog.Logger) *mapping {
	return &mapping{target: t, f: f, log: log, missed: tally.New(log), since: time.Now()}
}

// serve registers and carries clients until ctx ends and they have left. When over is
// closed it waits for them no longer, and reports that they were cut off. If the relay
// ends it while there are clients it calls stop with its error, to have the others end as
// well.
func (m *mapping) serve(ctx context.Context, stop context.CancelCauseFunc, over <-chan struct{}) (cut bool, err error) {
	err = m.take(ctx)
	if err != nil && m.f.several() {
		err = fmt.Errorf("-to %s: %w", m.text, err)
	}
	if err == nil {
		m.become(leaving, nil)
	} else {
		m.become(ended, err)
		if m.busy() {
			stop(err)
		}
	}
	cut = !m.await(over)
	m.become(ended, err)
	return cut, err
}

// take registers and takes clients until ctx ends, or the relay will not have it.
func (m *mapping) take(ctx context.Context) error {
	for {
		ln, turn, err := m.register(ctx)
		m.answered()
		if err != nil && ctx.Err() != nil && !saidByRelay(err) {
			return nil // that ctx ended was what it waited for, with -wait
		}
		if err != nil {
			return err
		}
		if err := m.accept(ctx, ln, turn); err != nil || ctx.Err() != nil {
			return err
		}
		if m.awaitTarget(ctx) != nil {
			return nil
		}
	}
}

// register registers the mapping. After its target was away it first asks for the port
// that it had.
func (m *mapping) register(ctx context.Context) (ln *relay.Listener, turn int, err error) {
	m.mu.Lock()
	turn = m.turn
	_, port, _ := net.SplitHostPort(m.addr)
	m.mu.Unlock()
	opts := slices.Concat(m.opts, []relay.RegisterOption{relay.WithEvents(func(ev relay.Event) { m.event(turn, ev) })})
	if had, _ := strconv.Atoi(port); turn > 0 && had != 0 && m.hostname == "" {
		ln, err = relay.Register(ctx, m.f.relay, append(opts, relay.WithPort(had))...)
	}
	if ln == nil { // never had one, or others have it now, or the name has another
		if turn > 0 {
			opts = append(opts, relay.WithWait())
		}
		ln, err = relay.Register(ctx, m.f.relay, opts...)
	}
	if err != nil {
		return nil, turn, err
	}
	m.mu.Lock()
	m.forgetLocked()
	m.listeners = append(m.listeners, ln)
	m.mu.Unlock()
	return ln, turn, nil
}

// accept carries the clients of a listener until that is closed, which it is when ctx ends
// or the target is away.
func (m *mapping) accept(ctx context.Context, ln *relay.Listener, turn int) error {
	defer context.AfterFunc(ctx, func() {
		m.become(leaving, nil)
		ln.Close()
	})()
	a := acceptors{ln: ln, failed: make(chan error, 1), carry: func(c *relay.Conn) {
		m.carry(c, func(err error) { m.leave(ln, turn, err) })
	}}
	a.start()
	err := <-a.failed
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	ln.Close()
	return err
}

// leave has a mapping that shares its name take no more clients after one of them could
// not be carried: the relay gives clients to who has the fewest, and would give all to the
// one that loses them. Those who wait go to the others.
func (m *mapping) leave(ln *relay.Listener, turn int, why error) {
	m.mu.Lock()
	first := turn == m.turn
	if first {
		m.becomeLocked(away, why)
		m.turn++
	}
	m.mu.Unlock()
	if first {
		m.log.Warn("target is away", "err", why)
		ln.Close()
	}
}

// The pauses between two looks whether a target is back.
const (
	minPause = 250 * time.Millisecond
	maxPause = 5 * time.Second
)

// awaitTarget returns when the target can be reached again, or an error when ctx ends.
func (m *mapping) awaitTarget(ctx context.Context) error {
	pause := backoff.Backoff{Min: minPause, Max: maxPause}
	for {
		if err := pause.Wait(ctx); err != nil {
			return err
		}
		c, err := m.dial(nil, nil)
		if err == nil {
			c.Close()
			m.log.Info("target is back")
			m.become(registering, nil)
			return nil
		}
		m.become(away, err)
	}
}

// busy reports whether there is a client left.
func (m *mapping) busy() bool {
	for _, ln := range m.current() {
		if !closed(ln.Done()) {
			return true
		}
	}
	return false
}

// await waits until the clients have what was sent to them, or over is closed. It reports
// whether they have.
func (m *mapping) await(over <-chan struct{}) bool {
	for _, ln := range m.current() {
		select {
		case <-ln.Done():
		case <-over:
			if !closed(ln.Done()) {
				return false
			}
		}
	}
	return true
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// current returns the listeners.
func (m *mapping) current() []*relay.Listener {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.listeners)
}

// answered lets those register who wait for this one.
func (m *mapping) answered() {
	m.asked.Do(func() {
		if m.port != 0 {
			m.f.asking.Done()
		}
	})
}

// saidByRelay reports that err is what the relay itself said.
func saidByRelay(err error) bool {
	re, ok := errors.AsType[*relay.RegisterError](err)
	return ok && re.Err == nil
}

// event is told what happens between a listener and the relay.
func (m *mapping) event(turn int, ev relay.Event) {
	next := connected
	switch ev.Kind {
	case relay.EventLost:
		next = reconnecting
	case relay.EventDraining:
		next, ev.Err = reconnecting, errors.New("the relay is going away")
	case relay.EventRefused:
		next = reconnecting
		if saidByRelay(ev.Err) {
			next = refused
		} else if ev.Addr == "" {
			next = registering
		}
	case relay.EventEnded:
		next = ended
	}
	m.mu.Lock()
	now := turn == m.turn
	if now {
		m.becomeLocked(next, ev.Err)
	}
	m.mu.Unlock()
	if now && next == connected {
		m.announce(ev.Addr)
	}
	m.answered()
}

func (m *mapping) become(s state, why error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.becomeLocked(s, why)
}

// becomeLocked does not leave leaving but for ended, nor that.
func (m *mapping) becomeLocked(s state, why error) {
	if m.state >= leaving && s < ended || m.state == ended && why == nil {
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

// row returns how the mapping is, but for its figures.
func (m *mapping) row() row {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := row{addr: m.addr, target: m.text, state: m.state, since: m.since, why: m.why, missed: m.missed.Total()}
	if r.addr == "" { // what it is going to be
		r.addr = cmp.Or(m.hostname, "any port")
		if m.port != 0 {
			r.addr = fmt.Sprintf("port %d", m.port)
		}
	}
	return r
}

// forgetLocked keeps no more than the figures of listeners that have ended.
func (m *mapping) forgetLocked() {
	m.listeners = slices.DeleteFunc(m.listeners, func(ln *relay.Listener) bool {
		over := closed(ln.Done())
		if over { // and its figures are the last
			m.past = sum(m.past, ln.Stats())
		}
		return over
	})
}

// stats returns the figures of all listeners that there were.
func (m *mapping) stats() relay.Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forgetLocked()
	all := m.past
	for _, ln := range m.listeners {
		all = sum(all, ln.Stats())
	}
	return all
}

func sum(a, b relay.Stats) relay.Stats {
	a.Accepted += b.Accepted
	a.Live += b.Live
	a.BytesIn += b.BytesIn
	a.BytesOut += b.BytesOut
	a.Reconnects += b.Reconnects
	return a
}
