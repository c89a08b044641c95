package relay

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/tcprelay/relay/internal/tally"
	"github.com/tcprelay/relay/internal/throttle"
)

// A service is a public address, and whose it is. It lives as long as there is a lease
// on it, and stays in the server's books until the last session behind it has ended.
//
// One goroutine runs for it, the accept loop, beside those of its sessions and clients.
type service struct {
	srv      *Server
	name     string // as asked for; may be empty
	host     string // that clients reach it by; empty if it has a port of its own
	identity string
	owner    Limits    // of the identity as a whole; the server's book of clients is kept by them
	limits   Limits    // of the service and its clients
	since    time.Time // of the first registration
	in, out  *throttle.Bucket

	// Set when opened is closed.
	opened chan struct{} // and the public listener is there, or the service has ended
	log    *slog.Logger
	ln     net.Listener
	port   int
	addr   string // as apps are told

	// Guarded by Server.mu.
	leases map[*lease]struct{}
	shared bool
	ended  bool

	intake sync.WaitGroup // the accept loop, and clients that it accepted and no app has yet

	mu       sync.Mutex // taken after Server.mu
	members  map[*member]struct{}
	clients  map[*client]struct{} // those that wait too
	changed  chan struct{}        // closed, and replaced, when there is another member or none will come
	closed   bool                 // takes no more clients
	waiting  int
	accepted int64
	refused  int64
	refusals map[string]int64
	bytesIn  int64 // of clients that have left
	bytesOut int64
	sweeper  *time.Timer // nil if no limit needs it
}

// A lease is one app's hold on a service. It lasts while the app has a session, and
// for a time after that one broke; who shows its secret takes it up again. Server.mu
// guards it.
type lease struct {
	svc    *service
	shown  bool // it can be, for its key is in the server's book; or else it ends with the session
	key    leaseKey
	m      *member     // nil while the app is away
	expiry *time.Timer // runs while the app is away, and while an ended one is still in the book
	parks  int         // how often it was away: which expiry it is that fires
	ended  bool        // and if it is in the book, who shows it was disconnected
}

type leaseKey [sha256.Size]byte

// keyOf makes a secret the key of a map, in which looking takes no time that tells
// anything about the secrets in it.
func keyOf(secret string) leaseKey { return sha256.Sum256([]byte(secret)) }

// newService returns a service that is not open yet. Owner are the limits of the
// identity.
func newService(s *Server, name, host, identity string, shared bool, owner Limits) *service {
	limits := owner.or(s.cfg.limits)
	return &service{
		srv:      s,
		name:     name,
		host:     host,
		identity: identity,
		owner:    owner,
		limits:   limits,
		since:    time.Now(),
		in:       throttle.New(limits.BytesPerSecond),
		out:      throttle.New(limits.BytesPerSecond),
		shared:   shared,
		opened:   make(chan struct{}),
		leases:   make(map[*lease]struct{}),
		members:  make(map[*member]struct{}),
		clients:  make(map[*client]struct{}),
		changed:  make(chan struct{}),
		refusals: make(map[string]int64),
	}
}

// openLocked gives a service its public listener, at the address that apps are told.
func (svc *service) openLocked(ln net.Listener, addr string) {
	s := svc.srv
	svc.ln, svc.port, svc.addr = ln, portOf(ln.Addr()), addr
	svc.log = s.cfg.log.With(svc.attrs()...)
	close(svc.opened)
	svc.intake.Add(1)
	s.wg.Go(svc.acceptClients)
	svc.startSweeping()
}

// attrs returns what the log calls the service, and args behind it.
func (svc *service) attrs(args ...any) []any {
	all := []any{"service", tally.Clean(cmp.Or(svc.name, svc.host, svc.addr)), "addr", svc.addr}
	if svc.identity != "" {
		all = append(all, "identity", tally.Clean(svc.identity))
	}
	return append(all, args...)
}

func (svc *service) isOpen() bool {
	select {
	case <-svc.opened:
		return svc.ln != nil
	default:
		return false
	}
}

// title returns what the service is called: by its name, its hostname, or else by its
// address.
func (svc *service) title() string {
	if svc.name == "" && svc.host == "" && svc.isOpen() {
		return svc.addr
	}
	return cmp.Or(svc.name, svc.host)
}

