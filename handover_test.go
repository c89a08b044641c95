//go:build unix

package relay_test

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/handover"
)

// doorway returns the two ends of a Unix socket.
func doorway(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "door"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.UnixConn), d.(*net.UnixConn)
}

// replace has a new server take the place of srv, and returns it. Srv is not shut down.
func replace(t testing.TB, srv *relay.Server, opts ...relay.ServerOption) *relay.Server {
	t.Helper()
	next := newServer(t, opts...)
	a, b := doorway(t)
	handed := make(chan error, 1)
	go func() { handed <- srv.HandOver(t.Context(), a) }()
	listeners, hosts, err := next.TakeOver(t.Context(), b)
	if err != nil {
		t.Fatalf("TakeOver: %v", err)
	}
	if err := within(t, "the return of HandOver", handed); err != nil {
		t.Fatalf("HandOver: %v", err)
	}
	if len(listeners) != 1 {
		t.Fatalf("%d listeners", len(listeners))
	}
	for _, ln := range hosts {
		serveHostsOn(t, next, ln)
	}
	serveOn(t, next, listeners[0])
	return next
}

// A server's place is taken by another: names, addresses, identities, their limits and
// leases are the new one's, clients that are connected stay with the old one.
func TestHandOver(t *testing.T) {
	check := nothingLeft(t)
	// Each token is an identity, which may have three services.
	opts := relay.WithAuthorizer(func(_ context.Context, r relay.Registration) (relay.Grant, error) {
		return relay.Grant{Identity: r.Token, Limits: relay.Limits{Services: 3}}, nil
	})
	srv, addr := startRelay(t, opts)
	ours, theirs := relay.WithToken("ours"), relay.WithToken("theirs")
	apps := []*relay.Listener{
		register(t, addr, relay.WithName("two"), relay.WithShared(), ours),
		register(t, addr, relay.WithName("two"), relay.WithShared(), ours),
		register(t, addr, relay.WithName("web"), ours),
		register(t, addr, relay.WithName("anybody's")),
		register(t, addr, ours), // without a name
	}
	web := apps[2]
	var addrs []string
	for _, l := range apps {
		addrs = append(addrs, l.Addr().String())
	}
	client, app := dial(t, web), accept(t, web)
	sendAndExpect(t, client, app)

	next := replace(t, srv, opts)
	type book struct {
		name, addr, identity string
		shared               bool
		sessions             int
	}
	expectBook := func(when string, srv *relay.Server, sessions ...int) {
		t.Helper()
		want := map[string]book{
			addrs[0]: {"two", addrs[0], "ours", true, sessions[0]},
			addrs[2]: {"web", addrs[2], "ours", false, sessions[1]},
			addrs[3]: {"anybody's", addrs[3], "", false, sessions[2]},
			addrs[4]: {addrs[4], addrs[4], "ours", false, sessions[3]},
		}
		got := make(map[string]book)
		for _, s := range srv.Services() {
			got[s.Address] = book{s.Name, s.Address, s.Identity, s.Shared, len(s.Sessions)}
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s: %+v, want %+v", when, got, want)
		}
	}
	expectBook("the old one, before its end", srv, 2, 1, 1, 1)
	expectBook("the new one, before", next, 0, 0, 0, 0)

	// Nobody else gets what the apps that are still away had, not at an address that
	// only the new one has either.
	intrude := func(addr string) {
		t.Helper()
		for _, tt := range []struct {
			what string
			code relay.Code
			opts []relay.RegisterOption
		}{
			{"the name", relay.CodeNameTaken, []relay.RegisterOption{theirs, relay.WithName("web")}},
			{"a share in the name", relay.CodeNameTaken, []relay.RegisterOption{theirs, relay.WithName("two"), relay.WithShared()}},
			{"the port", relay.CodePortUnavailable, []relay.RegisterOption{theirs, relay.WithPort(port(web))}},
			{"the port of one without a name", relay.CodePortUnavailable, []relay.RegisterOption{theirs, relay.WithPort(port(apps[4]))}},
			{"the name of nobody's", relay.CodeNameTaken, []relay.RegisterOption{relay.WithName("anybody's")}},
			{"the port of nobody's", relay.CodePortUnavailable, []relay.RegisterOption{relay.WithPort(port(apps[3]))}},
			{"one service more", relay.CodeServerFull, []relay.RegisterOption{ours, relay.WithName("fourth")}},
		} {
			if _, err := signUp(t.Context(), addr, tt.opts...); code(err) != tt.code {
				t.Errorf("an intruder asks for %s: %v", tt.what, err)
			}
		}
	}
	intrude(serve(t, next, "127.0.0.1:0"))

	// Clients of either go to the app. Who has the new one's waits for it.
	var inBetween []*net.TCPConn
	for range 10 {
		c := dial(t, web)
		c.Write([]byte("between"))
		inBetween = append(inBetween, c)
	}
	eventually(t, "clients of both", func() bool {
		c := dial(t, web)
		c.Write([]byte("between"))
		inBetween = append(inBetween, c)
		return waiting(next, "web") > 0 && len(srv.Services()[3].Clients) > 1
	})
	shut := shutdown(t, srv)
	eventually(t, "the apps at the new relay", func() bool {
		return !slices.ContainsFunc(apps, func(l *relay.Listener) bool { return l.Stats().Reconnects != 1 })
	})
	for i, l := range apps {
		if got := l.Addr().String(); got != addrs[i] {
			t.Errorf("app %d is at %s, and was at %s", i, got, addrs[i])
		}
	}
	expectBook("the new one, after", next, 2, 1, 1, 1)
	intrude(addr)
	for range inBetween {
		a := accept(t, web)
		if _, err := io.ReadFull(a, make([]byte, len("between"))); err != nil {
			t.Errorf("a client that came in between: %v", err)
		}
		a.Write([]byte("served"))
		a.Close()
	}
	for _, c := range inBetween {
		if got, err := io.ReadAll(c); err != nil || string(got) != "served" {
			t.Errorf("a client that came in between reads %q, %v", got, err)
		}
		c.Close()
	}
	for _, l := range apps[1:] {
		c, a := dial(t, l), io.Closer(nil)
		if l == apps[1] { // whichever
			go serveEcho(apps[0])
			go serveEcho(apps[1])
			echoes(t, c)
		} else {
			accepted := accept(t, l)
			sendAndExpect(t, c, accepted)
			a = accepted
		}
		c.Close()
		if a != nil {
			a.Close()
		}
	}

	sendAndExpect(t, client, app) // through the old one
	select {
	case err := <-shut:
		t.Fatalf("Shutdown does not wait for the client: %v", err)
	default:
	}
	fresh, freshApp := dial(t, web), accept(t, web)
	client.Close()
	app.Close()
	if err := within(t, "the end of Shutdown", shut); err != nil {
		t.Error(err)
	}
	sendAndExpect(t, fresh, freshApp)
	fresh.Close()
	freshApp.Close()
	for _, l := range apps {
		l.Close()
		within(t, "Done", l.Done())
	}
	next.Close()
	check()
}

