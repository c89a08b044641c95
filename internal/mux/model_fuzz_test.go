package mux

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// FuzzModel runs the program that its input is on two sessions that talk to each
// other: streams opened from both sides, written to, half-closed, closed, reset, given
// deadlines, read slowly or not at all. Whatever the program, each stream's bytes are
// a prefix of what was sent to it; behind a clean end they are all of it, and there is
// a clean end if nothing of the program stands against it; of a refused stream nobody
// has read, and what it was to keep is all that was taken for it; nothing is left in
// the end.
//
// The first byte chooses the transport and the limits. Each operation is two bytes:
// what to do, and to which end of a stream or how much.
func FuzzModel(f *testing.F) {
	all := make([]byte, 0, 200)
	for op := range byte(opCount) {
		all = append(all, byte(opOpen), op, op, 3*op)
	}
	for kind := range byte(64) {
		f.Add(append([]byte{kind}, all...))
	}
	const stop, line, narrow, fixed = 1, 2, 16, 32
	for _, kind := range []byte{0, stop, line, stop | line, line | narrow, stop | line | narrow, fixed, stop | line | fixed} {
		// Both directions full; a half-close behind them; the other end closes.
		f.Add([]byte{kind, opOpen, 0, opSettle, 0, opWrite, 0xf0, opWrite, 0xf1, opCloseWrite, 0, opClose, 1})
		// A stopped reader, its stream reset; others go on.
		f.Add([]byte{kind, opOpen, 0, opOpen, 1, opSettle, 0, opPause, 1, opWrite, 0xf0, opReadFrom, 0xf2, opAbort, 0, opSettle, 0, opResume, 1})
		// Deadlines in the midst of a large write.
		f.Add([]byte{kind, opOpen, 0, opSettle, 0, opPause, 1, opWriteDeadline, 0x40, opWrite, 0xf0, opSleep, 200, opWrite, 0x80, opResume, 1, opReadDeadline, 0x41, opSleep, 100})
		// Closed behind data that the transport has not taken.
		f.Add([]byte{kind, opOpen, 0, opSettle, 0, opReadFrom, 0xf0, opClose, 0, opWrite, 0xf1, opOpen, 1, opLose, 0})
		f.Add([]byte{kind, opOpen, 0, opSettle, 0, opWrite, 0xf0, opWrite, 0x10, opSettle, 0, opWrite, 0x10, opCloseWrite, 0})
		// Closed by the reader, with bytes unread, and a whole window of them.
		f.Add([]byte{kind, opOpen, 0, opSettle, 0, opPause, 1, opWrite, 0xf0, opSleep, 200, opClose, 1})
		// Refused before they are used, with little and much that is kept, and too much
		// for that; and refused behind a read.
		f.Add([]byte{kind, opOpen, 40, opWrite, 0x50, opReadFrom, 0xf0, opSettle, 255, opWrite, 0x50})
		f.Add([]byte{kind, opOpen, 41, opOpen, 43, opWrite, 0x51, opReadFrom, 0xf0, opCloseWrite, 1, opSettle, 255})
		f.Add([]byte{kind, opOpen, 0, opWrite, 0x30, opSettle, 0, opWrite, 0x20, opAbort, 0x11})
		// More than a window, several times over.
		f.Add([]byte{kind, opOpen, 1, opSettle, 0, opWrite, 0xf0, opWrite, 0xf0, opReadFrom, 0xf0, opWrite, 0xf0, opWrite, 0xf1, opReadFrom, 0xf1})
	}
	f.Fuzz(func(t *testing.T, program []byte) {
		if len(program) == 0 || len(program) > 400 {
			return
		}
		synctest.Test(t, func(t *testing.T) { runModel(t, program[0], program[1:]) })
	})
}

const (
	opOpen = iota
	opWrite
	opReadFrom
	opCloseWrite
	opClose
	opAbort
	opReadDeadline
	opWriteDeadline
	opPause
	opResume
	opSleep
	opSettle
	opRefuse
	opLose
	opCount
)

