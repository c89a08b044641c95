package relay

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/pulse"
	"github.com/tcprelay/relay/internal/tally"
	"github.com/tcprelay/relay/internal/wire"
)

const (
	// sayTime is how long an app that reads nothing of its control stream may delay
	// what it is told there, and noticeTime how long what it is told last.
	sayTime    = 10 * time.Second
	noticeTime = time.Second

	// finishTime is how long a session that is over may take to hand over its last bytes.
	finishTime = 5 * time.Minute

	// rotateAt is how many streams a session can still open when the app is asked for
	// another one: the clients that come meanwhile need some.
	rotateAt = 10_000

	// leastHeartbeat is the shortest interval that an app may have us ping in.
	leastHeartbeat = 100 * time.Millisecond
)

// A member is the relay's side of a session with an app: one of those that a service
// has its clients carried by.
//
// Two kinds of goroutine run for it, beside the session's: run, which ends it, and
// readControl.
type member struct {
	srv     *Server
	asked   wire.Hello
	shown   Registration // what the authorizer is asked about
	rules   int          // Server.rules when it last was
	grant   Grant
	since   time.Time
	remote  string
	sess    *mux.Session
	control *mux.Stream
	lines   *wire.Reader  // of control; nil for a stock muxado client
	pending *net.Conn     // its key in the server's book of those registering
	replied chan struct{} // closed when the app was told its address, or could not be

	// Set when it is placed, before it gets clients.
	svc     *service
	lease   *lease
	log     *slog.Logger
	resumed bool
	secret  string // of the lease; empty if it can't be shown

	spares *spares      // nil if clients are carried by streams
	pulse  *pulse.Pulse // nil for a stock muxado client
	// interval is in which the app sends something, if only a ping; 0 if it need not.
	interval time.Duration

	// Guarded by service.mu.
	taking    bool  // it may be given clients
	leaving   bool  // it gets no more
	rotating  bool  // it was asked for another session; so far it gets clients
	cut       error // why cutOff was called
	closing   bool  // the app is to be told when there come no more
	appClosed bool  // it wants no more
	active    int   // clients, and those for whom a stream is being opened
	opening   int   // those of the latter sort

	idle chan struct{} // closed when it is leaving and the last client has left
}

// run serves the session until it ends, or until it gets no more clients and the last
// one has left.
func (m *member) run() {
	s := m.srv
	m.log.Info("registered", "remote", m.remote, "protocol", m.protocol(), "resumed", m.resumed)
	kind := EventRegistered
	if m.resumed {
		kind = EventResumed
	}
	m.svc.event(Event{Kind: kind, Remote: m.remote})
	if m.lines != nil {
		m.startPulse()
		s.wg.Go(m.readControl) // run itself is counted, so this is in time, also when the server is closing
	}
	m.startTaking()
	if m.spares != nil {
		m.spares.refill()
	}

	var err error
	select {
	case <-m.sess.Done():
		err = m.sess.Err()
	case <-m.idle:
		m.finish() // what clients sent last may still be on its way
	case <-m.sess.Accepting():
		err = errors.New("the app opened a stream")
		m.sess.CloseWithError(mux.ProtocolError, err)
	}
	defer m.sess.Close() // which waits a moment for a peer that takes nothing
	m.stopTaking()
	if why := m.whyCut(); why != nil {
		err = why
	} else if err != nil {
		err = fmt.Errorf("session lost: %w", err)
	}
	if err == nil {
		err = m.whyIdle()
	}
	if m.spares != nil {
		m.spares.fail(cmp.Or(err, errSpare))
	}
	m.letGo(err) // now, for a client who has all but takes its time is not to hold the lease
	m.pulseStop()
	<-m.idle // the others see the session's end
	m.leave()
}

// letGo ends the hold of a session that has ended on its lease, and tells what that is
// for the app, unless a newer session has told that.
func (m *member) letGo(why error) {
	tell := func(kind EventKind) {
		m.log.Info("session ended", "remote", m.remote, "kept", kind == EventLost, "err", cleanErr(why))
		if kind != "" {
			m.svc.event(Event{Kind: kind, Remote: m.remote, Err: why})
		}
	}
	m.srv.mu.Lock()
	lost := m.fateLocked() == EventLost
	m.srv.mu.Unlock()
	if lost {
		tell(EventLost) // first, for a session may resume the lease from then on
	}
	kind := m.release()
	if !lost || kind == EventEnded { // which it was just now
		tell(kind) // when name and port are free
	}
}

// protocol names what the app speaks, for the log.
func (m *member) protocol() string {
	if m.lines == nil {
		return "muxado"
	}
	return "relay"
}

