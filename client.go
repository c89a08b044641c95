package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/tcprelay/relay/internal/edge"
	"github.com/tcprelay/relay/internal/greeting"
	"github.com/tcprelay/relay/internal/join"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/socket"
	"github.com/tcprelay/relay/internal/throttle"
)

// keepUnanswered is how much of what a client sent is kept until the app sends something: so
// that another app can have the client if this one refuses it, which it does when it closes
// its listener.
const keepUnanswered = 64 << 10

// What clients are refused or cut off for, beside the errors below.
const (
	kindClients           = "clients"
	kindClientsPerIP      = "clients_per_ip"
	kindClientsPerService = "clients_per_service"
	kindWaiting           = "waiting"
	kindWaited            = "waited"
	kindNoApp             = "no_app"
	kindIdle              = "idle"
	kindStalled           = "stalled"
	kindLingered          = "lingered"
	kindUnread            = "unread"
)

var (
	errOverLimit = errors.New("over a limit")

	errClosed  = errors.New("the service takes no more clients")
	errWaiting = errors.New("too many clients wait for the app")
	errWaited  = errors.New("the app did not come back in time")
	errExpired = errors.New("the lease expired")

	errReplaced = errors.New("its owner has registered anew")

	errDisconnected = errors.New("disconnected by the relay")
)

// A client is a connection to a public listener.
type client struct {
	svc    *service
	conn   join.Conn // what is read and written
	raw    net.Conn  // what was accepted
	remote string
	gone   <-chan struct{} // closed when raw was, by conn's Close; nil if that waits for nothing
	ip     netip.Addr
	since  time.Time
	gauge  *edge.Gauge        // of conn; nil if outq and the stream tell all
	said   *greeting.Greeting // nil if the service has a port of its own

	// Guarded by service.mu.
	m      *member // nil while it waits
	st     carrier
	header int64  // bytes of st that are not the client's
	given  int64  // bytes that an app was sent which then refused it
	cut    string // what limit it was cut off for
	met    bool   // an app has had it

	// The carrying goroutine's.
	notAgain []*member // refused it, or could not be given it
	over     []*member // were found dead
	doubted  []*member // did not answer at once, and were left for others
	others   bool      // there is another one beside that which was picked

	// The sweeper's.
	last    mux.Progress
	queued  int       // in the socket
	took    int64     // by the gauge
	movedAt time.Time // a byte, in either direction
	tookAt  time.Time // the client took a byte, or had all
}

// counts returns the client's bytes. What an app that refused it was sent is sent again to
// another one, and counts once.
func (c *client) counts() (in, out int64) {
	if c.st == nil {
		return c.given, 0
	}
	p := c.st.Progress()
	return max(p.Sent-c.header, c.given), p.Received
}

// carry has a client connected to an app, and its bytes carried until both are done, by
// goroutines that begin when it returns.
//
// Of a client that came by a host the greeting was read; the client is told if nobody
// serves it.
func (svc *service) carry(conn net.Conn, said *greeting.Greeting) {
	c := &client{
		svc:    svc,
		raw:    conn,
		remote: conn.RemoteAddr().String(),
		ip:     ipOf(conn.RemoteAddr()),
		since:  time.Now(),
		said:   said,
	}
	var head []byte
	if said != nil {
		head, said.Head = said.Head, nil
	}
	c.conn, c.gone = edge.Whole(conn)
	watched := socket.Watched(conn)
	throttled := svc.limits.ClientBytesPerSecond > 0 || svc.in != nil
	if throttled || !watched {
		c.gauge = edge.NewGauge(c.conn, watched)
		c.conn = c.gauge
	}
	if throttled {
		perClient := svc.limits.ClientBytesPerSecond
		c.conn = throttle.Conn(c.conn,
			[]*throttle.Bucket{throttle.New(perClient), svc.in}, []*throttle.Bucket{throttle.New(perClient), svc.out})
	}
	if kind := svc.admit(c); kind != "" {
		svc.intake.Done()
		c.refuse(kind, errOverLimit)
		c.leave()
		return
	}
	err := svc.connect(c)
	svc.intake.Done()
	c.connected(err, head)
}

