package mux

import (
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/inconshreveable/muxado/frame"
)

const (
	maxID    = 1<<31 - 1
	maxOpens = (maxID - 1) / 2 // ids of one parity, less those that muxado leaves out
)

// A Session is one end of a connection that carries streams. Its methods may be
// called from any goroutine.
type Session struct {
	conn net.Conn
	cfg  Config
	out  writer
	in   input
	odd  uint32 // the parity of the ids that we give: 1 for the client

	accept chan *Stream
	done   chan struct{}
	wg     sync.WaitGroup // the reader and the flusher

	stop    atomic.Bool  // the peer knows RST after FIN; see EnableStop
	unread  atomic.Int64 // bytes received and not yet consumed
	reads   atomic.Int64 // counts reads of streams: the clock of Stream.lastRead
	grown   atomic.Int64 // by how much receive windows have grown beyond Window
	trips   trips        // how far away the peer is
	refused atomic.Int64
	offered atomic.Int64

	mu         sync.Mutex
	streams    map[uint32]*Stream
	lastLocal  uint32 // the highest id that we gave
	lastRemote uint32 // the highest id that the peer gave
	goneAway   bool   // the peer takes no more streams
	refusing   bool   // we take no more streams
	forbidden  bool   // and did say so
	err        error  // why the session ended; set before done is closed

	// The reader's.
	calm     calm
	lastDead uint32        // the stream that it reset last, because it was over
	farewell *SessionError // what the session ends with after a GOAWAY
}

// Client makes conn a session. The two ends must be one client and one server,
// which differ only in the ids of the streams that they open. The session owns
// conn from then on.
func Client(conn net.Conn, cfg Config) *Session { return newSession(conn, cfg, 1) }

// Server is Client for the other end.
func Server(conn net.Conn, cfg Config) *Session { return newSession(conn, cfg, 0) }

func newSession(conn net.Conn, cfg Config, odd uint32) *Session {
	cfg.setDefaults()
	s := &Session{
		conn:      conn,
		cfg:       cfg,
		odd:       odd,
		accept:    cfg.Accept,
		done:      make(chan struct{}),
		streams:   make(map[uint32]*Stream),
		lastLocal: odd,
	}
	if s.accept == nil {
		s.accept = make(chan *Stream, cfg.Backlog)
	}
	s.out.init(conn, s.fail)
	s.in.init(conn, cfg.Head, s.out.flush)
	s.calm.start()
	s.wg.Go(s.out.run)
	s.wg.Go(s.readFrames)
	return s
}

// EnableStop tells the session that the peer is this package too: a stream's
// Close then tells it at once that nothing more will be read.
func (s *Session) EnableStop() { s.stop.Store(true) }

// Open opens a stream. Its first frame leaves at once and carries opening, at
// most maxPayload bytes, which count as the stream's first.
func (s *Session) Open(opening []byte) (*Stream, error) {
	st, err := s.open(opening)
	if err == nil {
		s.out.flush()
	}
	return st, err
}

func (s *Session) open(opening []byte) (*Stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.err != nil:
		return nil, s.err
	case s.goneAway:
		return nil, ErrGoneAway
	case len(s.streams) >= s.cfg.MaxStreams:
		return nil, ErrTooManyStreams
	case s.opensLeftLocked() == 0:
		return nil, ErrStreamsExhausted
	}
	st := newStream(s, s.lastLocal+2)
	st.send -= len(opening)
	st.sent = int64(len(opening))
	// Under the lock, so that ids rise on the wire.
	if err := s.out.open(st.id, opening); err != nil {
		return nil, err
	}
	s.lastLocal = st.id
	s.streams[st.id] = st
	return st, nil
}

// OpensLeft returns how many streams this end may still open; see Config.MaxOpens.
func (s *Session) OpensLeft() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opensLeftLocked()
}

func (s *Session) opensLeftLocked() int { return s.cfg.MaxOpens - int(s.lastLocal-s.odd)/2 }

// Accept waits for a stream that the peer opened, or with Config.Accept that of any
// session that shares it. What its first frame carried can be read without waiting.
// Once the session ended it returns why.
func (s *Session) Accept() (*Stream, error) {
	select {
	case <-s.done: // whatever still waits
		return nil, s.Err()
	default:
	}
	select {
	case st := <-s.accept:
		return st, nil
	case <-s.done:
		return nil, s.Err()
	}
}