// startPulse watches the session, in the shorter interval of the two sides': each keeps
// to that one.
func (m *member) startPulse() {
	h := m.srv.cfg.heartbeat.with(time.Duration(m.asked.HeartbeatMS) * time.Millisecond)
	m.interval = h.interval
	p := pulse.Start(m.sess, pulse.Config{
		Interval: h.interval,
		Dead:     h.dead,
		Trip:     m.sess.Trip,
		Ping:     func(id int64) { m.say(wire.Control{Type: wire.Ping, ID: id}) },
		Lost:     func(err error) { m.sess.Fail(mux.NoError, err) }, // a client may be waiting
	})
	m.svc.mu.Lock()
	m.pulse = p
	m.svc.mu.Unlock()
	p.Ask() // while nothing else is on its way
}

// release ends the hold of a session that has ended on its lease, and returns what that
// is for the app.
func (m *member) release() EventKind {
	m.srv.mu.Lock()
	defer m.srv.mu.Unlock()
	return m.srv.releaseLocked(m)
}

// leave takes a session without clients out of the books.
func (m *member) leave() {
	s, svc := m.srv, m.svc
	s.mu.Lock()
	defer s.mu.Unlock()
	svc.mu.Lock()
	delete(svc.members, m)
	svc.mu.Unlock()
	s.removeLocked(svc)
}

// cleanErr is for the log: an error may hold what a peer said.
func cleanErr(err error) any {
	if err == nil {
		return nil
	}
	return tally.Clean(err.Error())
}

// finish ends a session without clients when the app has taken all that was sent to
// it. An app that takes nothing for as long as would make it dead is cut off, and in the
// end also one that just does not hang up.
func (m *member) finish() {
	m.pulseStop()
	last := time.AfterFunc(finishTime, func() { m.sess.Close() })
	defer last.Stop()
	if dead := m.srv.cfg.heartbeat.dead; dead > 0 {
		p := pulse.Start(finishing{m.sess}, pulse.Config{Dead: dead, Lost: func(error) { m.sess.Close() }})
		defer p.Stop()
	}
	m.sess.Finish()
}

func (m *member) pulseStop() {
	if m.pulse != nil {
		m.pulse.Stop()
	}
}

// finishing is a session of which only what it still sends is of interest.
type finishing struct{ *mux.Session }

func (f finishing) LastHeard() time.Time {
	heard, sent := f.Session.LastHeard(), f.Session.LastSent()
	if sent.After(heard) {
		return sent
	}
	return heard
}

func (finishing) Done() <-chan struct{} { return nil }

// readControl handles what the app says until it says no more.
func (m *member) readControl() {
	for {
		var c wire.Control
		err := m.lines.Read(&c)
		if err == nil {
			switch c.Type {
			case wire.Ping:
				err = m.say(wire.Control{Type: wire.Pong, ID: c.ID})
			case wire.Pong:
				m.pulse.Pong(c.ID)
			case wire.Close:
				m.appCloses()
			case wire.Unopened:
				if m.spares != nil {
					m.spares.unopened(c.Secrets)
				}
			}
		}
		if err == io.EOF {
			m.pulseStop() // there will be no pong
			m.appCloses()
			return
		}
		if err != nil {
			if m.sess.Err() == nil { // otherwise it has ended, perhaps taking its time
				m.sess.CloseWithError(mux.ProtocolError, fmt.Errorf("control stream: %w", err))
			}
			return
		}
	}
}

// appCloses handles that the app wants no more clients: not in this session, and in no
// other. If it was the last one, those who came before the public listener was closed
// have nobody else, and it is given them.
func (m *member) appCloses() {
	m.svc.mu.Lock()
	m.appClosed = true
	m.svc.mu.Unlock()
	m.srv.endLease(m) // before the session may end for want of clients, which keeps the lease
	m.srv.mu.Lock()
	last := m.svc.ended
	m.srv.mu.Unlock()
	if !last {
		m.closeIntake()
		return
	}
	m.srv.wg.Go(func() { // the caller is counted
		m.svc.intake.Wait()
		m.closeIntake()
	})
}

// closeIntake has an app that closes get no more clients, and tells it when that is so.
func (m *member) closeIntake() {
	m.stopTaking()
	m.svc.mu.Lock()
	first := !m.closing
	m.closing = true
	last := first && m.opening == 0
	m.svc.mu.Unlock()
	if last {
		m.sayClosed()
	}
}

// openedLocked counts a stream that is no longer being opened. It reports whether the
// app is to be told that there come no more.
func (m *member) openedLocked() (last bool) {
	m.opening--
	return m.closing && m.opening == 0
}

