package memnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
)

func listen(t *testing.T, n *Network, address string) net.Listener {
	t.Helper()
	ln, err := n.Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func dial(t *testing.T, n *Network, address string) *Conn {
	t.Helper()
	c, err := n.Dial(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*Conn)
}

func accept(t *testing.T, ln net.Listener) *Conn {
	t.Helper()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*Conn)
}

// TestListenAndDial holds for both networks.
func TestListenAndDial(t *testing.T) {
	type stack struct {
		listen func(ctx context.Context, network, address string) (net.Listener, error)
		dial   func(ctx context.Context, network, address string) (net.Conn, error)
	}
	n := New()
	for name, s := range map[string]stack{
		"tcp":    {new(net.ListenConfig).Listen, new(net.Dialer).DialContext},
		"memnet": {n.Listen, n.Dial},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "tcp" {
				skipUnlessLinux(t)
			}
			ctx := t.Context()
			ln, err := s.listen(ctx, "tcp", "localhost:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			addr, ok := ln.Addr().(*net.TCPAddr)
			if !ok || !addr.IP.IsLoopback() || addr.Port == 0 {
				t.Fatalf("Addr %#v", ln.Addr())
			}

			for _, host := range []string{"", "0.0.0.0", "127.0.0.1"} {
				again, err := s.listen(ctx, "tcp", fmt.Sprintf("%s:%d", host, addr.Port))
				if err == nil {
					again.Close()
				}
				wantErr(t, err, "listen", syscall.EADDRINUSE)
			}

			c, err := s.dial(ctx, "tcp", addr.String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			write(t, c, "before Accept")
			c.(end).CloseWrite()
			peer, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer peer.Close()
			if got, err := io.ReadAll(peer); string(got) != "before Accept" || err != nil {
				t.Errorf("read %q, %v", got, err)
			}

			left, err := s.dial(ctx, "tcp", addr.String())
			if err != nil {
				t.Fatal(err)
			}
			defer left.Close()
			if err := ln.Close(); err != nil {
				t.Error(err)
			}
			_, err = left.Read(make([]byte, 1))
			wantErr(t, err, "read", syscall.ECONNRESET)
			write(t, peer, "lives on")
			expect(t, c, "lives on")

			_, err = ln.Accept()
			wantErr(t, err, "accept", net.ErrClosed)
			wantErr(t, ln.Close(), "close", net.ErrClosed)
			_, err = s.dial(ctx, "tcp", addr.String())
			wantErr(t, err, "dial", syscall.ECONNREFUSED)

			// A listener of every host.
			all, err := s.listen(ctx, "tcp", fmt.Sprintf(":%d", addr.Port))
			if err != nil {
				t.Fatal(err)
			}
			defer all.Close()
			if got := all.Addr().(*net.TCPAddr); !got.IP.IsUnspecified() || got.Port != addr.Port {
				t.Errorf("Addr %v", got)
			}
			_, err = s.listen(ctx, "tcp", addr.String())
			wantErr(t, err, "listen", syscall.EADDRINUSE)
			for _, host := range []string{"", "0.0.0.0", "127.0.0.1", "127.0.0.2"} {
				c, err := s.dial(ctx, "tcp", fmt.Sprintf("%s:%d", host, addr.Port))
				if err != nil {
					t.Fatal(err)
				}
				if to := c.RemoteAddr().(*net.TCPAddr); to.IP.IsUnspecified() {
					t.Errorf("dialed %q, connected to %v", host, to)
				}
				c.Close()
			}

			// What is no address.
			for _, bad := range []string{"127.0.0.1", "127.0.0.1:99999", "127.0.0.1:-1", "256.0.0.1:0", "[::1:0"} {
				if _, err := s.listen(ctx, "tcp", bad); !isOp(err, "listen") {
					t.Errorf("Listen %q: %v", bad, err)
				}
				if _, err := s.dial(ctx, "tcp", bad); !isOp(err, "dial") {
					t.Errorf("Dial %q: %v", bad, err)
				}
			}
			var unknown net.UnknownNetworkError
			if _, err := s.dial(ctx, "tcp5", addr.String()); !isOp(err, "dial") || !errors.As(err, &unknown) {
				t.Errorf("unknown network: %v", err)
			}
			ended, cancel := context.WithCancel(ctx)
			cancel()
			if _, err := s.dial(ended, "tcp", addr.String()); !isOp(err, "dial") || !errors.Is(err, context.Canceled) {
				t.Errorf("ended context: %v", err)
			}
		})
	}
	if len(n.Conns()) != 0 || n.Listeners() != 0 || len(n.listeners) != 0 {
		t.Errorf("left: %v, %v", n.Conns(), n.listeners)
	}
}