// A model is two sessions and what has to be true of their streams.
type model struct {
	t        *testing.T
	sessions [2]*Session
	stop     bool
	lost     bool
	scarce   bool // streams may be refused or shed
	ends     []*modelEnd
	byID     map[uint32]*modelEnd // of the end that opened the stream
	users    sync.WaitGroup

	mu       sync.Mutex
	accepted []*Stream
}

// keeps is how much the streams of a model keep that were opened with a seed.
var keeps = [3]int{0, 60_000, 1 << 30}

// A modelEnd is one end of a stream. A writer and a reader of its own work for it.
type modelEnd struct {
	m     *model
	st    *Stream
	other *modelEnd // nil: not accepted
	seed  int       // of what it sends
	todo  chan modelWrite

	mu       sync.Mutex
	changed  sync.Cond
	paused   bool
	patience int // counts what may let a Read that failed go on

	opening            int   // what it was opened with
	keep               int   // 0: it keeps nothing
	sent               int64 // by calls that returned
	unsent             int64 // read by a ReadFrom that was refused, behind that
	gap                bool  // read by one that failed otherwise
	finished           bool  // a FIN was sent behind that
	closed, aborted    bool
	got                int64
	readErr            error // nil: still reading
	readEnded, stopped bool  // the reader, the writer
}

type modelWrite struct {
	n    int
	from bool // ReadFrom and not Write
}

func runModel(t *testing.T, kind byte, program []byte) {
	m := &model{t: t, stop: kind&1 != 0, byID: make(map[uint32]*modelEnd)}
	c1, c2 := net.Pipe()
	if kind&2 != 0 {
		c1, c2 = newLine(lineConfig{
			delay: 50 * time.Millisecond, rate: 10 << 20, room: []int{1 << 20, 10_000}[kind>>4&1], piece: []int{0, 1000}[kind>>4&1],
		})
	}
	cfg := Config{}
	if kind&4 != 0 {
		m.scarce, cfg.MaxStreams, cfg.Backlog = true, 3, 2
	}
	if kind&8 != 0 {
		m.scarce, cfg.MaxUnread = true, Window
	}
	if kind&32 != 0 {
		cfg.MaxWindow = Window
	}
	taps := [2]*tapConn{{Conn: c1}, {Conn: c2}}
	m.sessions = [2]*Session{Client(taps[0], cfg), Server(taps[1], cfg)}
	for _, s := range m.sessions {
		if m.stop {
			s.EnableStop()
		}
		m.users.Go(func() {
			for st := range acceptedBy(s) {
				m.mu.Lock()
				m.accepted = append(m.accepted, st)
				m.mu.Unlock()
			}
		})
	}
	for len(program) >= 2 && !m.lost {
		m.do(int(program[0])%opCount, program[1])
		program = program[2:]
	}
	m.finish()
	sent := [2]*conduct{conductOf(taps[0].written()), conductOf(taps[1].written())}
	cfg.setDefaults()
	sent[0].check(t, roles[0], sent[1], cfg.MaxWindow)
	sent[1].check(t, roles[1], sent[0], cfg.MaxWindow)
}

// size is from 0 to a good deal more than a window.
func (m *model) size(arg byte) int { return int(arg>>4) * int(arg>>4) * 1500 }

