package mux

import "time"

// A deadline wakes the readers or the writers of a stream when it passes. The stream's
// lock guards it. One timer serves all its settings: it looks at what is set when
// it fires, so a late firing of an older setting does no harm.
type deadline struct {
	at    time.Time // zero: none
	timer *time.Timer
}

func (d *deadline) expired() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// set moves or, with a zero t, clears the deadline, for calls already waiting too.
func (d *deadline) set(t time.Time, st *Stream, wake func(*Stream)) {
	d.at = t
	d.stop()
	if left := time.Until(t); !t.IsZero() && left > 0 {
		if d.timer == nil {
			d.timer = time.AfterFunc(left, func() { d.fire(st, wake) })
		} else {
			d.timer.Reset(left)
		}
	}
	wake(st)
}

func (d *deadline) fire(st *Stream, wake func(*Stream)) {
	st.mu.Lock()
	defer st.mu.Unlock()
	// The wall clock may have been set back since, for a deadline without a
	// monotonic reading.
	if left := time.Until(d.at); !d.at.IsZero() && left > 0 {
		d.timer.Reset(left)
		return
	}
	wake(st)
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
	}
}