// waiting returns how many clients of a service wait for its app.
func waiting(srv *relay.Server, name string) int {
	for _, s := range srv.Services() {
		if s.Name == name {
			return s.Waiting
		}
	}
	return 0
}

// Relays follow each other under load, and no request fails.
func TestHandOverUnderLoad(t *testing.T) {
	srv, addr := startRelay(t)
	check := nothingLeft(t)
	var served ledger
	app := startWeb(t, addr, &served, relay.WithName("web"))
	load := startWebLoad(t, app.ln.Addr().String())
	var shut []<-chan error
	for i := range 5 {
		load.more(50)
		next := replace(t, srv)
		shut = append(shut, shutdown(t, srv))
		eventually(t, "the app at the new relay", func() bool { return app.ln.Stats().Reconnects == int64(i+1) })
		srv = next
	}
	load.more(50)
	load.end()
	served.expectOnce(t, load.ids.Load())
	app.shutdown(t) // which closes the connections that clients have kept, all over the relays
	for _, done := range shut {
		if err := within(t, "the end of Shutdown", done); err != nil {
			t.Error(err)
		}
	}
	srv.Close()
	check()
}

// And while apps are redeployed at the same time, be it that clients reach them at a port
// or by a host.
func TestHandOverWhileRedeploying(t *testing.T) {
	t.Run("port", func(t *testing.T) { handOverWhileRedeploying(t) })
	t.Run("host", func(t *testing.T) { handOverWhileRedeploying(t, relay.WithHostname("web.example.com")) })
}