func (m *model) do(op int, arg byte) {
	switch op {
	case opOpen:
		if len(m.ends) < 16 {
			m.open(m.sessions[arg&1], int(arg>>1))
		}
		return
	case opSleep:
		time.Sleep(time.Duration(arg) * 10 * time.Millisecond)
		return
	case opSettle:
		m.settle(arg > 200)
		return
	case opRefuse:
		if arg > 200 {
			m.scarce = true
			m.sessions[arg&1].RefuseStreams()
		}
		return
	case opLose:
		if arg > 200 {
			m.lost = true
			m.sessions[arg&1].CloseWithError(InternalError, io.ErrNoProgress)
		}
		return
	}
	if len(m.ends) == 0 {
		return
	}
	e := m.ends[int(arg&15)%len(m.ends)]
	switch op {
	case opWrite, opReadFrom:
		select {
		case e.todo <- modelWrite{m.size(arg), op == opReadFrom}:
		default: // enough to do
		}
	case opCloseWrite:
		e.closeWrite()
	case opClose:
		e.close(false)
	case opAbort:
		if arg>>4&1 != 0 {
			e.refuse()
		} else {
			e.close(true)
		}
	case opReadDeadline:
		e.st.SetReadDeadline(e.deadline(arg))
		e.retry()
	case opWriteDeadline:
		e.st.SetWriteDeadline(e.deadline(arg))
	case opPause, opResume:
		e.mu.Lock()
		e.paused = op == opPause
		e.mu.Unlock()
		e.retry()
	}
}

// deadline is past, soon, later, or none.
func (e *modelEnd) deadline(arg byte) time.Time {
	switch arg >> 6 {
	case 0:
		return time.Time{}
	case 1:
		return time.Now().Add(time.Duration(arg>>4&3) * 10 * time.Millisecond)
	case 2:
		return time.Now().Add(time.Second)
	}
	return time.Unix(1, 0)
}

func (m *model) open(s *Session, opening int) {
	seed := len(m.ends) + 2*int(s.odd)
	st, err := s.Open(pattern(seed, opening))
	if err != nil {
		if err != ErrTooManyStreams {
			m.t.Errorf("Open: %v", err)
		}
		return
	}
	e := m.newEnd(st, seed)
	e.sent = int64(opening)
	e.opening, e.keep = opening, keeps[seed%len(keeps)]
	if e.keep > 0 {
		st.Keep(e.keep)
	}
	m.byID[st.ID()] = e
	m.start(e)
}

func (m *model) newEnd(st *Stream, seed int) *modelEnd {
	e := &modelEnd{m: m, st: st, seed: seed, todo: make(chan modelWrite, 8)}
	e.changed.L = &e.mu
	m.ends = append(m.ends, e)
	return e
}

func (m *model) start(e *modelEnd) {
	m.users.Go(e.write)
	m.users.Go(e.read)
}

// settle waits until nothing moves any more without time passing, and meets the
// streams that were accepted, or refuses them.
func (m *model) settle(refuse bool) {
	synctest.Wait()
	m.mu.Lock()
	accepted := m.accepted
	m.accepted = nil
	m.mu.Unlock()
	for _, st := range accepted {
		opened := m.byID[st.ID()]
		e := m.newEnd(st, opened.seed+100)
		e.other, opened.other = opened, e
		if refuse {
			e.refuse()
		}
		m.start(e)
	}
}

// write does the end's writes, one after the other.
func (e *modelEnd) write() {
	defer func() {
		e.mu.Lock()
		e.stopped = true
		e.mu.Unlock()
	}()
	for w := range e.todo {
		var n, unsent int64
		var err error
		if w.from {
			src := &patternReader{e.seed, e.sent}
			n, err = e.st.ReadFrom(io.LimitReader(src, int64(w.n)))
			unsent = src.at - e.sent - n
		} else {
			b := make([]byte, w.n)
			(&patternReader{e.seed, e.sent}).Read(b)
			var m int
			m, err = e.st.Write(b)
			n = int64(m)
			clear(b) // it is ours again
		}
		e.mu.Lock()
		e.sent += n
		if isRefusal(err) {
			e.unsent += unsent
		} else if unsent > 0 {
			e.gap = true
		}
		e.mu.Unlock()
		// ReadFrom finds out that there is no more only after it sent all.
		if all := n == int64(w.n); err == nil && !all || err != nil && all && w.n > 0 && !w.from {
			e.m.t.Errorf("stream %d: wrote %d bytes of %d: %v", e.st.ID(), n, w.n, err)
		}
	}
}