// connected goes on with a client for whom there is an app, or none because of err. Head
// is what an app that refused it was sent.
func (c *client) connected(err error, head []byte) {
	if err != nil {
		c.svc.dismiss(c)
		c.refuse(kindOfRefusal(err), err)
		c.end()
		return
	}
	c.join(head)
}

// joined goes on with a client whose app is done with it.
func (c *client) joined(err error) {
	var refused *join.Refused
	if errors.As(err, &refused) {
		c.svc.takeBack(c)
		c.connected(c.svc.connect(c), refused.Head)
		return
	}
	c.left(err)
	c.end()
}

// end counts a client out that was admitted, and is nobody's any more.
func (c *client) end() {
	claims, n := c.svc.claimsOf(c.ip)
	c.svc.srv.giveBack(claims[:n])
	c.leave()
}

// leave ends what carry began.
func (c *client) leave() {
	if c.gone != nil {
		<-c.gone // whoever closes it
	}
	c.svc.srv.wg.Done()
}

func kindOfRefusal(err error) string {
	switch err {
	case errWaiting:
		return kindWaiting
	case errWaited:
		return kindWaited
	}
	return kindNoApp
}

// A holder is who clients are counted for: the server (the zero holder), an IP
// address, an identity, or an IP address at the services of an identity.
type holder struct {
	owned    bool
	identity string
	ip       netip.Addr
}

type claim struct {
	holder holder
	limit  int
	kind   string
}

// claimsOf lists the n that a client from ip is counted for. They are the same when the
// client comes and when it leaves, and not kept meanwhile.
func (svc *service) claimsOf(ip netip.Addr) (claims [4]claim, n int) {
	limits := &svc.srv.cfg.limits
	claims = [...]claim{
		{holder{}, limits.Clients, kindClients},
		{holder{owned: true, identity: svc.identity}, svc.owner.Clients, kindClients},
		{holder{ip: ip}, limits.ClientsPerIP, kindClientsPerIP},
		{holder{owned: true, identity: svc.identity, ip: ip}, svc.owner.ClientsPerIP, kindClientsPerIP},
	}
	if !ip.IsValid() {
		return claims, 2
	}
	return claims, len(claims)
}

// admit counts a client in, or returns the limit that it is over.
func (svc *service) admit(c *client) (kind string) {
	if svc.srv.dedicated.Load() > 0 && svc.srv.outOfFiles() {
		return kindClients
	}
	all, n := svc.claimsOf(c.ip)
	claims := all[:n]
	if kind := svc.srv.clientsOver(claims); kind != "" {
		return kind
	}
	svc.mu.Lock()
	defer svc.mu.Unlock()
	if limit := svc.limits.ClientsPerService; limit > 0 && len(svc.clients) >= limit {
		svc.srv.giveBack(claims)
		return kindClientsPerService
	}
	svc.clients[c] = struct{}{}
	if svc.closed && svc.sweeper != nil {
		svc.sweeper.Reset(svc.limits.sweepEvery()) // it may have found nobody to look after
	}
	return ""
}

// clientsOver counts a client in, or returns the limit that it is over.
func (s *Server) clientsOver(claims []claim) (kind string) {
	for i, cl := range claims {
		if !s.clients.Take(cl.holder, cl.limit) {
			s.giveBack(claims[:i])
			return cl.kind
		}
	}
	return ""
}

// giveBack counts a client out again.
func (s *Server) giveBack(claims []claim) {
	for _, cl := range claims {
		s.clients.Give(cl.holder)
	}
}

// refuse resets a client that was not connected to an app.
func (c *client) refuse(kind string, err error) {
	if c.said == nil {
		hangUp(c.conn)
	} else {
		defer c.turnAway(err)
	}
	svc := c.svc
	svc.mu.Lock()
	svc.refused++
	svc.refusals[kind]++
	svc.mu.Unlock()
	svc.srv.refused.Add(kind, "client refused", svc.attrs("client", c.remote, "err", cleanErr(err))...)
	event := EventClientRefused
	if c.met {
		event = EventClientLeft
	}
	svc.event(Event{Kind: event, Remote: c.remote, Err: err})
}

