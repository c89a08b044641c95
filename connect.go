package relay

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/pulse"
	"github.com/tcprelay/relay/internal/wire"
)

const (
	// quiet is for how long an app may have said nothing before it is asked whether it
	// is alive when a client comes. Its answer costs the client a round trip. If none
	// comes for as long again, another app is better.
	quiet = time.Second

	// answerTime is how long a client waits for the answer who waits for nothing else.
	answerTime = 5 * time.Second
)

// connect finds an app for a client and opens a stream to it. While the app is away
// it waits.
func (svc *service) connect(c *client) error {
	w := waiter{svc: svc}
	defer w.stop()
	for {
		m, changed, err := svc.pick(c)
		if err != nil {
			return err
		}
		if m == nil {
			if err := w.wait(changed); err != nil {
				return err
			}
			continue
		}
		if m.pulse != nil && !m.pulse.Fresh(quiet) && (m.spares == nil || !m.spares.fresh(quiet)) {
			if err := w.check(m); err != nil {
				svc.release(m)
				switch {
				case err == errWaited:
					return err
				case err != pulse.ErrNoAnswer: // it is over, also if its session does not say so yet
					c.over = append(c.over, m)
				case c.others:
					c.doubted = append(c.doubted, m)
				default: // it may be late, or has to be found dead; or it comes back
					if err := w.count(); err != nil {
						return err
					}
				}
				continue
			}
		}
		var room [64]byte
		var header []byte
		if m.lines != nil {
			header = wire.AppendProxy(room[:0], c.raw.RemoteAddr(), c.raw.LocalAddr())
		}
		if m.spares != nil {
			if d := m.spares.begin(header); d != nil {
				svc.enter(c, m, d, 0)
				return nil
			}
		}
		st, err := m.sess.Open(header)
		if err == nil {
			if m.lines != nil {
				st.Keep(keepUnanswered)
			}
			svc.enter(c, m, st, len(header))
			return nil
		}
		svc.release(m)
		if errors.Is(err, mux.ErrStreamsExhausted) {
			m.stopTaking()
			continue
		}
		c.notAgain = append(c.notAgain, m) // it is over, has too many, or takes nothing
	}
}

// pick chooses the session for a client and counts the client in: of those that were
// heard of lately the one with the fewest. If there is none it returns a channel that
// is closed when there may be.
func (svc *service) pick(c *client) (*member, <-chan struct{}, error) {
	svc.mu.Lock()
	defer svc.mu.Unlock()
	var best *member
	full, coming := false, false
	trusted := 0
	for m := range svc.members {
		if m.leaving || slices.Contains(c.over, m) {
			continue
		}
		if !m.taking {
			coming = true
			continue
		}
		if slices.Contains(c.notAgain, m) {
			full = full || m.sess.Err() == nil // otherwise it may come back
			continue
		}
		if !slices.Contains(c.doubted, m) {
			trusted++
		}
		if best == nil || c.prefers(m, best) {
			best = m
		}
	}
	switch {
	case best != nil:
		c.others = trusted > 1 || trusted == 1 && slices.Contains(c.doubted, best)
		best.active++
		best.opening++
	case svc.closed:
		return nil, nil, errClosed
	case full && !coming:
		return nil, svc.changed, errRefused
	}
	return best, svc.changed, nil
}

var errRefused = errors.New("the app takes no more clients")

// prefers reports that m is to get the client rather than o.
func (c *client) prefers(m, o *member) bool {
	if a, b := slices.Contains(c.doubted, m), slices.Contains(c.doubted, o); a != b {
		return b
	}
	if a, b := m.silent(), o.silent(); a != b {
		return b
	}
	return m.active < o.active
}

// silent reports that an app has missed a beat: it sends something in every interval.
func (m *member) silent() bool {
	return m.pulse != nil && m.interval > 0 && !m.pulse.Fresh(m.interval+m.interval/2)
}

// release counts a client out again that was not connected.
func (svc *service) release(m *member) {
	svc.mu.Lock()
	m.releaseLocked()
	last := m.openedLocked()
	svc.mu.Unlock()
	if last {
		m.sayClosed()
	}
}

// A waiter is a client's waiting for an app. All its waits together have WaitTime.
type waiter struct {
	svc     *service
	counted bool            // among those that wait
	ctx     context.Context // nil before the first wait
	cancel  context.CancelFunc
}

// start starts the clock.
func (w *waiter) start() {
	if w.ctx == nil {
		d := w.svc.limits.WaitTime
		if d < 0 {
			d = answerTime
		}
		w.ctx, w.cancel = context.WithTimeout(context.Background(), d)
	}
}

func (w *waiter) stop() {
	if w.ctx != nil {
		w.cancel()
	}
	if w.counted {
		w.svc.mu.Lock()
		defer w.svc.mu.Unlock()
		w.svc.waiting--
	}
}

// count counts the client among those that wait, if there may be another one.
func (w *waiter) count() error {
	if w.counted {
		return nil
	}
	svc := w.svc
	svc.mu.Lock()
	defer svc.mu.Unlock()
	if limit := svc.limits.Waiting; limit >= 0 && svc.waiting >= limit {
		return errWaiting
	}
	svc.waiting++
	w.counted = true
	return nil
}

// wait waits for an app that is away.
func (w *waiter) wait(changed <-chan struct{}) error {
	if w.svc.limits.WaitTime < 0 {
		return errWaited
	}
	if err := w.count(); err != nil {
		return err
	}
	w.start()
	select {
	case <-changed:
		return nil
	case <-w.ctx.Done():
		return errWaited
	}
}

// check asks an app that has been quiet whether it is there.
func (w *waiter) check(m *member) error {
	w.start()
	err := m.pulse.Check(w.ctx, quiet)
	if err != nil && w.ctx.Err() != nil {
		return errWaited
	}
	return err
}
