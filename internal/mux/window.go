package mux

import (
	"cmp"
	"sync"
	"sync/atomic"
	"time"
)

// recvWindow is the receiving side's account of what the peer may send. Its stream's
// lock guards it.
//
// The window grows when it is what holds the sender up. The sign of that is a frame that
// ends exactly where an earlier window ended, although we have given more since: the
// sender stood still until our update reached it; and if hardly anything is unread
// meanwhile, the reader was not the cause.
//
// A sender that only waits for the transport shows the same sign, and what a larger window
// lets it send would just wait in the transport, in front of everybody's messages. So the
// window does not grow beyond what comes in paths round trips, of the shortest that the
// session has seen (trips).
//
// It shrinks by what is read and not given back, half at a time and down to its initial
// size, each time that as much as it holds was read and half of it always waited:
// then it is the reader that is slow, and a larger window would only be held unread.
type recvWindow struct {
	size  int // how much may be under way or unread
	left  int // how much of it the peer has not used
	freed int // consumed and not given back yet

	watching bool
	edge     int       // bytes from here to the end of the window before the last update
	given    time.Time // when that left
	waited   time.Time // when one left that the sender stood still for, until the next frame

	came  int       // bytes since the rate was looked at
	since time.Time // which was then; or when the first of all came
	rate  float64   // the last one, in bytes a second; 0: none
	lasts float64   // that, or the one before if it was less; 0: none

	turn   int // bytes consumed of a window's worth, after which it is looked at
	behind int // that was unread at least, this turn
	before int // and the last one
	target int // shrinks to that
}

func (w *recvWindow) init() {
	w.size, w.left, w.target = Window, Window, Window
	w.behind, w.before = Window, Window
}

// grown returns how much larger than the initial one the window is.
func (w *recvWindow) grown() int64 { return int64(w.size - Window) }

// reserve takes n bytes, the length of a frame that is about to be read, from the
// window before any of it is.
func (st *Stream) reserve(n int) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.finRecv && n > 0 {
		return protocolError("DATA for stream %d after its FIN", st.id)
	}
	w := &st.window
	if n > w.left {
		return &SessionError{Code: FlowControlError, Err: errWindow}
	}
	if w.since.IsZero() {
		w.since = time.Now()
	}
	if n > 0 && !w.waited.IsZero() { // a FIN alone needs no window
		now := time.Now()
		st.s.trips.add(now.Sub(w.waited), now)
		w.waited = time.Time{}
	}
	w.left -= n
	w.edge -= n
	w.came += n
	return nil
}

// updateEvery returns how much is given back at once. A sender that fills the path waits
// for it besides the round trip, so of a large window it is a small part.
func (w *recvWindow) updateEvery() int { return max(Window/2, w.size/16) }

// consumed counts n bytes as read and returns by how much to increase the peer's
// window, 0 most of the time.
func (w *recvWindow) consumed(n int, st *Stream) (inc int) {
	w.freed += n
	w.turn += n
	w.behind = min(w.behind, int(st.unread.Load()))
	if w.freed < w.updateEvery() {
		return 0
	}
	inc = w.freed
	w.freed = 0
	if w.left == 0 && w.tooSmall(st) && w.readerKeepsUp(st) {
		inc += w.grow(st)
	}
	if w.turn >= w.size {
		if w.behind > w.size/2 {
			w.target = max(w.size/2, Window)
		}
		w.turn, w.behind, w.before = 0, w.size, w.behind
	}
	if inc -= w.shrink(inc, st); inc == 0 {
		return 0
	}
	if !w.watching {
		w.watching, w.edge, w.given = true, w.left, time.Now()
	}
	w.left += inc
	return inc
}