func handOverWhileRedeploying(t *testing.T, opts ...relay.RegisterOption) {
	srv, addr := startRelay(t)
	hosts := serveHosts(t, srv)
	check := nothingLeft(t)
	var served ledger
	start := func() *webApp {
		return startWeb(t, addr, &served, append(opts, relay.WithName("web"), relay.WithShared(), relay.WithWait())...)
	}
	app := start()
	public := app.ln.Addr().String()
	at := public
	if opts != nil {
		at = hosts
	}
	load := startWebLoadAt(t, public, at)
	var shut []<-chan error
	for range 5 {
		load.more(50)
		next := replace(t, srv)
		shut = append(shut, shutdown(t, srv))
		srv = next
		newApp := start()
		app.shutdown(t)
		app = newApp
	}
	load.more(50)
	load.end()
	served.expectOnce(t, load.ids.Load())
	app.shutdown(t)
	for _, done := range shut {
		if err := within(t, "the end of Shutdown", done); err != nil {
			t.Error(err)
		}
	}
	srv.Close()
	check()
}

// A successor that fails does no harm.
func TestHandOverFails(t *testing.T) {
	srv, addr := startRelay(t)
	app := register(t, addr, relay.WithName("web"))
	go serveEcho(app)
	check := nothingLeft(t)
	for name, successor := range map[string]func(*net.UnixConn){
		"hangs up": func(c *net.UnixConn) { c.Close() },
		"garbage":  func(c *net.UnixConn) { c.Write([]byte("GET / HTTP/1.1\r\n\r\n")); c.Close() },
		"without leases": func(c *net.UnixConn) {
			next := newServer(t, relay.WithLease(-1))
			if lns, _, err := next.TakeOver(t.Context(), c); err == nil || len(lns) != 0 || !strings.Contains(err.Error(), "lease") {
				t.Errorf("TakeOver: %d listeners, %v", len(lns), err)
			}
			next.Close()
		},
		"takes all and dies": func(c *net.UnixConn) {
			var any map[string]any
			files, err := handover.Receive(c, &any)
			if err != nil || len(files) != 2 {
				t.Errorf("received %d files, %v", len(files), err)
			}
			for _, f := range files {
				f.Close()
			}
			c.Close()
		},
		"has another app of the name": func(c *net.UnixConn) {
			next := newServer(t)
			other := register(t, serve(t, next, "127.0.0.1:0"), relay.WithName("web"))
			if lns, _, err := next.TakeOver(t.Context(), c); err == nil || len(lns) != 0 || !strings.Contains(err.Error(), "taken") {
				t.Errorf("TakeOver: %d listeners, %v", len(lns), err)
			}
			go serveEcho(other)
			client := dial(t, other)
			echoes(t, client)
			client.Close()
			other.Close()
			within(t, "Done", other.Done())
			next.Close()
		},
		"is told nonsense": func(c *net.UnixConn) {
			a, b := doorway(t)
			sent := make(chan error, 1)
			go func() {
				sent <- handover.Send(a, map[string]any{"Registration": -1, "Services": []any{map[string]any{}}}, nil)
				a.Close()
			}()
			next := newServer(t)
			if _, _, err := next.TakeOver(t.Context(), b); err == nil {
				t.Error("TakeOver of nonsense")
			}
			if err := within(t, "the other's answer", sent); err == nil {
				t.Error("nonsense was taken over")
			}
			next.Close()
			c.Close()
		},
		"closed": func(c *net.UnixConn) {
			next := newServer(t)
			next.Close()
			if _, _, err := next.TakeOver(t.Context(), c); !errors.Is(err, relay.ErrServerClosed) {
				t.Errorf("TakeOver: %v", err)
			}
		},
	} {
		a, b := doorway(t)
		handed := make(chan error, 1)
		go func() { handed <- srv.HandOver(t.Context(), a) }()
		successor(b)
		if err := within(t, "the return of HandOver", handed); err == nil {
			t.Errorf("%s: handed over", name)
		}
		c := dial(t, app)
		echoes(t, c)
		c.Close()
		second := register(t, addr)
		second.Close()
		within(t, "Done", second.Done())
		if s := app.Stats(); s.Reconnects != 0 {
			t.Errorf("%s: the app has come back: %+v", name, s)
		}
		check()
	}
	// One that does nothing is given up with the context.
	a, b := doorway(t)
	defer b.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	handed := make(chan error, 1)
	go func() { handed <- srv.HandOver(ctx, a) }()
	cancel(enough)
	if err := within(t, "the return of HandOver", handed); !errors.Is(err, enough) {
		t.Errorf("HandOver: %v", err)
	}
	srv.Close()
	a, b2 := doorway(t)
	defer b2.Close()
	if err := srv.HandOver(t.Context(), a); !errors.Is(err, relay.ErrServerClosed) {
		t.Errorf("of a closed server: %v", err)
	}
}
