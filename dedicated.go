package relay

import (
	"crypto/rand"
	"errors"
	"io"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/tcprelay/relay/internal/dedicated"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

const (
	// spareTime is how long a client waits for a dedicated connection when none is
	// ready, which takes the app up to four round trips, before a stream carries it.
	spareTime = 3 * time.Second

	// openTime is how long an app may take to open one.
	openTime = handshakeTimeout + spareTime

	// unopenedTime is for how long an app that could not open one is not asked again.
	unopenedTime = 5 * time.Second
	unfitTime    = 24 * time.Hour // or if what it opened is of no use

	// maxSpares bounds what an app may want to have ready.
	maxSpares = 256

	// secretsPerLine lets a line that asks for connections leave in one frame, however
	// much bulk there is: it must not be cut.
	secretsPerLine = 32

	// spareTries is how many connections that break at once a client is given.
	spareTries = 3

	kindSecret = "secret"
	kindFiles  = "files"
)

var (
	errSpare   = errors.New("the connection is not needed any more")
	errSecret  = errors.New("a dedicated connection that nobody asked for")
	errNoFiles = errors.New("no files for dedicated connections")
)

// A carrier is what carries a client between relay and app: a stream of the session, or
// a connection of its own.
type carrier interface {
	net.Conn
	io.ReaderFrom
	io.WriterTo
	CloseWrite() error
	SetLinger(sec int) error
	Progress() mux.Progress
	Counts() (sent, received int64)
	Kept() ([]byte, bool)
}

var (
	_ carrier = (*mux.Stream)(nil)
	_ carrier = (*dedicated.Conn)(nil)
)

// A spare is a dedicated connection, or none, for a client that waits for it.
type spare chan *dedicated.Conn

// spares are the dedicated connections of an app's session, at the relay, which asks the
// app for each, and makes one a client's when that comes. Nobody reads from one before.
type spares struct {
	m    *member
	want int // how many are to be ready

	mu      sync.Mutex
	ready   []*dedicated.Conn
	asked   map[wire.Secret]time.Time // when the app was asked for those that are not here yet
	waiting []spare                   // clients, first come first
	pause   time.Time                 // the app is not asked until then
	again   *time.Timer               // asks then; nil before the first pause
	added   time.Time                 // when one came last: a sign of life
	unsaid  []wire.Secret             // of asked, those that the app was not told yet
	asking  bool                      // askAll runs
	filling bool                      // so many are missing that all of them are asked for
	closed  bool                      // nobody will need another one
	all     map[*dedicated.Conn]struct{}
}

// newSpares returns nil if the app opens no connections but its session's.
func newSpares(m *member) *spares {
	if !slices.Contains(m.asked.Features, wire.Dedicated) {
		return nil
	}
	return &spares{
		m:     m,
		want:  min(max(m.asked.Spares, 0), maxSpares),
		asked: make(map[wire.Secret]time.Time),
		all:   make(map[*dedicated.Conn]struct{}),
	}
}

// begin gives a client, whose header is given, a connection of its own. It waits for one
// that has to be opened, and returns nil if a stream is as good or better.
func (s *spares) begin(header []byte) *dedicated.Conn {
	for range spareTries {
		d := s.take()
		if d == nil || d.Begin(header, keepUnanswered) == nil {
			return d
		}
		d.Fail(errSpare)
	}
	return nil
}

// take returns a connection that is ready, or will be soon, or nil.
func (s *spares) take() *dedicated.Conn {
	s.mu.Lock()
	for len(s.ready) > 0 {
		d := s.ready[len(s.ready)-1]
		s.ready = s.ready[:len(s.ready)-1]
		if !d.Spent() {
			s.mu.Unlock()
			s.refill()
			return d
		}
		go d.Fail(errSpare) // which needs s.mu
	}
	w := make(spare, 1)
	s.waiting = append(s.waiting, w)
	s.refillLocked()
	if len(s.asked) == 0 || len(s.waiting) > 4*s.m.srv.cfg.limits.asks() { // none will come in time
		s.waiting = s.waiting[:len(s.waiting)-1]
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	s.ask()
	timer := time.NewTimer(spareTime)
	defer timer.Stop()
	select {
	case d := <-w:
		return d
	case <-timer.C:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.waiting, w); i >= 0 {
		s.waiting = slices.Delete(s.waiting, i, i+1)
		return nil
	}
	return <-w
}

// fresh reports whether the app has opened one within d. Its session is quiet while
// clients come and go beside it.
func (s *spares) fresh(d time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.added) < d
}

// refill asks for as many as are wanted.
func (s *spares) refill() {
	s.mu.Lock()
	s.refillLocked()
	s.mu.Unlock()
	s.ask()
}

// refillLocked makes secrets for the connections that the app is to be asked for: when half
// of those that it wants to have ready are missing, or clients wait, so that not each
// client costs a message.
func (s *spares) refillLocked() {
	now := time.Now()
	if s.closed || now.Before(s.pause) {
		return
	}
	for secret, at := range s.asked {
		if now.Sub(at) > openTime { // the app has given up
			s.forgetLocked(secret)
		}
	}
	missing := s.want + len(s.waiting) - len(s.ready) - len(s.asked)
	s.filling = missing > 0 && (s.filling || missing >= (s.want+1)/2)
	if len(s.waiting) == 0 && !s.filling {
		return
	}
	for range min(missing, s.m.srv.cfg.limits.asks()-len(s.asked)) {
		var secret wire.Secret
		rand.Read(secret[:])
		s.asked[secret] = now
		s.m.srv.askers.put(secret, s)
		s.unsaid = append(s.unsaid, secret)
	}
}

// asks is how many connections an app is asked for at once: no more than it may have
// that have not said what they are, with others of its address.
func (l Limits) asks() int {
	if l.PendingPerIP < 0 {
		return wire.MaxSecrets
	}
	return min(max(l.PendingPerIP/2, 1), wire.MaxSecrets)
}

func (s *spares) forgetLocked(secret wire.Secret) {
	delete(s.asked, secret)
	s.m.srv.askers.take(secret)
}

// ask has the app asked for those that it was not asked for yet, without waiting for that:
// it may read nothing for long.
func (s *spares) ask() {
	s.mu.Lock()
	first := !s.asking && len(s.unsaid) > 0
	s.asking = s.asking || first
	s.mu.Unlock()
	if first && !s.m.srv.spawn(s.askAll) {
		s.close()
	}
}

// askAll asks until nothing is left to ask for.
func (s *spares) askAll() {
	for {
		s.mu.Lock()
		some := s.unsaid[:min(len(s.unsaid), secretsPerLine)]
		s.unsaid = s.unsaid[len(some):]
		if len(some) == 0 {
			s.asking, s.unsaid = false, nil
		}
		s.mu.Unlock()
		if len(some) == 0 {
			return
		}
		if s.m.say(wire.Control{Type: wire.Open, Secrets: some}) != nil {
			s.unopened(some)
		}
	}
}

// add takes a connection that the app has opened, and that counts among the server's until
// it has ended. It reports false if it is not needed.
func (s *spares) add(secret wire.Secret, conn net.Conn) bool {
	var d *dedicated.Conn
	d = dedicated.New(conn, func() {
		s.mu.Lock()
		delete(s.all, d)
		s.mu.Unlock()
		s.m.srv.dedicated.Add(-1)
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.asked, secret)
	if d == nil { // the listener's connections are not of a kind for it
		s.pause = time.Now().Add(unfitTime)
		s.sendAwayLocked(0)
	}
	if d == nil || s.closed {
		return false
	}
	s.added = time.Now()
	s.all[d] = struct{}{}
	if len(s.waiting) > 0 {
		s.waiting[0] <- d
		s.waiting = s.waiting[1:]
	} else {
		s.ready = append(s.ready, d)
	}
	return true
}

// unopened takes note that the app could not open some, or nobody took them. Those who
// wait for them are carried in streams, and so are those who come for a while.
func (s *spares) unopened(secrets []wire.Secret) {
	s.mu.Lock()
	defer s.mu.Unlock()
	failed := false
	for _, secret := range secrets {
		if _, ok := s.asked[secret]; ok {
			s.forgetLocked(secret)
			failed = true
		}
	}
	if failed {
		s.pause = time.Now().Add(unopenedTime)
		s.sendAwayLocked(len(s.asked))
		if s.again == nil {
			s.again = time.AfterFunc(unopenedTime, s.refill)
		} else {
			s.again.Reset(unopenedTime)
		}
	}
}

// sendAwayLocked tells all clients that wait, but the first n, that there is none for
// them.
func (s *spares) sendAwayLocked(n int) {
	for len(s.waiting) > n {
		last := len(s.waiting) - 1
		s.waiting[last] <- nil
		s.waiting = s.waiting[:last]
	}
}

// close closes those that are ready. The app gets no more clients but those that are
// being connected now.
func (s *spares) close() {
	s.mu.Lock()
	s.closed = true
	s.unsaid = nil
	if s.again != nil {
		s.again.Stop()
	}
	if len(s.asked) > 0 {
		// Those on their way are not needed, but no strangers.
		late := slices.Collect(maps.Keys(s.asked))
		clear(s.asked)
		time.AfterFunc(openTime, func() {
			for _, secret := range late {
				s.m.srv.askers.take(secret)
			}
		})
	}
	s.sendAwayLocked(0)
	ready := s.ready
	s.ready = nil
	s.mu.Unlock()
	for _, d := range ready {
		d.Fail(errSpare)
	}
}

// fail resets all that there are, because of err.
func (s *spares) fail(err error) {
	s.close()
	s.mu.Lock()
	var all []*dedicated.Conn
	for d := range s.all {
		all = append(all, d)
	}
	s.mu.Unlock()
	for _, d := range all {
		d.Fail(err)
	}
}

// askers are whom the dedicated connections are for that apps were asked for.
type askers struct {
	mu sync.Mutex
	by map[wire.Secret]*spares
}

func (a *askers) put(secret wire.Secret, s *spares) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.by == nil {
		a.by = make(map[wire.Secret]*spares)
	}
	a.by[secret] = s
}

// take returns nil if nobody asked. It does so for everybody but the first.
func (a *askers) take(secret wire.Secret) *spares {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.by[secret]
	delete(a.by, secret)
	return s
}

// enterDedicated gives a connection that has shown a secret to who asked for it.
func (s *Server) enterDedicated(secret wire.Secret, conn net.Conn, pending *net.Conn) (asker *spares, err error) {
	s.mu.Lock()
	closing := s.closing       // and it is about to be closed, whoever has it
	delete(s.pending, pending) // from here on it is a client's, whom Shutdown waits for
	s.mu.Unlock()
	if asker = s.askers.take(secret); asker == nil {
		hangUp(conn)
		return nil, errSecret
	}
	if closing {
		asker.unopened([]wire.Secret{secret})
		hangUp(conn)
		return asker, nil
	}
	// Each of them is for a client, so more than half of the files would be for none. It is
	// counted first, for others come at the same time.
	n := int(s.dedicated.Add(1))
	if files := fileBudget(); files > 0 && (n > files/2 || s.clients.Held(holder{})+n > files) {
		s.dedicated.Add(-1)
		asker.unopened([]wire.Secret{secret})
		hangUp(conn)
		return nil, errNoFiles
	}
	if !asker.add(secret, conn) {
		s.dedicated.Add(-1)
		hangUp(conn)
	}
	return asker, nil
}
