// Package pulse tells whether the peer of a session is alive. Any byte that arrives
// counts; pings are for the times when nothing else crosses the wire.
package pulse

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"sync"
	"time"
)

// ErrSilent is what a session that was declared dead ended with.
var ErrSilent = errors.New("nothing heard from the peer")

// ErrNoAnswer is what Check returns if no sign of life came in time.
var ErrNoAnswer = errors.New("no answer in time")

// A Session is what a Pulse watches. Its times come from time.Now, or are zero
// before the first byte, and then count as the moment of Start. Its methods do not wait,
// and do not call the Pulse, which holds its lock.
type Session interface {
	LastHeard() time.Time // when bytes last arrived
	LastSent() time.Time  // when bytes were last written
	Done() <-chan struct{}
}

// Config says when a Pulse does what.
type Config struct {
	// Interval is how long nothing is heard, or nothing sent, before a ping. Zero or
	// less: none but those of Check.
	//
	// Nothing sent is a reason too, because an end that only receives is not heard
	// otherwise by one whose own pings are stuck behind what it sends.
	Interval time.Duration
	// Dead is how long nothing is heard before the session is dead. Zero or less: it
	// never is.
	Dead time.Duration
	// Ping sends a ping. It may wait, and must return when the session has ended. It is
	// called on a goroutine of its own, and never twice at once.
	Ping func(id int64)
	// Trip, if not nil, is told how long each answer took. It must not wait, nor call the
	// Pulse.
	Trip func(d time.Duration)
	// Lost is called when the session is dead, once at most, and must end it.
	Lost func(err error)
}

// maxPings bounds the unanswered pings that are kept to tell the time that an answer
// took. On a slow link there may be several.
const maxPings = 16

// A Pulse watches one session until Stop, or until the session has ended. It has no
// goroutine, only a timer. Its methods may be called from any goroutine.
type Pulse struct {
	s     Session
	cfg   Config
	start time.Time
	over  chan struct{} // closed when err is set

	mu      sync.Mutex
	err     error       // the session was declared dead, or Stop was called
	timer   *time.Timer // runs beat when something is due
	wanted  bool        // a Check needs a ping; a beat is about to send it
	pinging bool        // in cfg.Ping
	pinged  time.Time   // when cfg.Ping was last called, or returned
	last    int64       // the id of the last ping
	pings   []ping      // unanswered, oldest first
	ponged  chan struct{}
	rtt     time.Duration
}

type ping struct {
	id int64
	at time.Time
}

// Start starts watching s.
func Start(s Session, cfg Config) *Pulse {
	p := &Pulse{s: s, cfg: cfg, start: time.Now(), over: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.timer = time.AfterFunc(math.MaxInt64, p.beat)
	p.armLocked(p.start)
	return p
}

// Stop ends the watching, and every Check with net.ErrClosed. No call of Ping or Lost
// begins afterwards; it does not wait for one that has begun, so that both may call it.
func (p *Pulse) Stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.endLocked(net.ErrClosed)
	}
}

func (p *Pulse) endLocked(err error) {
	p.err = err
	p.timer.Stop()
	close(p.over)
}

// endedLocked returns why there is nothing to watch any more.
func (p *Pulse) endedLocked() error {
	if p.err != nil {
		return p.err
	}
	select {
	case <-p.s.Done():
		return net.ErrClosed
	default:
		return nil
	}
}

// beat does what is due, in a goroutine of its own. The timer runs it, at times earlier
// than needed, because what is heard and sent does not move the timer.
func (p *Pulse) beat() {
	p.mu.Lock()
	now := time.Now()
	switch {
	case p.endedLocked() != nil:
		p.mu.Unlock()
	case p.cfg.Dead > 0 && p.silence(now) >= p.cfg.Dead:
		p.unlockAndLose(now)
	case !p.pinging && (p.wanted || p.cfg.Interval > 0 && p.untilPing(now) <= 0):
		p.unlockAndPing(now)
	default:
		p.armLocked(now)
		p.mu.Unlock()
	}
}

func (p *Pulse) unlockAndPing(now time.Time) {
	p.wanted, p.pinging, p.pinged = false, true, now
	p.last++
	id := p.last
	if len(p.pings) == maxPings {
		p.pings = slices.Delete(p.pings, 0, 1)
	}
	p.pings = append(p.pings, ping{id, now})
	p.armLocked(now) // for the death of a session that does not let the ping out
	p.mu.Unlock()
	p.cfg.Ping(id)
	p.mu.Lock()
	defer p.mu.Unlock()
	now = time.Now()
	p.pinging, p.pinged = false, now
	if p.endedLocked() == nil {
		p.armLocked(now)
	}
}

