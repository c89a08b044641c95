package pulse

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const (
	interval = 10 * time.Second
	dead     = 30 * time.Second
	second   = time.Second
)

// A rig is a session that a Pulse watches, and what the Pulse did with it. Times count
// from the start.
type rig struct {
	*Pulse
	t     *testing.T
	began time.Time
	done  chan struct{}
	// onPing is what the session does with a ping, after it was written.
	onPing func(id int64)

	mu          sync.Mutex
	heard, sent time.Time
	pings       []time.Duration
	inPing      bool
	lost        []error
	lostAt      time.Duration
}

// start starts a Pulse, for a test in a bubble.
func start(t *testing.T, interval, dead time.Duration, onPing func(*rig, int64)) *rig {
	r := &rig{t: t, began: time.Now(), done: make(chan struct{})}
	r.onPing = func(id int64) { onPing(r, id) }
	p := Start(r, Config{Interval: interval, Dead: dead, Ping: r.ping, Lost: r.lose})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Pulse = p
	t.Cleanup(p.Stop)
	return r
}

func (r *rig) LastHeard() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.heard
}

func (r *rig) LastSent() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sent
}

func (r *rig) Done() <-chan struct{} { return r.done }

func (r *rig) hear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.heard = time.Now()
}

func (r *rig) send() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent = time.Now()
}

func (r *rig) ping(id int64) {
	r.mu.Lock()
	if r.inPing {
		r.t.Error("two pings at once")
	}
	r.inPing = true
	r.pings = append(r.pings, time.Since(r.began))
	if id != int64(len(r.pings)) {
		r.t.Errorf("ping %d has id %d", len(r.pings), id)
	}
	r.mu.Unlock()
	r.onPing(id)
	r.mu.Lock()
	r.inPing = false
	r.mu.Unlock()
}

func (r *rig) lose(err error) {
	r.mu.Lock()
	p := r.Pulse
	r.mu.Unlock()
	p.Stop() // must not wait for this call
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost = append(r.lost, err)
	r.lostAt = time.Since(r.began)
	close(r.done) // twice is a panic
}

// pinged checks when pings were sent, to now.
func (r *rig) pinged(want ...time.Duration) {
	r.t.Helper()
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(r.pings, want) {
		r.t.Errorf("pings at %v, want %v", r.pings, want)
	}
}

// died checks that the session was declared dead at the given time; < 0: that it was not.
func (r *rig) died(at time.Duration) {
	r.t.Helper()
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case at < 0 && len(r.lost) > 0:
		r.t.Errorf("dead at %v: %v", r.lostAt, r.lost)
	case at >= 0 && (len(r.lost) != 1 || r.lostAt != at || !errors.Is(r.lost[0], ErrSilent)):
		r.t.Errorf("dead at %v, want %v: %v", r.lostAt, at, r.lost)
	}
}

// What a session may do with a ping.

func unanswered(r *rig, _ int64) { r.send() }

func stuck(r *rig, _ int64) { <-r.done }

// answered returns what has it answered in a while.
func answered(in time.Duration) func(*rig, int64) {
	return func(r *rig, id int64) {
		r.send()
		time.AfterFunc(in, func() {
			r.hear()
			r.Pong(id)
		})
	}
}

func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

// every does something each d, for as long as given.
func every(d, during time.Duration, do ...func()) {
	for end := time.Now().Add(during); time.Now().Before(end); time.Sleep(d) {
		for _, f := range do {
			f()
		}
	}
}

func TestIdle(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, answered(20*time.Millisecond))
		if r.RTT() != 0 || r.Fresh(time.Hour) {
			t.Errorf("before anything was heard: RTT %v, fresh %v", r.RTT(), r.Fresh(time.Hour))
		}
		time.Sleep(45 * second)
		r.pinged(10*second, 20*second, 30*second, 40*second)
		r.died(-1)
		if r.RTT() != 20*time.Millisecond {
			t.Errorf("RTT %v", r.RTT())
		}
		ago := 5*second - 20*time.Millisecond
		if !r.Fresh(ago) || r.Fresh(ago-1) {
			t.Errorf("fresh within %v: %v, within less: %v", ago, r.Fresh(ago), r.Fresh(ago-1))
		}
	})
}