// Accepting is the channel that Accept receives from, for a select.
func (s *Session) Accepting() <-chan *Stream { return s.accept }

// RefuseStreams has every stream that the peer opens from now on reset with
// StreamRefused. Those that wait for Accept stay.
func (s *Session) RefuseStreams() {
	s.mu.Lock()
	s.refusing = true
	s.mu.Unlock()
}

// ForbidStreams makes every stream that the peer opens from now on a protocol error.
func (s *Session) ForbidStreams() {
	s.mu.Lock()
	s.forbidden = true
	s.mu.Unlock()
}

// Refused counts the streams that were reset because the backlog was full, too
// many were open, or RefuseStreams was called.
func (s *Session) Refused() int64 { return s.refused.Load() }

// Offered counts the streams that the peer opened and that were, or are about to be,
// there for Accept. It counts one before Accept has it.
func (s *Session) Offered() int64 { return s.offered.Load() }

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.done }

// LastHeard returns when bytes of the transport last arrived, and before the first
// when the session began.
func (s *Session) LastHeard() time.Time { return s.in.heard.time() }

// LastSent returns when the transport last took bytes, and before the first when the
// session began. A write that the transport is stuck in does not count; one that takes
// its time, of 384 KiB and some small frames at most, counts when it is done.
func (s *Session) LastSent() time.Time { return s.out.wrote.time() }

// Trip tells the session how long a round trip took that it does not know of, a message's
// and its answer. How large windows become depends on the shortest ones.
func (s *Session) Trip(d time.Duration) { s.trips.add(d, time.Now()) }

// Err returns why the session ended, and nil before.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close ends the session and its streams, and closes the transport, at once but for
// a moment in which what is queued may still leave. It returns when the session's
// goroutines are gone.
func (s *Session) Close() error {
	s.CloseWithError(NoError, net.ErrClosed)
	return nil
}

// CloseWithError is Close for a given reason, which the peer gets the code of.
func (s *Session) CloseWithError(code Code, err error) {
	s.fail(&SessionError{Code: code, Err: err})
	s.out.hurry()
	s.wg.Wait()
}

// Fail is CloseWithError for a caller who does not wait for the goroutines.
func (s *Session) Fail(code Code, err error) { s.fail(&SessionError{Code: code, Err: err}) }

// Finish ends the session when there is nothing left to do but to deliver: it sends
// all that is queued, however long that takes, and waits until the peer has closed
// the transport. Close cuts it short.
func (s *Session) Finish() {
	s.end(&SessionError{Err: net.ErrClosed}, true)
	s.wg.Wait()
}

// LocalAddr returns the transport's local address.
func (s *Session) LocalAddr() net.Addr { return s.conn.LocalAddr() }

// RemoteAddr returns the transport's remote address.
func (s *Session) RemoteAddr() net.Addr { return s.conn.RemoteAddr() }

// fail ends the session. The first error stands. It does not wait for the
// session's goroutines, and they call it too.
func (s *Session) fail(err error) { s.end(err, false) }

func (s *Session) end(err error, patient bool) {
	se, ok := err.(*SessionError)
	if !ok {
		se = &SessionError{Err: err}
	}
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err = se
	streams := s.streams
	s.streams = nil
	last := s.lastRemote
	s.mu.Unlock()
	for _, st := range streams {
		st.sessionEnded(se)
	}
	close(s.done)
	code := se.Code
	if se.Remote {
		code = NoError
	}
	s.out.close(last, code)
	if !patient {
		s.out.hurry()
	}
}

// remove takes a stream that is over on the wire out of the table.
func (s *Session) remove(id uint32) {
	s.mu.Lock()
	delete(s.streams, id)
	s.mu.Unlock()
}

func (s *Session) lookup(id uint32) (st *Stream, opened bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id&1 == s.odd {
		opened = s.odd < id && id <= s.lastLocal // a client's first id is 3
	} else {
		opened = id <= s.lastRemote
	}
	return s.streams[id], opened
}