// parked reports that all its apps are away, and may come back.
func (svc *service) parked() bool {
	for l := range svc.leases {
		if l.m != nil {
			return false
		}
	}
	return !svc.ended && svc.isOpen()
}

// apps counts those that have a lease, and those whose sessions are still ending.
// Server.mu is held.
func (svc *service) apps() int {
	svc.mu.Lock()
	defer svc.mu.Unlock()
	n := len(svc.leases)
	for m := range svc.members {
		if m.lease.m != m || m.lease.ended {
			n++
		}
	}
	return n
}

// attachLocked gives m a lease of its own on svc.
func (s *Server) attachLocked(svc *service, m *member) {
	l := &lease{svc: svc}
	if s.cfg.lease > 0 && m.lines != nil {
		m.secret = rand.Text()
		l.shown, l.key = true, keyOf(m.secret)
		s.leases[l.key] = l
	}
	svc.leases[l] = struct{}{}
	s.holdLocked(l, m)
}

// resumeLocked has m take up the lease l. A session that still holds it is no use any
// more: the app would not have come anew.
func (s *Server) resumeLocked(l *lease, m *member) {
	if l.expiry != nil {
		l.expiry.Stop()
		l.expiry = nil
	}
	if old := l.m; old != nil {
		if !old.stepAside() {
			s.wg.Go(old.supersede)
		}
	}
	m.resumed, m.secret = true, m.asked.Lease
	s.holdLocked(l, m)
}

func (s *Server) holdLocked(l *lease, m *member) {
	l.m = m
	m.lease, m.svc, m.log = l, l.svc, l.svc.log
	m.svc.mu.Lock()
	m.svc.members[m] = struct{}{}
	m.svc.mu.Unlock()
	delete(s.pending, m.pending) // from here on it is drained, not dropped
}

// releaseLocked ends m's hold on its lease, because its session has ended. The lease
// goes on for a while if it can be shown again. It returns m's fate.
func (s *Server) releaseLocked(m *member) EventKind {
	fate := m.fateLocked()
	if fate == "" {
		return fate
	}
	m.lease.m = nil
	if fate == EventLost {
		s.parkLocked(m.lease)
	} else {
		s.endLeaseLocked(m.lease)
	}
	return fate
}

// fateLocked tells what the end of m's session is for its app: EventLost, EventEnded, or
// nothing if a newer session has the lease. Server.mu is held.
func (m *member) fateLocked() EventKind {
	l := m.lease
	switch {
	case l.m != m:
		return ""
	case l.shown && !l.ended:
		return EventLost
	}
	return EventEnded
}

// parkLocked keeps a lease whose app is away for as long as it may be.
func (s *Server) parkLocked(l *lease) {
	l.parks++
	this := l.parks
	l.expiry = time.AfterFunc(s.cfg.lease, func() { s.expire(l, this) })
}

// expire ends a lease whose app did not come back in time.
func (s *Server) expire(l *lease, parks int) {
	s.mu.Lock()
	if l.m == nil && l.parks == parks && !l.ended {
		s.endLeaseLocked(l)
	}
	s.unlockAndTell(errExpired)
}

// unlockAndTell unlocks Server.mu, and tells of the leases that were ended under it, whose
// apps were away.
func (s *Server) unlockAndTell(why error) {
	gone := s.gone
	s.gone = nil
	s.mu.Unlock()
	for _, l := range gone {
		l.svc.log.Info("lease ended", "err", cleanErr(why))
		l.svc.event(Event{Kind: EventEnded, Err: why})
	}
}

// endLease ends the lease that a session holds, or that was kept when it broke.
func (s *Server) endLease(m *member) {
	s.mu.Lock()
	if l := m.lease; l.m == m || l.m == nil {
		s.endLeaseLocked(l)
	}
	s.unlockAndTell(nil)
}

// endLeaseLocked ends a lease, and with the last one the service.
func (s *Server) endLeaseLocked(l *lease) {
	if l.ended {
		return
	}
	l.ended = true
	if l.expiry != nil {
		l.expiry.Stop()
		l.expiry = nil
		s.gone = append(s.gone, l)
	}
	delete(l.svc.leases, l)
	if l.shown {
		delete(s.leases, l.key)
	}
	if len(l.svc.leases) == 0 {
		l.svc.endLocked()
	}
}

