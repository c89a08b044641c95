package mux

import (
	"io"
	"slices"

	"github.com/tcprelay/relay/internal/splice"
)

// A sink is a socket that all that a stream receives is written to. While it takes
// everything at once the session's reader does that, straight from the chunk that it read
// into; when it does not, a goroutine writes until nothing is left. So an idle stream
// holds none. The stream's lock guards it.
type sink struct {
	w    io.Writer
	try  tryWriter
	done func(n int64, err error) // called once, without the lock, maybe by the reader
	busy bool                     // somebody writes, and looks again when that is done
	n    int64
	err  error // of try; the socket may tell it only once
}

// A tryWriter writes what can be written without waiting. Less than all is no error.
type tryWriter interface {
	write(p []byte) (n int, err error)
	drain(p *splice.Pipe) (n int, err error)
}

// StartWriteTo is a WriteTo that does not wait, and calls done with what that would
// return. If w is a socket no goroutine is needed while nothing arrives, or w takes it at
// once; the session's reader may call done then, so that must not wait for anything. Nobody
// else may write to w until done is called. A stream has one reader then.
func (st *Stream) StartWriteTo(w io.Writer, done func(n int64, err error)) {
	if raw := newRawWriter(w); raw != nil {
		st.startSink(&sink{w: w, try: raw, done: done})
		return
	}
	go func() { done(st.WriteTo(w)) }()
}

func (st *Stream) startSink(k *sink) {
	st.mu.Lock()
	st.sink = k
	update := false
	if ready, err := st.readyLocked(); ready && err == nil && len(st.segs) == 1 {
		update = st.tryFirstLocked(k)
	}
	st.wakeReadersLocked()
	st.unlock()
	if update {
		st.s.out.flush()
	}
}

// tryFirstLocked has a sink take what waits for it, which is mostly a client's first
// message, as far as it does at once. It reports whether there is window to be given back.
// The lock is released meanwhile.
func (st *Stream) tryFirstLocked(k *sink) (update bool) {
	k.busy = true
	seg := st.segs[0]
	st.popLocked(1)
	st.mu.Unlock()
	n, err := k.try.write(seg.b)
	st.mu.Lock()
	st.unread.Add(int64(-n))
	st.s.unread.Add(int64(-n))
	update = st.passedLocked(k, n, err)
	if seg.b = seg.b[n:]; len(seg.b) > 0 && !st.closed { // a reset leaves what came before it
		st.segs = slices.Insert(st.segs, 0, seg)
		return update
	}
	st.unread.Add(int64(-len(seg.b)))
	st.s.unread.Add(int64(-len(seg.b)))
	seg.c.release()
	return update
}

// wakeReadersLocked has the readers look what there is for them: bytes, an error or a
// deadline.
func (st *Stream) wakeReadersLocked() {
	st.readable.Broadcast()
	if k := st.sink; k != nil && !k.busy {
		if ready, err := st.readyLocked(); ready || err != nil || k.err != nil {
			k.busy = true
			go st.runSink(k)
		}
	}
}

// passLocked gives b to a sink that has had all before it, and returns what it does not
// take at once. The lock is released meanwhile.
func (st *Stream) passLocked(b []byte) []byte {
	k := st.sink
	if k == nil || k.busy {
		return b
	}
	k.busy, st.taken = true, true
	st.mu.Unlock()
	n, err := k.try.write(b)
	st.mu.Lock()
	st.passedLocked(k, n, err)
	return b[n:]
}

// deliverPiped is deliver for what is in a pipe.
func (st *Stream) deliverPiped(pipe *splice.Pipe) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed || st.reset {
		return
	}
	st.heard, st.kept = true, nil
	if k := st.sink; k != nil && !k.busy {
		k.busy, st.taken = true, true
		st.mu.Unlock()
		n, err := k.try.drain(pipe)
		st.mu.Lock()
		st.passedLocked(k, n, err)
	}
	for pipe.Held() > 0 && !st.closed && !st.reset {
		c := getChunk(pipe.Held())
		n, err := pipe.Read(c.buf)
		if err != nil {
			panic("mux: a pipe that holds something: " + err.Error())
		}
		st.unread.Add(int64(n))
		st.s.unread.Add(int64(n))
		st.segs = append(st.segs, segment{c, c.buf[:n]})
		st.copied = true
	}
	st.wakeReadersLocked()
}

// passedLocked takes note of what an idle sink has taken, and reports whether there is
// window to be given back. The session's reader need not see to it: it flushes when it has
// handed out all it has.
func (st *Stream) passedLocked(k *sink, n int, err error) (update bool) {
	k.busy = false
	k.n += int64(n)
	k.err = err
	return n > 0 && st.consumedLocked(n)
}

// runSink writes what waits, until nothing does, or the stream or the sink has ended.
func (st *Stream) runSink(k *sink) {
	var out *segmentWriter
	err := k.err // set before this goroutine began
	for err == nil {
		st.mu.Lock()
		var ready bool
		if ready, err = st.readyLocked(); err != nil {
			st.mu.Unlock()
			break
		}
		if !ready {
			k.busy = false
			st.mu.Unlock()
			return
		}
		if out == nil {
			out = newSegmentWriter(k.w)
		}
		var n int64
		n, err = st.writeOutUnlock(out, k.w)
		k.n += n
	}
	st.mu.Lock()
	st.sink = nil
	st.mu.Unlock()
	if err == io.EOF {
		err = nil
	}
	k.done(k.n, err)
}