// readFrames is the reader. It ends at the first error, its own or the
// transport's, and the session with it.
func (s *Session) readFrames() {
	defer close(s.out.read)
	defer s.in.close()
	framer := frame.NewFramer(&s.in, nil)
	known := false // the peer has sent something that makes sense
	for {
		f, err := framer.ReadFrame()
		if err == nil {
			err = s.handleFrame(f)
		}
		if err != nil {
			if isEOF(err) && s.farewell != nil {
				err = s.farewell
			}
			se := frameError(err)
			if !known && s.in.firsts > 0 {
				se = &SessionError{se.Code, se.Remote, s.in.strange(se.Err)}
			}
			s.fail(se)
			return
		}
		if f.Type() <= frame.TypeGoAway {
			known = true
		}
	}
}

// frameError gives an error of the codec or the transport its place.
func frameError(err error) *SessionError {
	switch e := err.(type) {
	case *SessionError:
		return e
	case *frame.Error:
		if e.Type() == frame.ErrorFrameSize {
			return &SessionError{Code: FrameSizeError, Err: err}
		}
		return &SessionError{Code: ProtocolError, Err: err}
	}
	if isEOF(err) {
		return &SessionError{Err: errTransportEOF}
	}
	return &SessionError{Err: fmt.Errorf("transport: %w", err)}
}

func isEOF(err error) bool { return err == io.EOF || err == io.ErrUnexpectedEOF }

// handleFrame consumes the frame whose header, and fixed body, the codec has read.
func (s *Session) handleFrame(f frame.Frame) error {
	id := uint32(f.StreamId())
	if id > maxID {
		return protocolError("stream id %#x has its top bit set", id)
	}
	switch f := f.(type) {
	case *frame.Data:
		return s.handleData(f, id)

	case *frame.WndInc:
		st, opened := s.lookup(id)
		if !opened {
			return protocolError("WNDINC for stream %d, which nobody opened", id)
		}
		if err := s.calm.frame(&s.out); err != nil || st == nil {
			return err
		}
		return st.windowIncreased(int(f.WindowIncrement()))

	case *frame.Rst:
		st, opened := s.lookup(id)
		if !opened {
			return protocolError("RST for stream %d, which nobody opened", id)
		}
		if st != nil && st.resetByPeer(Code(f.ErrorCode())) {
			return nil // there is one for each stream
		}
		return s.calm.frame(&s.out)

	case *frame.GoAway:
		// The codec's reader of the text would read 8 bytes too many.
		if err := s.in.skip(int(f.Length()) - 8); err != nil {
			return err
		}
		s.farewell = &SessionError{Code: Code(f.ErrorCode()), Remote: true, Err: errTransportEOF}
		s.peerGoesAway(uint32(f.LastStreamId()))
		return s.calm.frame(&s.out)

	default: // of a type that this version does not know
		if err := s.in.skip(int(f.Length())); err != nil {
			return err
		}
		return s.calm.frame(&s.out)
	}
}

func (s *Session) handleData(f *frame.Data, id uint32) error {
	n := int(f.Length())
	if f.Syn() {
		return s.handleSyn(id, n, f.Fin())
	}
	st, opened := s.lookup(id)
	if !opened {
		return protocolError("DATA for stream %d, which nobody opened", id)
	}
	if n == 0 && (st == nil || !f.Fin() || st.heardOut()) {
		if err := s.calm.frame(&s.out); err != nil {
			return err
		}
	}
	if st == nil {
		// It is over here, and the peer did not know yet. One of ours was told
		// when it ended; a stock peer has to be told now.
		if n > 0 && !s.stop.Load() && s.lastDead != id {
			s.lastDead = id
			s.out.reset(id, StreamClosed)
		}
		return s.in.skip(n)
	}
	return s.receive(st, n, f.Fin())
}