func TestBusyBothWays(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, unanswered)
		every(second, 10*time.Minute, r.hear, r.send)
		r.pinged()
		r.died(-1)
	})
}

func TestOnlyReceiving(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, unanswered)
		every(second, 41*second, r.hear)
		r.pinged(10*second, 20*second, 30*second, 40*second)
		r.died(-1)
	})
}

// A ping is due an interval after the first of both stopped, and no more often.
func TestDue(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, 0, unanswered)
		every(second, 4*second, r.hear, r.send) // to 3 s
		every(second, 5*second, r.hear)         // from 4 s to 8 s
		time.Sleep(20 * second)                 // to 29 s
		r.pinged(13*second, 23*second)
	})
}

// An end that only sends hears nothing, so its peer is asked, and is dead if it is silent.
func TestOnlySending(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, unanswered)
		every(second, 40*second, r.send)
		r.pinged(10*second, 20*second)
		r.died(30 * second)
	})
}

func TestDeath(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, unanswered)
		time.Sleep(3500 * time.Millisecond)
		r.hear()
		time.Sleep(dead - 1)
		r.died(-1)
		r.hear() // at the last moment
		time.Sleep(dead - 1)
		r.died(-1)
		time.Sleep(time.Nanosecond)
		r.died(3500*time.Millisecond + 2*dead - 1)
		if err := r.lost[0].Error(); !strings.Contains(err, "30s") {
			t.Errorf("the error does not say how long it was silent: %v", err)
		}
		pings := len(r.pings)
		time.Sleep(time.Hour)
		r.died(r.lostAt)
		if len(r.pings) != pings {
			t.Error("a ping after the death")
		}
		if err := r.Check(t.Context(), second); err != r.lost[0] {
			t.Errorf("Check after the death: %v", err)
		}
		r.Pong(1)
	})
}

// Without pings silence is still found out, and without Dead nothing is ever dead.
func TestOff(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, 0, dead, unanswered)
		time.Sleep(time.Hour)
		r.pinged()
		r.died(dead)
	})
	bubble(t, func(t *testing.T) {
		r := start(t, -1, -1, answered(second))
		time.Sleep(time.Hour)
		r.pinged()
		if err := r.Check(t.Context(), 5*second); err != nil {
			t.Error(err)
		}
		r.pinged(time.Hour)
	})
	bubble(t, func(t *testing.T) {
		r := start(t, interval, 0, unanswered)
		time.Sleep(1000 * interval)
		r.died(-1)
		if len(r.pings) != 1000 || len(r.Pulse.pings) != maxPings {
			t.Errorf("%d pings, and %d of them kept", len(r.pings), len(r.Pulse.pings))
		}
		r.Pong(1000 - maxPings) // forgotten
		if r.RTT() != 0 {
			t.Errorf("RTT %v", r.RTT())
		}
		r.Pong(1000 - maxPings + 1) // the oldest that is kept
		if want := (maxPings - 1) * interval; r.RTT() != want {
			t.Errorf("RTT %v, want %v", r.RTT(), want)
		}
	})
}

// A ping that cannot be written delays nothing.
func TestStuckPing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, stuck)
		time.Sleep(time.Hour)
		r.pinged(10 * second)
		r.died(dead)
	})
}

// After a ping that took long to be written, the next is due an interval later.
func TestSlowPing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, 0, func(r *rig, _ int64) {
			time.Sleep(35 * second)
			r.send()
		})
		time.Sleep(60 * second)
		r.pinged(10*second, 55*second)
		time.Sleep(35 * second) // to the end of the second one, and before the third
	})
}

// Two ends, one of which sends so much that its own pings and pongs never get through.
func TestSaturation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		source := start(t, interval, dead, stuck)
		sink := start(t, interval, dead, func(r *rig, _ int64) {
			r.send()
			time.AfterFunc(2*second, source.hear)
		})
		every(second, 10*time.Minute, source.send, sink.hear)
		source.died(-1)
		sink.died(-1)
		source.pinged(10 * second)
		if n := len(sink.pings); n != 60 {
			t.Errorf("the sink sent %d pings", n)
		}
		close(source.done) // lets its ping go
	})
}