// dismissLocked is endLocked for a service that its apps are not to come back to. Those
// that are away are told so if they come while a lease would last.
func (svc *service) dismissLocked() []*member {
	s := svc.srv
	shown := make([]*lease, 0, len(svc.leases))
	for l := range svc.leases {
		if l.shown {
			shown = append(shown, l)
		}
	}
	members := svc.endLocked()
	for _, l := range shown {
		s.leases[l.key] = l
		l.expiry = time.AfterFunc(s.cfg.lease, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.leases, l.key)
		})
	}
	return members
}

// endLocked closes the public listener, gives up the name and ends the leases. It
// returns the sessions that there are, which go on. Server.mu is held.
func (svc *service) endLocked() []*member {
	s := svc.srv
	if !svc.ended {
		svc.ended = true
		for l := range svc.leases {
			s.endLeaseLocked(l)
		}
		if s.names[svc.name] == svc {
			delete(s.names, svc.name)
		}
		if s.hosts.services[svc.host] == svc {
			delete(s.hosts.services, svc.host)
		}
		if svc.ln != nil {
			svc.ln.Close()
		}
	}
	svc.mu.Lock()
	svc.closed = true
	svc.wakeLocked()
	members := slices.Collect(maps.Keys(svc.members))
	svc.mu.Unlock()
	s.removeLocked(svc)
	return members
}

// removeLocked takes a service out of the books once it and its sessions have ended.
func (s *Server) removeLocked(svc *service) {
	svc.mu.Lock()
	over := svc.ended && len(svc.members) == 0
	svc.mu.Unlock()
	if over {
		s.dropLocked(svc)
	}
}

// dropLocked takes a service out of the books. Until then it counts for its owner, for its
// last sessions hold something of the relay's.
func (s *Server) dropLocked(svc *service) {
	if _, in := s.services[svc]; in {
		delete(s.services, svc)
		s.owners.Give(svc.identity)
	}
}

// wakeLocked has the clients that wait for a member look again.
func (svc *service) wakeLocked() {
	close(svc.changed)
	svc.changed = make(chan struct{})
}

// acceptClients runs until the public listener is closed.
func (svc *service) acceptClients() {
	err := svc.srv.acceptLoop(svc.ln, func(conn net.Conn) {
		svc.intake.Add(1)
		svc.srv.wg.Add(1) // until client.end
		if g, ok := conn.(*greeted); ok {
			go svc.carry(g.Conn, &g.greeting)
			return
		}
		go svc.carry(conn, nil)
	})
	svc.intake.Done()
	svc.srv.mu.Lock()
	ended := svc.ended
	var members []*member
	if !ended {
		members = svc.endLocked()
	}
	svc.srv.unlockAndTell(err)
	if ended {
		return
	}
	svc.log.Warn("public listener failed", "err", err)
	for _, m := range members {
		m.drain()
	}
}

func (svc *service) event(ev Event) {
	ev.Service, ev.Addr, ev.Identity = svc.title(), svc.addr, svc.identity
	svc.srv.cfg.events.send(ev)
}

func (svc *service) info() ServiceInfo {
	svc.srv.mu.Lock()
	shared := svc.shared
	svc.srv.mu.Unlock()
	svc.mu.Lock()
	defer svc.mu.Unlock()
	info := ServiceInfo{
		Name:     svc.title(),
		Address:  svc.addr,
		Hostname: svc.host,
		Identity: svc.identity,
		Shared:   shared,
		Since:    svc.since,
		Draining: svc.closed,
		Sessions: make([]SessionInfo, 0, len(svc.members)),
		Clients:  make([]ClientInfo, 0, len(svc.clients)),
		Waiting:  svc.waiting,
		Accepted: svc.accepted,
		Refused:  svc.refused,
		Refusals: maps.Clone(svc.refusals),
		BytesIn:  svc.bytesIn,
		BytesOut: svc.bytesOut,
	}
	for m := range svc.members {
		info.Sessions = append(info.Sessions, m.infoLocked())
	}
	for c := range svc.clients {
		in, out := c.counts()
		info.BytesIn += in
		info.BytesOut += out
		if c.st == nil {
			continue
		}
		info.Clients = append(info.Clients, ClientInfo{c.remote, c.since, in, out})
	}
	slices.SortFunc(info.Sessions, func(a, b SessionInfo) int { return a.Since.Compare(b.Since) })
	slices.SortFunc(info.Clients, func(a, b ClientInfo) int { return a.Since.Compare(b.Since) })
	return info
}
