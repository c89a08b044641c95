package relay_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// sessions returns the sessions of the only service, in the order of their arrival.
func sessions(t testing.TB, srv *relay.Server) []relay.SessionInfo {
	t.Helper()
	infos := srv.Services()
	if len(infos) != 1 {
		t.Fatalf("services %+v", infos)
	}
	return infos[0].Sessions
}

// registerShared registers two apps of one name.
func registerShared(t testing.TB, addr string, opts ...relay.RegisterOption) (a, b *relay.Listener) {
	t.Helper()
	opts = append(opts, relay.WithName("two"), relay.WithShared())
	a = register(t, addr, opts...)
	b = register(t, addr, opts...)
	if a.Addr().String() != b.Addr().String() {
		t.Fatalf("one app is at %v and the other at %v", a.Addr(), b.Addr())
	}
	return a, b
}

// Each client goes to the app that has the fewest. The clock is a fake one, for an app that
// said nothing for a second is not the first choice.
func TestSharedSpread(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		a := s.registerEcho("", relay.WithName("two"), relay.WithShared())
		b := s.registerEcho("", relay.WithName("two"), relay.WithShared())
		expectLive := func(want ...int) {
			t.Helper()
			eventually(t, fmt.Sprint("clients of the apps ", want), func() bool {
				of := sessions(t, s.srv)
				return len(of) == 2 && of[0].Clients == want[0] && of[1].Clients == want[1] &&
					a.Stats().Live == want[0] && b.Stats().Live == want[1]
			})
		}
		var clients [2][]net.Conn // of each
		connect := func() {
			t.Helper()
			before := a.Stats().Accepted
			c := s.client(a)
			s.mustServe(c)
			which := 1
			if a.Stats().Accepted > before {
				which = 0
			}
			clients[which] = append(clients[which], c)
		}
		const n = 20
		for range 2 * n {
			connect()
		}
		expectLive(n, n)
		for which, now := range [][]int{{n - 5, n}, {n, n - 5}} {
			for _, c := range clients[which][n-5:] {
				c.Close()
			}
			clients[which] = clients[which][:n-5]
			expectLive(now...)
			for range 5 { // all to the one that has fewer
				connect()
			}
			expectLive(n, n)
		}
	})
}

// What is counted never becomes less, also if an app refuses a client that it was given.
func TestCountsOfRefused(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		share := []relay.RegisterOption{relay.WithName("two"), relay.WithShared()}
		a := s.register("", share...)
		c := s.client(a)
		io.WriteString(c, "hello")
		expect := func(accepted, bytes int64) {
			t.Helper()
			synctest.Wait()
			infos := s.srv.Services()
			if len(infos) != 1 || infos[0].Accepted != accepted || infos[0].BytesIn != bytes {
				t.Errorf("want %d clients and %d bytes: %+v", accepted, bytes, infos)
			}
		}
		expect(1, 5)
		b := s.registerEcho("", share...)
		b.leave() // which has the service stay
		a.Close() // without having accepted it
		expect(1, 5)
		b.comeBack(t)
		s.mustServe(s.client(b))
		expect(2, 6)
	})
}

// An app that takes no more clients gets none, and keeps those it has. The address
// lasts as long as one app does, and the name too.
func TestSharedDrains(t *testing.T) {
	srv, addr := startRelay(t)
	check := nothingLeft(t)
	opts := []relay.RegisterOption{relay.WithName("two"), relay.WithShared()}
	a := register(t, addr, opts...)
	client, app := dial(t, a), accept(t, a)
	sendAndExpect(t, client, app)
	b := register(t, addr, opts...)
	go serveEcho(b)
	a.Close()
	eventually(t, "one session draining", func() bool { return sessions(t, srv)[0].Draining })
	var clients []net.Conn
	for i := range 10 {
		c := dial(t, b)
		echoes(t, c)
		if got, want := b.Stats().Accepted, int64(i+1); got != want {
			t.Fatalf("accepted %d of %d", got, want)
		}
		clients = append(clients, c)
	}
	if s := srv.Services()[0]; s.Draining || len(s.Clients) != 11 || s.Sessions[0].Clients != 1 || s.Sessions[1].Draining {
		t.Errorf("service %+v", s)
	}
	sendAndExpect(t, client, app)
	app.Close()
	client.Close()
	within(t, "Done", a.Done())
	eventually(t, "one session", func() bool { return len(sessions(t, srv)) == 1 })
	c := dial(t, b)
	echoes(t, c)
	if _, err := signUp(t.Context(), addr, relay.WithName("two")); code(err) != relay.CodeNameTaken {
		t.Errorf("the name without a share: %v", err)
	}
	if _, err := signUp(t.Context(), addr, relay.WithPort(port(b))); code(err) != relay.CodePortUnavailable {
		t.Errorf("the port: %v", err)
	}

	b.Close()
	eventually(t, "a service that takes no more clients", func() bool { return srv.Services()[0].Draining })
	if c, err := net.Dial("tcp", b.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
		if err == nil {
			c.Close()
		}
		t.Errorf("a client after the last app's Close: %v", err)
	}
	echoes(t, c)
	next := register(t, addr, relay.WithName("two"), relay.WithPort(port(b)))
	next.Close()
	for _, c := range append(clients, c) {
		c.Close()
	}
	within(t, "Done", b.Done())
	check()
}

