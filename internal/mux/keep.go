package mux

// kept is a copy of what a stream took to send, in case the peer refuses it. Its
// stream's lock guards it.
type kept struct {
	b     []byte
	limit int
}

// Keep has the stream keep a copy of all bytes that Write and ReadFrom take from now
// on, also of those that ReadFrom has read when it learns that the peer refused the
// stream. The copy is dropped, for good, with the first byte, window or FIN that the
// peer sends, before it would exceed limit bytes, and when the stream ends in any other
// way than by a refusal.
func (st *Stream) Keep(limit int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.closed && !st.heard && (st.werr == nil || st.refusedLocked()) {
		st.kept = &kept{limit: limit}
	}
}

// Kept returns what was kept if the peer refused the stream: all that Write and
// ReadFrom have taken since Keep, none of which the peer has made anything of. It is
// whole when the calls of Write and ReadFrom have returned, and there until Close.
func (st *Stream) Kept() (b []byte, ok bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.kept == nil || !st.refusedLocked() {
		return nil, false
	}
	return st.kept.b, true
}

// refusedLocked reports whether the peer refused the stream, or has never seen it.
func (st *Stream) refusedLocked() bool {
	err, ok := st.werr.(*StreamError)
	return ok && err.Remote && (err.Code == StreamRefused || err.Code == AcceptQueueFull)
}

// keepLocked adds to what is kept, which there has to be.
//
//go:noinline // see writer.writeRaw
func (st *Stream) keepLocked(p []byte) {
	if len(p) > st.kept.limit-len(st.kept.b) {
		st.kept = nil
		return
	}
	st.kept.b = append(st.kept.b, p...)
}

// unsentLocked takes note that ReadFrom has read n bytes into c and could not send them.
//
//go:noinline // see writer.writeRaw
func (st *Stream) unsentLocked(c *chunk, n int) {
	if st.kept != nil {
		st.keepUnsentLocked(c.payload(n))
	}
}

// keepUnsentLocked takes note that ReadFrom has read p and could not send it. Where it is
// not kept, it is lost, and the copy is not whole.
func (st *Stream) keepUnsentLocked(p []byte) {
	switch {
	case st.kept == nil:
	case st.refusedLocked():
		st.keepLocked(p)
	default:
		st.kept = nil
	}
}