// On a link where an answer takes longer than the interval, it is measured all the same.
func TestSlowAnswers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, 2*dead, answered(25*second))
		time.Sleep(10 * time.Minute)
		r.died(-1)
		if r.RTT() != 25*second {
			t.Errorf("RTT %v", r.RTT())
		}
	})
}

func TestUnknownPong(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, 0, unanswered)
		r.Pong(0)
		r.Pong(1)
		time.Sleep(12 * second)
		for _, id := range []int64{-1, 0, 2, 99, 1 << 62} {
			r.Pong(id)
		}
		if r.RTT() != 0 {
			t.Errorf("RTT %v", r.RTT())
		}
		r.Pong(1)
		time.Sleep(second)
		r.Pong(1) // again
		if r.RTT() != 2*second {
			t.Errorf("RTT %v", r.RTT())
		}
		time.Sleep(20 * second) // to 33 s, with pings at 20 s and 30 s
		r.Pong(3)
		r.Pong(2) // the answer to a later one was its answer too
		if r.RTT() != 3*second {
			t.Errorf("RTT %v", r.RTT())
		}
	})
}

// check runs Check, and returns how long it took and what it returned.
func (r *rig) check(ctx context.Context, within time.Duration) (took time.Duration, err error) {
	start := time.Now()
	err = r.Check(ctx, within)
	return time.Since(start), err
}

func TestCheckAnswered(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, answered(second))
		time.Sleep(3 * second)
		if took, err := r.check(t.Context(), 5*second); err != nil || took != second {
			t.Errorf("%v after %v", err, took)
		}
		r.pinged(3 * second)
		// An answered ping is not shared.
		if took, err := r.check(t.Context(), 5*second); err != nil || took != second {
			t.Errorf("%v after %v", err, took)
		}
		r.pinged(3*second, 4*second)
		// They count for the interval.
		time.Sleep(10 * second)
		r.pinged(3*second, 4*second, 14*second)
		r.died(-1)
	})
}

func TestCheckUnanswered(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, unanswered)
		time.Sleep(3 * second)
		r.hear()
		if took, err := r.check(t.Context(), 5*second); err != ErrNoAnswer || took != 5*second {
			t.Errorf("%v after %v", err, took)
		}
		time.Sleep(dead - 5*second - time.Nanosecond)
		r.died(-1) // for that
		time.Sleep(time.Nanosecond)
		r.died(3*second + dead)
	})
}

// One that lets no ping out does not answer either.
func TestCheckStuck(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, stuck)
		time.Sleep(12 * second)
		if took, err := r.check(t.Context(), 5*second); err != ErrNoAnswer || took != 5*second {
			t.Errorf("%v after %v", err, took)
		}
		r.pinged(10 * second)
		time.Sleep(dead)
		r.died(dead)
	})
}

// Anything that is heard will do, and only what is heard after the call.
func TestCheckHeard(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, unanswered)
		time.Sleep(second)
		time.AfterFunc(second, r.hear)
		if took, err := r.check(t.Context(), 5*second); err != nil || took != 5*second {
			t.Errorf("%v after %v", err, took)
		}
		r.died(-1)
		r.hear()
		if took, err := r.check(t.Context(), 5*second); err != ErrNoAnswer || took != 5*second {
			t.Errorf("%v after %v", err, took)
		}
		r.died(-1)
	})
}

// A pong at the very end of the wait may count, and may not; a session that dies then is
// no session without an answer.
func TestCheckJustInTime(t *testing.T) {
	for range 20 {
		bubble(t, func(t *testing.T) {
			r := start(t, interval, dead, unanswered)
			time.AfterFunc(5*second, func() { r.Pong(1) })
			if took, err := r.check(t.Context(), 5*second); err != nil && err != ErrNoAnswer || took != 5*second {
				t.Errorf("%v after %v", err, took)
			}
			r.died(-1)
		})
		bubble(t, func(t *testing.T) {
			r := start(t, interval, dead, unanswered)
			time.Sleep(dead - 5*second)
			if took, err := r.check(t.Context(), 5*second); err != ErrNoAnswer && !errors.Is(err, ErrSilent) || took != 5*second {
				t.Errorf("%v after %v", err, took)
			}
			r.died(dead)
		})
	}
}