// windowSpent looks, at the end of a frame, whether the sender was held up.
func (st *Stream) windowSpent() {
	st.mu.Lock()
	w := &st.window
	inc := 0
	if w.watching && w.edge <= 0 {
		w.watching = false
		if w.edge == 0 && w.left > 0 && !st.reset && !st.finRecv {
			w.waited = w.given
			if w.tooSmall(st) && w.readerKeepsUp(st) {
				inc = w.grow(st)
				w.left += inc
			}
		}
	}
	if inc > 0 {
		st.s.out.windowUpdate(st.id, inc) // leaves when the reader has handed out all it has
	}
	st.mu.Unlock()
}

// readerKeepsUp reports that the reader had caught up lately, and is not far behind now:
// what has just come may be a whole window at once.
func (w *recvWindow) readerKeepsUp(st *Stream) bool {
	unread := int(st.unread.Load())
	return unread <= w.size/2 && min(unread, w.behind, w.before) <= w.size/4
}

// paths is how many times what the path holds a window may be: there are updates on their
// way, and readers that pause. It is more than two, for the rate of a sender that is held
// up doubles with the window, and what counts is the one before.
const paths = 3

// leastTrip is what a round trip is taken for at least. Processes have to be woken, which
// on a busy machine takes as long, and a path that is empty meanwhile is not used.
const leastTrip = 250 * time.Microsecond

// tooSmall reports that less than paths round trips use up the window, at the rate at
// which the last window's worth came, or the one before if that is less: what had queued
// up somewhere comes at once, and is no rate that lasts. Within a window's worth there is
// no rate, for a sender that is held up sends it at once too, and then waits.
func (w *recvWindow) tooSmall(st *Stream) bool {
	if w.came >= w.size {
		now := time.Now()
		rate := float64(w.came) / now.Sub(w.since).Seconds() // infinite if that took no time
		w.lasts = min(rate, cmp.Or(w.rate, rate))
		w.since, w.came, w.rate = now, 0, rate
	}
	trip := st.s.trips.shortest()
	return trip == 0 || w.lasts == 0 || float64(w.size) < paths*w.lasts*max(trip, leastTrip).Seconds()
}

// trips keeps the shortest round trip of the last minutes, from an update to the first
// frame that it made possible, or as Session.Trip is told. What is in front of a frame
// makes longer ones; and so may another path, which is believed in the end.
type trips struct {
	least atomic.Int64 // 0: unknown

	mu          sync.Mutex
	now, before time.Duration
	turn        time.Time // when now began
}

// tripsTurn is for how long a round trip counts at least, and half of how long at most.
const tripsTurn = 2 * time.Minute

func (t *trips) shortest() time.Duration { return time.Duration(t.least.Load()) }

func (t *trips) add(d time.Duration, at time.Time) {
	if d <= 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.turn.IsZero() || at.Sub(t.turn) >= tripsTurn {
		t.turn, t.before, t.now = at, t.now, 0
	}
	if t.now == 0 || d < t.now {
		t.now = d
	}
	least := t.now
	if t.before > 0 {
		least = min(least, t.before)
	}
	t.least.Store(int64(least))
}

// grow doubles the window, as far as it may, and returns by how much it grew. Half
// of what a session may hold unread is there for growing.
func (w *recvWindow) grow(st *Stream) int {
	cfg := &st.s.cfg
	inc := min(w.size, cfg.MaxWindow-w.size)
	if inc <= 0 {
		return 0
	}
	if st.s.grown.Add(int64(inc)) > int64(cfg.MaxUnread/2) {
		st.s.grown.Add(int64(-inc))
		return 0
	}
	w.size += inc
	w.target = w.size
	return inc
}

// shrink takes up to n from the window, towards its target, and returns how much.
func (w *recvWindow) shrink(n int, st *Stream) int {
	n = min(n, w.size-w.target)
	if n > 0 {
		w.size -= n
		st.s.grown.Add(int64(-n))
	}
	return n
}

// windowIncreased handles a WNDINC: the peer lets us send n bytes more.
func (st *Stream) windowIncreased(n int) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if n > maxID-st.send { // 31 bits too
		return &SessionError{Code: FlowControlError, Err: errWindow}
	}
	st.send += n
	st.kept = nil // somebody has read
	st.writable.Broadcast()
	return nil
}