// An app that has missed its beat gets no client while another has not.
func TestSharedSilent(t *testing.T) {
	ofSessions(t)
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		startOn(t, n)
		var transport *memnet.Conn // of the app that registered last
		a, b := registerShared(t, relayAddr,
			relay.WithHeartbeat(10*time.Second, time.Hour),
			relay.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
				c, err := n.Dial(ctx, network, address)
				if err == nil {
					transport = c.(*memnet.Conn)
				}
				return c, err
			}))
		transport.Freeze()
		go serveEcho(a)
		go serveEcho(b)
		time.Sleep(15*time.Second + time.Nanosecond) // one beat and a half
		for range 10 {
			c, err := n.Dial(t.Context(), "tcp", b.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			start := time.Now()
			echoes(t, c)
			if waited := time.Since(start); waited > 0 {
				t.Errorf("a client waited %v", waited)
			}
		}
		if got := a.Stats().Accepted; got != 10 {
			t.Errorf("the live app accepted %d", got)
		}
		transport.Thaw()
		time.Sleep(10 * time.Second)
		c, err := n.Dial(t.Context(), "tcp", b.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		echoes(t, c)
		if got := b.Stats().Accepted; got != 1 {
			t.Errorf("the app that was silent accepted %d", got)
		}
	})
}

// A client for whom an app has no room goes to another app.
func TestSharedBacklog(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			srv, addr := startRelay(t)
			var served ledger
			roomy := startRaw(t, addr, p, &served)
			for range 5 { // so that the other one has fewer, whatever comes
				dial(t, roomy.ln)
				accept(t, roomy.ln)
			}
			narrow := startRaw(t, addr, p, &served, relay.WithBacklog(1))
			public := roomy.ln.Addr().String()
			roomy.accept(t)
			stuck := make(chan error, 1)
			id := int64(0)
			for there := false; !there; { // it gets clients soon after Register's return
				id++
				request := func(id int64) { stuck <- p.request(public, id) }
				go request(id)
				eventually(t, "the client served, or in the backlog", func() bool {
					s := srv.Services()[0]
					there = len(s.Clients) == 6 && s.Sessions[0].Clients == 5 && s.Sessions[1].Clients == 1
					return there || len(stuck) > 0
				})
				if !there {
					if err := <-stuck; err != nil {
						t.Fatalf("client %d: %v", id, err)
					}
				}
			}
			const n = 10
			for range n {
				id++
				if err := p.request(public, id); err != nil {
					t.Fatalf("client %d: %v", id, err)
				}
			}
			// A client may be served elsewhere before its refusal is noted down.
			eventually(t, "all refusals counted", func() bool { return narrow.ln.Stats().Refused >= n })
			if r, n_ := roomy.ln.Stats(), narrow.ln.Stats(); r.Accepted != 5+id-1 || n_.Refused != n || n_.Accepted != 0 {
				t.Errorf("with room %+v, without %+v", r, n_)
			}
			narrow.accept(t)
			if err := within(t, "the client in the backlog's answer", stuck); err != nil {
				t.Errorf("the client in the backlog: %v", err)
			}
			served.expectOnce(t, id)
			expectNoneRefused(t, srv)
		})
	}
}

// A client that an app was given, and refused, has left if there is no other app.
func TestRefusedByAll(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		a := s.register("a", relay.WithBacklog(1))
		s.client(a)
		synctest.Wait() // it fills the backlog
		c := s.client(a)
		expectReset(t, c)
		came, left := s.await(relay.EventClient), s.await(relay.EventClientLeft)
		if came = s.await(relay.EventClient); came.Remote != c.LocalAddr().String() || left.Remote != came.Remote || left.Err == nil {
			t.Errorf("came: %+v; left: %+v", came, left)
		}
		s.expectRefusals(map[string]int64{"no_app": 1})
		if n := len(s.events[relay.EventClientRefused]); n != 0 {
			t.Errorf("%d events of clients that no app had", n)
		}
	})
}

// An app whose transport takes nothing, so that no more streams can be opened to it, costs
// no client: those that it was to have go to another one of the name.
func TestSharedCongested(t *testing.T) {
	ofSessions(t)
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		// The longer the addresses, the fewer clients it takes.
		const from, public = "fd00:aaaa:bbbb:cccc:dddd:eeee:ffff:1111", "fd00:aaaa:bbbb:cccc:dddd:eeee:ffff:2222"
		r := startOn(t, n, relay.WithLogger(nil), relay.WithPublicHost(public),
			relay.WithLimits(relay.Limits{Clients: -1, ClientsPerService: -1}))
		start := time.Now()
		a := roam(t, n, relay.WithName("two"), relay.WithShared())
		come := func() *memnet.Conn {
			t.Helper()
			c, err := n.DialFrom(from)(t.Context(), "tcp", a.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			return c.(*memnet.Conn)
		}
		a.transport().Freeze()
		const most = 100_000
		came := 0
		for ; r.service(t).Refused == 0; synctest.Wait() {
			if came > most {
				t.Fatalf("%d clients were not too many", came)
			}
			for range 100 { // each of whom the app is told, and of his end
				c := come()
				c.SetLinger(0)
				c.Close()
				came++
			}
		}

		b := roam(t, n, relay.WithName("two"), relay.WithShared())
		// The first may be b's by chance. Then b has one, and a none.
		for i := range 3 {
			c := come()
			defer c.Close()
			c.SetDeadline(time.Now().Add(time.Hour))
			c.Write([]byte("x"))
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatalf("client %d after %d of the other app's: %v; refusals %v", i, came, err, r.Refusals())
			}
		}
		expectAt(t, "all that", time.Now(), start, 0) // or a would be silent, and asked first
		if s := b.Stats(); s.Accepted != 3 {
			t.Errorf("the figures of the one that had room: %+v", s)
		}
		a.place("")
		a.transport().Cut()
	})
}