// A ping that is still being written is shared, and is as good as sent when it was
// written.
func TestCheckWhilePinging(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, 24*second, func(r *rig, _ int64) {
			if len(r.pings) == 1 {
				time.Sleep(12 * second)
			}
			r.send()
		})
		time.AfterFunc(3*second, r.hear) // so that the timer fires at 27 s
		time.AfterFunc(24*second, r.hear)
		for _, check := range []struct {
			at    time.Duration
			pings []time.Duration
		}{
			{16 * second, []time.Duration{10 * second}}, // until 22 s
			{26 * second, []time.Duration{10 * second}},
			{28 * second, []time.Duration{10 * second, 28 * second}},
		} {
			time.Sleep(check.at - time.Since(r.began))
			ctx, cancel := context.WithTimeout(t.Context(), second)
			if err := r.Check(ctx, 5*second); err != context.DeadlineExceeded {
				t.Errorf("at %v: %v", check.at, err)
			}
			cancel()
			r.pinged(check.pings...)
		}
	})
}

func TestCheckShared(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, 0, 0, answered(4*second))
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if took, err := r.check(t.Context(), 5*second); err != nil || took != 4*second {
					t.Errorf("%v after %v", err, took)
				}
			})
		}
		synctest.Wait()
		time.Sleep(second)
		for range 100 {
			wg.Go(func() {
				if took, err := r.check(t.Context(), 5*second); err != nil || took != 3*second {
					t.Errorf("later: %v after %v", err, took)
				}
			})
		}
		wg.Wait()
		r.pinged(0)
	})
}

// A session's death ends all that wait for its answer.
func TestCheckSharedDeath(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, 0, dead, unanswered)
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if took, err := r.check(t.Context(), time.Hour); !errors.Is(err, ErrSilent) || took != dead {
					t.Errorf("%v after %v", err, took)
				}
			})
		}
		wg.Wait()
		r.pinged(0)
		r.died(dead)
	})
}

// A ping that was sent too long ago is not shared.
func TestCheckOldPing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, 0, func(r *rig, id int64) {
			r.send()
			if id == 2 {
				answered(second)(r, id)
			}
		})
		time.Sleep(15 * second)
		if took, err := r.check(t.Context(), 5*second); err != nil || took != second {
			t.Errorf("%v after %v", err, took)
		}
		r.pinged(10*second, 15*second)
	})
}

func TestCheckEnded(t *testing.T) {
	cause := errors.New("enough")
	type ends struct {
		*rig
		cancel context.CancelCauseFunc
	}
	for name, test := range map[string]struct {
		end  func(ends)
		want error
	}{
		"context": {func(e ends) { e.cancel(cause) }, cause},
		"session": {func(e ends) { close(e.done) }, net.ErrClosed},
		"stop":    {func(e ends) { e.Stop() }, net.ErrClosed},
	} {
		for _, within := range []time.Duration{time.Hour, 0} {
			t.Run(name, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					r := start(t, interval, 0, unanswered)
					ctx, cancel := context.WithCancelCause(t.Context())
					defer cancel(nil)
					time.AfterFunc(5*second, func() { test.end(ends{r, cancel}) })
					if took, err := r.check(ctx, within); !errors.Is(err, test.want) || took != 5*second {
						t.Errorf("%v after %v", err, took)
					}
					if took, err := r.check(ctx, within); !errors.Is(err, test.want) || took != 0 {
						t.Errorf("again: %v after %v", err, took)
					}
					r.pinged(0)
					r.died(-1)
				})
			})
		}
	}
}

func TestStop(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, unanswered)
		time.Sleep(25 * second)
		r.Stop()
		r.Stop()
		time.Sleep(time.Hour)
		r.pinged(10*second, 20*second)
		r.died(-1)
	})
	// At once, and while a ping is stuck: it returns, and nothing follows.
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, unanswered)
		r.Stop()
		time.Sleep(time.Hour)
		r.pinged()
		r.died(-1)
	})
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, stuck)
		time.Sleep(15 * second)
		r.Stop()
		close(r.done)
		time.Sleep(time.Hour)
		r.pinged(10 * second)
		r.died(-1)
	})
}

// A session that ended by itself is not pinged, and is not dead.
func TestEnded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := start(t, interval, dead, unanswered)
		time.Sleep(5 * second)
		close(r.done)
		time.Sleep(time.Hour)
		r.pinged()
		r.died(-1)
	})
}
