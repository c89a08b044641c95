package mux

// recvWindow is the receiving side's account of what the peer may send.
//
// The window grows when it is what holds the sender up. The sign of that needs no
// clock: a frame that ends exactly where an earlier window ended, although we have
// given more since, means that the sender stood still until our update reached it;
// and if hardly anything is unread meanwhile, the reader was not the cause.
// Its stream's lock guards it.
type recvWindow struct {
	size  int // how much may be under way or unread
	left  int // how much of it the peer has not used
	freed int // consumed and not given back yet

	watching bool
	edge     int // bytes from here to the end of the window before the last update
}

func (w *recvWindow) init() { w.size, w.left = Window, Window }

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
	w.left -= n
	w.edge -= n
	return nil
}

// consumed counts n bytes as read and returns by how much to increase the peer's
// window, 0 most of the time: updates go out for half a window at once.
func (w *recvWindow) consumed(n int, st *Stream) (inc int) {
	w.freed += n
	if w.freed < w.size/2 {
		return 0
	}
	inc = w.freed
	w.freed = 0
	if w.left == 0 && w.readerKeepsUp(st) {
		inc += w.grow(st)
	}
	if !w.watching {
		w.watching, w.edge = true, w.left
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
		if w.edge == 0 && w.left > 0 && !st.reset && !st.finRecv && w.readerKeepsUp(st) {
			inc = w.grow(st)
			w.left += inc
		}
	}
	if inc > 0 {
		st.s.out.windowUpdate(st.id, inc) // leaves when the reader has handed out all it has
	}
	st.mu.Unlock()
}

func (w *recvWindow) readerKeepsUp(st *Stream) bool { return int(st.unread.Load()) <= w.size/4 }

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
	return inc
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