func isOp(err error, op string) bool {
	oe, ok := err.(*net.OpError)
	return ok && oe.Op == op
}

func TestHosts(t *testing.T) {
	n := New()
	// One port may be listened on by several hosts.
	lns := map[string]net.Listener{}
	for _, host := range []string{"10.0.0.1", "10.0.0.2", "::1"} {
		lns[host] = listen(t, n, net.JoinHostPort(host, "80"))
	}
	if got := n.Listeners(); got != len(lns) {
		t.Errorf("%d listeners", got)
	}
	from := n.DialFrom("192.0.2.1")
	for host, ln := range lns {
		c, err := from(t.Context(), "tcp", net.JoinHostPort(host, "80"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		peer := accept(t, ln)
		src, dst := peer.RemoteAddr().(*net.TCPAddr), peer.LocalAddr().(*net.TCPAddr)
		if src.IP.String() != "192.0.2.1" || dst.IP.String() != host || dst.Port != 80 {
			t.Errorf("a connection from %v to %v; want from 192.0.2.1 to %s", src, dst, host)
		}
		if c.LocalAddr().String() != src.String() {
			t.Errorf("dialed from %v, accepted from %v", c.LocalAddr(), src)
		}
	}
	if _, err := from(t.Context(), "tcp", "10.0.0.3:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("host without a listener: %v", err)
	}
	if _, err := n.DialFrom("here")(t.Context(), "tcp", "10.0.0.1:80"); !isOp(err, "dial") {
		t.Errorf("source that is no address: %v", err)
	}
}

func TestBacklog(t *testing.T) {
	n := New()
	ln := listen(t, n, "127.0.0.1:0")
	ports := map[string]bool{}
	for i := range backlog {
		if i == backlog-1 {
			n.OnConn(func(_, _ *Conn) { // this one has its place already
				_, err := n.Dial(t.Context(), "tcp", ln.Addr().String())
				wantErr(t, err, "dial", syscall.ECONNREFUSED)
			})
		}
		ports[dial(t, n, ln.Addr().String()).LocalAddr().String()] = true
	}
	if len(ports) != backlog {
		t.Errorf("%d source ports for %d connections", len(ports), backlog)
	}
	if len(n.Conns()) != backlog {
		t.Errorf("%d connections", len(n.Conns()))
	}
	_, err := n.Dial(t.Context(), "tcp", ln.Addr().String())
	wantErr(t, err, "dial", syscall.ECONNREFUSED)
	first := n.Conns()[0]
	if c := accept(t, ln); c != first.Peer() {
		t.Error("Accept did not begin with the first")
	}
	last := dial(t, n, ln.Addr().String())
	ln.Close()
	_, err = last.Read(make([]byte, 1))
	wantErr(t, err, "read", syscall.ECONNRESET)
	first.Peer().Close()
	for _, c := range n.Conns() {
		c.Close()
	}
	if left := len(n.Conns()); left != 0 {
		t.Errorf("%d connections are left", left)
	}
}

func TestPortsRunOut(t *testing.T) {
	n := New()
	addr := listen(t, n, "127.0.0.1:0").Addr().String()
	c := dial(t, n, addr)
	for range 65536 - firstPort - 2 {
		listen(t, n, "127.0.0.1:0")
	}
	_, err := n.Listen(t.Context(), "tcp", "127.0.0.1:0")
	wantErr(t, err, "listen", syscall.EADDRNOTAVAIL)
	_, err = n.Dial(t.Context(), "tcp", addr)
	wantErr(t, err, "dial", syscall.EADDRNOTAVAIL)
	listen(t, n, "127.0.0.1:80")
	c.Peer().Close()
	c.Close()
	listen(t, n, "127.0.0.1:0")
}

func TestConnsUntilBothClosed(t *testing.T) {
	n := New()
	ln := listen(t, n, "127.0.0.1:0")
	a, b := dial(t, n, ln.Addr().String()), dial(t, n, ln.Addr().String())
	pa, pb := accept(t, ln), accept(t, ln)
	for _, step := range []struct {
		close *Conn
		left  []*Conn
	}{{pa, []*Conn{a, b}}, {b, []*Conn{a, b}}, {a, []*Conn{b}}, {pb, nil}} {
		step.close.Close()
		if got := n.Conns(); !slices.Equal(got, step.left) {
			t.Errorf("after a Close the connections are %v; want %v", got, step.left)
		}
	}
}

func TestAcceptWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New()
		ln := listen(t, n, "127.0.0.1:0")
		got := make(chan error, 3)
		for range 3 {
			go func() {
				c, err := ln.Accept()
				if err == nil {
					err = c.Close()
				}
				got <- err
			}()
		}
		synctest.Wait()
		dial(t, n, ln.Addr().String())
		if err := await(t, got, "connection"); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		ln.Close()
		for range 2 {
			wantErr(t, await(t, got, "end of Accept"), "accept", net.ErrClosed)
		}
	})
}

func TestOnConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New()
		ln := listen(t, n, "127.0.0.1:0")
		accepted := make(chan *Conn, 2)
		go func() {
			for range 2 {
				c, err := ln.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				accepted <- c.(*Conn)
			}
		}()
		var hooked []*Conn
		n.OnConn(func(dialed, peer *Conn) {
			synctest.Wait()
			if len(accepted) > 0 {
				t.Error("Accept was ahead of the hook")
			}
			if !slices.Contains(n.Conns(), dialed) {
				t.Error("the network does not know the connection")
			}
			hooked = append(hooked, dialed, peer)
			dialed.CutAfter(3)
		})
		c := dial(t, n, ln.Addr().String())
		peer := await(t, accepted, "connection")
		if !slices.Equal(hooked, []*Conn{c, peer}) {
			t.Errorf("the hook had %v; want %v and %v", hooked, c, peer)
		}
		if n, err := c.Write([]byte("12345")); n != 3 || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Write: %d, %v", n, err)
		}
		n.OnConn(nil)
		dial(t, n, ln.Addr().String())
		await(t, accepted, "connection").Close()
		if len(hooked) != 2 {
			t.Error("the hook was not cleared")
		}
	})
}

// The listener is closed while the hook runs: as if it had been in the backlog.
func TestListenerClosedInHook(t *testing.T) {
	n := New()
	ln := listen(t, n, "127.0.0.1:0")
	n.OnConn(func(_, _ *Conn) { ln.Close() })
	c := dial(t, n, ln.Addr().String())
	_, err := c.Read(make([]byte, 1))
	wantErr(t, err, "read", syscall.ECONNRESET)
	c.Close()
	if len(n.Conns()) != 0 {
		t.Error("the connection is left")
	}
}

// TestHTTP runs package http over a slow network on the fake clock.
func TestHTTP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New()
		n.OnConn(func(c, _ *Conn) {
			c.SetLatency(latency)
			c.SetSlice(100)
		})
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			w.Write(body)
		})}
		served := make(chan error, 1)
		ln := listen(t, n, "127.0.0.1:80")
		go func() { served <- srv.Serve(ln) }()
		client := &http.Client{Transport: &http.Transport{DialContext: n.Dial}}
		for range 3 {
			body := io.LimitReader(zeros{}, 100_000)
			resp, err := client.Post("http://127.0.0.1", "", body)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if got != 100_000 || err != nil {
				t.Errorf("%d bytes, %v", got, err)
			}
		}
		if len(n.Conns()) != 1 {
			t.Errorf("%d connections for keep-alive requests", len(n.Conns()))
		}
		if err := srv.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if err := await(t, served, "end of Serve"); err != http.ErrServerClosed {
			t.Error(err)
		}
		client.CloseIdleConnections()
		synctest.Wait()
		if len(n.Conns()) != 0 || n.Listeners() != 0 {
			t.Errorf("left: %v, %d listeners", n.Conns(), n.Listeners())
		}
	})
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}