// patternReader reads as what pattern makes, from an offset on.
type patternReader struct {
	seed int
	at   int64
}

func (r *patternReader) Read(p []byte) (int, error) {
	for i := range p {
		at := int(r.at) + i
		p[i] = byte(at>>16 ^ at>>8 ^ at ^ r.seed*37)
	}
	r.at += int64(len(p))
	return len(p), nil
}

// retry lets the reader go on after a timeout or a pause.
func (e *modelEnd) retry() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.patience++
	e.changed.Broadcast()
}

// read reads to the stream's end, in a way that depends on its seed.
func (e *modelEnd) read() {
	buf := make([]byte, []int{10_000, 100_000, 333, 0}[e.seed%4])
	for {
		e.mu.Lock()
		for e.paused {
			e.changed.Wait()
		}
		patience := e.patience
		e.mu.Unlock()
		var err error
		if len(buf) > 0 {
			var n int
			n, err = e.st.Read(buf)
			e.take(buf[:n])
		} else if _, err = e.st.WriteTo(modelSink{e}); err == nil {
			err = io.EOF
		}
		e.mu.Lock()
		switch err {
		case nil, errPaused:
		case os.ErrDeadlineExceeded:
			for e.patience == patience {
				e.changed.Wait()
			}
		default:
			e.readErr, e.readEnded = err, true
			e.mu.Unlock()
			return
		}
		e.mu.Unlock()
	}
}

// modelSink is what WriteTo writes to.
type modelSink struct{ e *modelEnd }

var errPaused = fmt.Errorf("paused")

func (s modelSink) Write(p []byte) (int, error) {
	s.e.take(p)
	s.e.mu.Lock()
	defer s.e.mu.Unlock()
	if s.e.paused {
		return len(p), errPaused
	}
	return len(p), nil
}

// take checks received bytes against what the other end sends.
func (e *modelEnd) take(p []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	seed := e.seed + 100 // the acceptor's
	if e.seed >= 100 {
		seed = e.seed - 100
	}
	for i, b := range p {
		at := int(e.got) + i
		if want := byte(at>>16 ^ at>>8 ^ at ^ seed*37); b != want {
			e.m.t.Errorf("stream %d: byte %d is %d, was sent as %d", e.st.ID(), at, b, want)
			break
		}
	}
	e.got += int64(len(p))
}

func (e *modelEnd) closeWrite() {
	err := e.st.CloseWrite()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		e.finished = true
	}
}

func (e *modelEnd) close(abort bool) {
	if abort {
		e.st.SetLinger(0)
	}
	err := e.st.Close()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		e.closed, e.aborted = true, abort
		e.finished = e.finished || !abort
	}
	e.paused = false
	e.patience++
	e.changed.Broadcast()
}

func (e *modelEnd) refuse() {
	err := e.st.Refuse()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		e.closed, e.aborted = true, true
	}
	e.paused = false
	e.patience++
	e.changed.Broadcast()
}

// isRefusal reports whether err says that the peer refused a stream.
func isRefusal(err error) bool {
	se, ok := errors.AsType[*StreamError](err)
	return ok && se.Remote && (se.Code == StreamRefused || se.Code == AcceptQueueFull)
}