// unlockAndLose declares the session dead.
func (p *Pulse) unlockAndLose(now time.Time) {
	err := fmt.Errorf("%w for %v", ErrSilent, p.silence(now).Round(time.Millisecond))
	p.endLocked(err)
	p.mu.Unlock()
	p.cfg.Lost(err)
}

// armLocked sets the timer to the next moment when something may be due.
func (p *Pulse) armLocked(now time.Time) {
	const never = math.MaxInt64
	next := time.Duration(never)
	if p.cfg.Dead > 0 {
		next = p.cfg.Dead - p.silence(now)
	}
	if p.cfg.Interval > 0 && !p.pinging {
		next = min(next, p.untilPing(now))
	}
	switch {
	case next <= 0: // not by the timer: in a synctest bubble the caller would run it (golang/go#78156)
		go p.beat()
	case next < never:
		p.timer.Reset(next)
	}
}

// silence returns for how long nothing was heard.
func (p *Pulse) silence(now time.Time) time.Duration { return now.Sub(p.orStart(p.s.LastHeard())) }

// untilPing returns how long it is until a ping is due, if nothing is heard or sent.
func (p *Pulse) untilPing(now time.Time) time.Duration {
	quiet := max(p.silence(now), now.Sub(p.orStart(p.s.LastSent())))
	if !p.pinged.IsZero() {
		quiet = min(quiet, now.Sub(p.pinged))
	}
	return p.cfg.Interval - quiet
}

func (p *Pulse) orStart(t time.Time) time.Time {
	if t.IsZero() {
		return p.start
	}
	return t
}

// Pong takes the peer's answer to a ping. One to a ping that was not sent, or was
// answered, does nothing.
func (p *Pulse) Pong(id int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.IndexFunc(p.pings, func(q ping) bool { return q.id == id })
	if i < 0 {
		return
	}
	p.rtt = time.Since(p.pings[i].at)
	if p.cfg.Trip != nil {
		p.cfg.Trip(p.rtt)
	}
	p.pings = slices.Delete(p.pings, 0, i+1)
	if p.ponged != nil {
		close(p.ponged)
		p.ponged = nil
	}
}

// RTT returns how long the last ping that was answered took, from the call of Ping to
// that of Pong. It is 0 before.
func (p *Pulse) RTT() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rtt
}

// Fresh reports that something was heard within the given time.
func (p *Pulse) Fresh(within time.Duration) bool {
	heard := p.s.LastHeard()
	return !heard.IsZero() && time.Since(heard) <= within
}

// Ask sends a ping at once, and does not wait for the answer, which RTT and Config.Trip
// tell of.
func (p *Pulse) Ask() { p.ask(0) }

// Check asks the peer for a sign of life, and waits until one is heard. It sends a ping
// at once, unless one that is not answered was sent less than within ago. The pong
// ends the wait. If within passes without it, and nothing else was heard since the
// call began, Check returns ErrNoAnswer; the session goes on, for it may be late. Check
// also returns when ctx ends, with its cause, and when the session does, with
// net.ErrClosed or an error that wraps ErrSilent. If within is 0 or less, nothing but
// these ends the wait.
func (p *Pulse) Check(ctx context.Context, within time.Duration) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	heard := p.s.LastHeard()
	ponged, err := p.ask(within)
	if err != nil {
		return err
	}
	var passed <-chan time.Time
	if within > 0 {
		timer := time.NewTimer(within)
		defer timer.Stop()
		passed = timer.C
	}
	select {
	case <-ponged:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-p.s.Done():
	case <-p.over:
	case <-passed:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.endedLocked(); err != nil {
		return err
	}
	if p.ponged != ponged || p.s.LastHeard().After(heard) {
		return nil
	}
	return ErrNoAnswer
}

// ask sees to it that a ping is under way, and returns what is closed at the pong.
func (p *Pulse) ask(within time.Duration) (ponged chan struct{}, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.endedLocked(); err != nil {
		return nil, err
	}
	// One that is still in Ping has not been sent yet, however long that takes.
	shared := p.pinging || len(p.pings) > 0 && time.Since(p.pinged) < within
	if !shared {
		p.wanted = true
		go p.beat()
	}
	if p.ponged == nil {
		p.ponged = make(chan struct{})
	}
	return p.ponged, nil
}