func (s *Session) handleSyn(id uint32, n int, fin bool) error {
	if id&1 == s.odd {
		return protocolError("SYN for stream %d, whose parity is ours", id)
	}
	s.mu.Lock()
	if id <= s.lastRemote {
		s.mu.Unlock()
		return protocolError("SYN for stream %d after one for stream %d", id, s.lastRemote)
	}
	if s.forbidden {
		s.mu.Unlock()
		return protocolError("SYN for stream %d, where no more streams are taken", id)
	}
	s.lastRemote = id
	if s.refusing || len(s.streams) >= s.cfg.MaxStreams {
		s.mu.Unlock()
		return s.refuse(id, n, StreamRefused)
	}
	if s.err != nil { // reading on only until the peer closes
		s.mu.Unlock()
		return s.in.skip(n)
	}
	if len(s.accept) == cap(s.accept) {
		s.mu.Unlock()
		return s.refuse(id, n, AcceptQueueFull)
	}
	st := newStream(s, id)
	s.streams[id] = st
	s.mu.Unlock()
	// Whole before it is accepted, so that what opens a stream is there to be read.
	if err := s.receive(st, n, fin); err != nil {
		return err
	}
	s.offered.Add(1) // before anybody has it
	select {
	case s.accept <- st:
	default: // another session that shares the queue was faster
		s.offered.Add(-1)
		s.refused.Add(1)
		s.lastDead = id
		st.abort(AcceptQueueFull, net.ErrClosed)
	}
	return nil
}

func (s *Session) refuse(id uint32, n int, code Code) error {
	s.refused.Add(1)
	s.out.reset(id, code)
	s.lastDead = id
	return s.in.skip(n)
}

// receive hands n bytes that follow to st, by reference where that pays.
func (s *Session) receive(st *Stream, n int, fin bool) error {
	if err := st.reserve(n); err != nil {
		return err
	}
	for n > 0 {
		m, err := s.in.pass(st, n)
		if err == nil && m == 0 {
			var b []byte
			if b, err = s.in.next(n); err == nil {
				m = len(b)
				st.deliver(s.in.c, b)
			}
		}
		if err != nil {
			return err
		}
		n -= m
		if s.unread.Load() > int64(s.cfg.MaxUnread) {
			s.shed()
		}
	}
	if fin {
		st.finishedByPeer()
	} else {
		st.windowSpent()
	}
	return nil
}

// shed resets the stream whose reader has stood still for longest, of those that hold
// a good part of what one may on average: a reader that keeps up can hold more for a
// moment than one that has stopped. There is always one, so this is rare.
func (s *Session) shed() {
	s.mu.Lock()
	var victim *Stream
	var since, holds int64
	enough := int64(s.cfg.MaxUnread / (2 * max(1, len(s.streams))))
	for _, st := range s.streams {
		n, t := st.unread.Load(), st.lastRead.Load()
		if st.shed.Load() || n <= enough {
			continue
		}
		if victim == nil || t < since || t == since && n > holds {
			victim, since, holds = st, t, n
		}
	}
	s.mu.Unlock()
	if victim != nil {
		victim.shed.Store(true) // its bytes may stay counted while WriteTo writes them
		victim.abort(EnhanceYourCalm, &StreamError{Code: EnhanceYourCalm})
	}
}

// peerGoesAway ends the streams that the peer says it never saw, and leaves the
// others alone.
func (s *Session) peerGoesAway(last uint32) {
	s.mu.Lock()
	s.goneAway = true
	var unseen []*Stream
	for id, st := range s.streams {
		if id&1 == s.odd && id > last {
			unseen = append(unseen, st)
		}
	}
	s.mu.Unlock()
	for _, st := range unseen {
		st.resetByPeer(StreamRefused)
	}
}

// calm bounds the frames that carry nothing: a peer may send a burst of them, as
// many again each second, and one for each byte that we sent it, however late, which
// covers a stock peer's WNDINC for every read. A FIN or an RST that ends something
// does not count.
type calm struct {
	left  int
	since time.Time
	sent  int64
}

const calmBurst = 20_000

var errFlood = &SessionError{Code: EnhanceYourCalm, Err: fmt.Errorf("more than %d empty frames in a second", calmBurst)}

func (c *calm) start() { c.left, c.since = calmBurst, time.Now() }

func (c *calm) frame(w *writer) error {
	if c.left--; c.left > 0 {
		return nil
	}
	now, sent := time.Now(), w.sentBytes()
	earned := int64(min(now.Sub(c.since).Seconds(), 1)*calmBurst) + sent - c.sent
	if earned < 1 {
		return errFlood
	}
	c.left, c.since, c.sent = int(min(earned, math.MaxInt32)), now, sent
	return nil
}