// finish lets everything go on, ends all streams cleanly and looks at them.
func (m *model) finish() {
	m.settle(false)
	for _, e := range m.ends {
		e.st.SetDeadline(time.Time{})
		e.mu.Lock()
		e.paused = false
		e.mu.Unlock()
		e.retry()
	}
	// On a line, what is under way takes time. All readers read, so it ends.
	time.Sleep(time.Minute)
	m.settle(false)
	for _, e := range m.ends {
		close(e.todo)
	}
	time.Sleep(time.Minute)
	synctest.Wait()
	for _, e := range m.ends {
		e.mu.Lock()
		if !e.stopped {
			m.t.Errorf("stream %d: a Write waits although all is read", e.st.ID())
		}
		e.mu.Unlock()
		e.closeWrite()
	}
	time.Sleep(time.Minute)
	synctest.Wait()
	for _, e := range m.ends {
		m.check(e)
	}
	for _, e := range m.ends {
		e.st.Close()
	}
	time.Sleep(time.Minute)
	for _, s := range m.sessions {
		if err := s.Err(); (err != nil) != m.lost {
			m.t.Errorf("the session ended: %v", err)
		}
		if n := openStreams(s); n != 0 {
			m.t.Errorf("%d streams are left", n)
		}
		if m.lost {
			continue
		}
		if n := s.unread.Load(); n != 0 {
			m.t.Errorf("%d bytes are left unread", n)
		}
		if n := s.grown.Load(); n != 0 {
			m.t.Errorf("%d bytes of window are left", n)
		}
		s.out.mu.Lock()
		if s.out.bulk != 0 || len(s.out.small) != 0 {
			m.t.Errorf("%d and %d bytes are left to be sent", s.out.bulk, len(s.out.small))
		}
		s.out.mu.Unlock()
	}
	for _, s := range m.sessions {
		s.Close()
	}
	m.users.Wait()
}

// check holds what an end has read against what the other end did.
func (m *model) check(e *modelEnd) {
	e.mu.Lock()
	defer e.mu.Unlock()
	id := e.st.ID()
	if !e.readEnded {
		m.t.Errorf("stream %d: a Read waits although all has ended", id)
		return
	}
	m.checkKept(e)
	o := e.other
	if o == nil { // nobody ever sent anything
		if e.got != 0 || e.readErr == io.EOF {
			m.t.Errorf("stream %d, which nobody accepted: read %d bytes, %v", id, e.got, e.readErr)
		}
		if !m.scarce && !m.lost && !e.closed {
			m.t.Errorf("stream %d was not accepted", id)
		}
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if isRefusal(e.readErr) && (o.got > 0 || o.sent > 0 || o.finished) {
		m.t.Errorf("stream %d was refused by an end that has used it", id)
	}
	if e.got > o.sent {
		m.t.Errorf("stream %d: read %d bytes, %d were sent", id, e.got, o.sent)
	}
	if e.readErr == io.EOF && (!o.finished || e.got != o.sent) {
		m.t.Errorf("stream %d: a clean end behind %d bytes; %d were sent, finished is %v", id, e.got, o.sent, o.finished)
	}
	// Without knowing that its peer is of this package, an end that closed resets the
	// stream for what still comes, and may do so before its own last bytes are gone.
	rude := o.closed && !m.stop
	if !m.lost && !m.scarce && !e.closed && !o.aborted && !rude && e.readErr != io.EOF {
		m.t.Errorf("stream %d: %v behind %d bytes of %d, want a clean end", id, e.readErr, e.got, o.sent)
	}
}

// checkKept holds what an end has kept against what it took.
func (m *model) checkKept(e *modelEnd) {
	id := e.st.ID()
	b, ok := e.st.Kept()
	taken := e.sent + e.unsent
	switch {
	case ok && (e.keep == 0 || e.closed || e.gap || !isRefusal(e.readErr)):
		m.t.Errorf("stream %d kept %d bytes, with no reason: %v", id, len(b), e.readErr)
	case ok && !bytes.Equal(b, pattern(e.seed, int(taken))[e.opening:]):
		m.t.Errorf("stream %d kept %d bytes, or other ones, of %d behind %d", id, len(b), taken, e.opening)
	case ok && len(b) > e.keep:
		m.t.Errorf("stream %d kept %d bytes, more than %d", id, len(b), e.keep)
	case !ok && isRefusal(e.readErr) && !e.closed && !e.gap && e.keep > 0 && taken-int64(e.opening) <= int64(e.keep):
		m.t.Errorf("stream %d kept nothing of %d bytes: %v", id, taken, e.readErr)
	}
}