// sayClosed tells the app that no stream comes behind this line, however long that takes.
// Who calls it is of a goroutine that the server waits for.
func (m *member) sayClosed() {
	m.srv.wg.Go(func() {
		for errors.Is(m.say(wire.Control{Type: wire.Closed}), os.ErrDeadlineExceeded) {
		}
	})
}

func (m *member) say(v any) error { return m.sayWithin(sayTime, v) }

func (m *member) sayWithin(d time.Duration, v any) error {
	line, err := wire.Line(v)
	if err != nil {
		return err
	}
	m.control.SetWriteDeadline(time.Now().Add(d))
	_, err = m.control.Write(line)
	return err
}

// drain tells the app that the session gets no more clients, and to look for another
// one.
func (m *member) drain() {
	<-m.replied // so that the reply comes first
	if m.lines != nil {
		m.sayWithin(noticeTime, wire.Control{Type: wire.Drain})
	}
	if m.spares != nil {
		m.spares.close() // the app opens no more of them: who waits for one gets a stream
	}
	m.svc.intake.Wait() // for those who came before the public listener was closed
	m.stopTaking()
}

// rotate has the app open another session before this one's stream ids are used up.
func (m *member) rotate() {
	m.svc.mu.Lock()
	first := !m.rotating
	m.rotating = true
	m.svc.mu.Unlock()
	if first {
		m.log.Info("session rotates", "remote", m.remote)
		m.sayWithin(noticeTime, wire.Control{Type: wire.Drain})
	}
}

// supersede ends a session whose lease a newer one has shown.
func (m *member) supersede() {
	m.endWith(wire.Error{Code: wire.CodeSuperseded, Message: "a newer session has taken the lease up"})
}

// disconnect ends a session at the operator's wish.
func (m *member) disconnect() {
	m.endWith(wire.Error{Code: wire.CodeDisconnected, Message: errDisconnected.Error()})
}

// endWith ends a session at once, after telling the app why.
func (m *member) endWith(why wire.Error) {
	<-m.replied
	if m.lines != nil {
		m.sayWithin(noticeTime, wire.Control{Type: wire.End, Error: &why})
	}
	m.cutOff(errors.New(why.Message))
}

// cutOff ends the session and resets all clients, also those who were sent everything
// by an app that then closed, and have not taken it: the session's end leaves these
// alone.
func (m *member) cutOff(why error) {
	m.svc.mu.Lock()
	m.cut = why
	m.svc.mu.Unlock()
	m.stopTaking()
	m.sess.Close()
	var conns []net.Conn // a user's listener made them: closing one may take its time
	m.svc.mu.Lock()
	for c := range m.svc.clients {
		if c.m == m {
			conns = append(conns, c.conn)
		}
	}
	m.svc.mu.Unlock()
	for _, conn := range conns {
		hangUp(conn)
	}
}

// whyIdle returns why a session that was not lost got no more clients: nil if the app
// wanted it so.
func (m *member) whyIdle() error {
	m.svc.mu.Lock()
	wanted := m.appClosed
	m.svc.mu.Unlock()
	switch {
	case wanted:
		return nil
	case m.srv.isClosing():
		return ErrServerClosed
	}
	return errClosed
}

func (m *member) whyCut() error {
	m.svc.mu.Lock()
	defer m.svc.mu.Unlock()
	return m.cut
}

// startTaking lets the session have clients.
func (m *member) startTaking() {
	m.svc.mu.Lock()
	defer m.svc.mu.Unlock()
	m.taking = true
	m.svc.wakeLocked()
}

// stopTaking has the session get no more clients. Those that there are stay; when the
// last one has left it is idle. It reports false if that was so already.
func (m *member) stopTaking() bool {
	m.svc.mu.Lock()
	first := !m.leaving
	m.leaving = true
	if first && m.active == 0 {
		close(m.idle)
	}
	m.svc.mu.Unlock()
	if first && m.spares != nil {
		m.spares.close()
	}
	return first
}

// stepAside has a session whose lease is a newer one's get no more clients, and reports
// whether it was about to leave in any case, with time for its clients to end.
func (m *member) stepAside() bool {
	m.svc.mu.Lock()
	inOrder := m.leaving || m.rotating
	m.svc.mu.Unlock()
	m.stopTaking()
	return inOrder
}

// releaseLocked counts a client less.
func (m *member) releaseLocked() {
	m.active--
	if m.leaving && m.active == 0 {
		close(m.idle)
	}
}

func (m *member) infoLocked() SessionInfo {
	info := SessionInfo{
		Remote:    m.remote,
		Since:     m.since,
		LastHeard: m.sess.LastHeard(),
		Clients:   m.active,
		Draining:  m.leaving,
	}
	if m.pulse != nil {
		info.RoundTrip = m.pulse.RTT()
	}
	return info
}