// turnAway tells a client that came by a host that it is not served.
func (c *client) turnAway(err error) {
	why := greeting.Away
	if err == errOverLimit || err == errWaiting {
		why = greeting.Refused
	}
	if why == greeting.Refused || c.svc.srv.isClosing() { // nobody is to be held up
		sayLast(c.conn, c.said.Answer(why))
		return
	}
	farewell(c.conn, time.Now().Add(refusalTime), c.said.Answer(why))
}

// dismiss takes a client that no app had out of the service's book.
func (svc *service) dismiss(c *client) {
	svc.mu.Lock()
	defer svc.mu.Unlock()
	delete(svc.clients, c)
	svc.bytesIn += c.given
}

// enter books that c is carried by st.
func (svc *service) enter(c *client, m *member, st carrier, header int) {
	svc.mu.Lock()
	first := !c.met
	c.met = true
	c.m, c.st, c.header = m, st, int64(header)
	c.last, c.movedAt, c.tookAt = mux.Progress{}, time.Now(), time.Now()
	if first {
		svc.accepted++
	}
	cut := m.cut != nil
	left := m.sess.OpensLeft()
	last := m.openedLocked()
	svc.mu.Unlock()
	if cut {
		hangUp(c.conn)
	}
	if last {
		m.sayClosed()
	}
	if left <= rotateAt && m.lines != nil {
		m.rotate()
	}
	if first {
		svc.event(Event{Kind: EventClient, Remote: c.remote})
	}
}

// join has bytes carried until both sides are done. Head is what another app was sent
// before.
func (c *client) join(head []byte) {
	if len(head) > 0 {
		if _, err := c.st.Write(head); err != nil { // it fits the window, so it does not wait
			_, again := c.st.Kept()
			c.st.Close()
			if again {
				err = &join.Refused{Head: head}
			} else {
				hangUp(c.conn)
			}
			c.joined(err)
			return
		}
	}
	join.Start(c.conn, c.st, c.joined)
}

// takeBack takes a client from an app that refused it, unseen.
func (svc *service) takeBack(c *client) {
	svc.mu.Lock()
	defer svc.mu.Unlock()
	c.notAgain = append(c.notAgain, c.m)
	c.m.releaseLocked()
	c.given, _ = c.counts()
	c.m, c.st = nil, nil
}

// left books that a client has left.
func (c *client) left(err error) {
	svc := c.svc
	in, out := c.counts()
	svc.mu.Lock()
	delete(svc.clients, c)
	svc.bytesIn += in
	svc.bytesOut += out
	c.m.releaseLocked()
	cut := c.cut
	switch {
	case err == nil:
		cut = "" // it was faster
	case cut == "" && isShed(err):
		cut = kindUnread
	}
	if cut != "" {
		svc.refusals[cut]++
	}
	svc.mu.Unlock()
	if cut != "" {
		err = fmt.Errorf("cut off: %s: %w", cut, err)
		svc.srv.refused.Add(cut, "client cut off", svc.attrs("client", c.remote)...)
	}
	if svc.log.Enabled(context.Background(), slog.LevelDebug) {
		c.logLeft(in, out, err)
	}
	svc.event(Event{Kind: EventClientLeft, Remote: c.remote, BytesIn: in, BytesOut: out, Err: err})
}

// logLeft stands apart because a line of the log takes stack and allocations, whether or not
// anybody wants it.
func (c *client) logLeft(in, out int64, err error) {
	c.svc.log.Debug("client left", "client", c.remote,
		"bytes_in", in, "bytes_out", out, "seconds", time.Since(c.since).Seconds(), "err", cleanErr(err))
}

// isShed reports that a client was reset to keep its session within what it may hold.
func isShed(err error) bool {
	se, ok := errors.AsType[*mux.StreamError](err)
	return ok && se.Code == mux.EnhanceYourCalm && !se.Remote
}
