package relay_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"maps"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/wire"
)

// A recorder keeps what passes over a conn, both ways.
type recorder struct {
	net.Conn
	mu      sync.Mutex
	in, out bytes.Buffer
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.in.Write(p[:n])
	return n, err
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	r.out.Write(p)
	r.mu.Unlock()
	return r.Conn.Write(p)
}

func (r *recorder) has(s string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Contains(r.in.Bytes(), []byte(s)) || bytes.Contains(r.out.Bytes(), []byte(s))
}

func (r *recorder) sent() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Clone(r.out.Bytes())
}

// recorded has a Register leave what it sends and gets.
func recorded(rec **recorder) relay.RegisterOption {
	var first sync.Once // which is the session's; there may be dedicated connections
	return relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		r := &recorder{Conn: c}
		first.Do(func() { *rec = r })
		return r, nil
	})
}

// Who sees all that passes between app and relay over TLS sees no secret.
func TestNothingInClear(t *testing.T) {
	ofSessions(t)
	for _, secure := range []bool{true, false} { // the latter to see that it would show
		var opts []relay.ServerOption
		var appOpts []relay.RegisterOption
		if secure {
			opts = append(opts, relay.WithTLSConfig(relayTLS()))
			appOpts = append(appOpts, relay.WithTLSConfig(clientTLS()))
		}
		srv, addr := startRelay(t, append(opts, relay.WithTokens(tokenA))...)

		var rec *recorder
		l := register(t, addr, append(appOpts, relay.WithToken(tokenA), relay.WithName("the-name"), recorded(&rec))...)
		go serveEcho(l)
		echoes(t, dial(t, l))
		for _, s := range []string{tokenA, "the-name", "there and back"} {
			if rec.has(s) == secure {
				t.Errorf("TLS %t: %q in clear: %t", secure, s, !secure)
			}
		}

		// The same for the secret of the lease, when it is told and when it is shown.
		var lease string
		for range 2 {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			rec := &recorder{Conn: c}
			c = rec
			if secure {
				config := clientTLS()
				config.ServerName = "relay.example"
				c = tls.Client(rec, config)
			}
			sess, _, reply := greet(t, c, wire.Hello{Name: "leased", Token: tokenA, Lease: lease})
			if reply.Error != nil || reply.Lease == "" || lease != "" && reply.Lease != lease {
				t.Fatalf("reply %+v", reply)
			}
			lease = reply.Lease
			if rec.has(lease) == secure || rec.has(tokenA) == secure {
				t.Errorf("TLS %t: the lease in clear: %t", secure, !secure)
			}
			sess.Close()
			eventually(t, "the app away", func() bool { return len(sessionsOf(srv, "leased")) == 0 })
		}
	}
}

func sessionsOf(srv *relay.Server, name string) []relay.SessionInfo {
	for _, info := range srv.Services() {
		if info.Name == name {
			return info.Sessions
		}
	}
	return nil
}

// What was recorded of a registration over TLS is worth nothing when it is sent again.
func TestReplay(t *testing.T) {
	ofSessions(t)
	srv, addr, log := startLogged(t, relay.WithTLSConfig(relayTLS()), relay.WithTokens(tokenA))
	var rec *recorder
	l := register(t, addr, relay.WithTLSConfig(clientTLS()), relay.WithToken(tokenA), relay.WithName("web"), recorded(&rec))
	go serveEcho(l)
	client := dial(t, l)
	echoes(t, client)
	client.Close()
	all := rec.sent()
	log.forget()
	for i, ended := range []bool{false, true} { // while it lasts, and afterwards
		if ended {
			l.Close()
			within(t, "the listener's end", l.Done())
			eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
		}
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		c.Write(all) // of which the relay may not take all
		if _, err := io.Copy(io.Discard, c); err != nil && !isReset(err) {
			t.Errorf("the relay does not hang up: %v", err)
		}
		c.Close()
		eventually(t, "it counted", func() bool { return srv.Refusals()["tls"] == int64(i+1) })
		if ended != (len(srv.Services()) == 0) {
			t.Errorf("services %+v", srv.Services())
		}
	}
	if n := srv.Refusals(); !maps.Equal(n, map[string]int64{"tls": 2}) {
		t.Errorf("refused %v", n)
	}
	if n := len(log.with("registered")); n != 0 {
		t.Errorf("registered %d times", n)
	}
}

// outsideAddrs returns addresses of this machine that are not loopback.
func outsideAddrs(t *testing.T) (addrs []string) {
	t.Helper()
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		n, ok := a.(*net.IPNet)
		if !ok || n.IP.IsLoopback() || !n.IP.IsGlobalUnicast() {
			continue
		}
		addr := net.JoinHostPort(n.IP.String(), "0")
		if ln, err := net.Listen("tcp", addr); err == nil {
			ln.Close()
			addrs = append(addrs, addr)
		}
	}
	if len(addrs) == 0 {
		t.Skip("this machine has no address but loopback")
	}
	return addrs
}

// recordingListener records what its connections are sent.
type recordingListener struct {
	net.Listener
	conns chan *recorder
}

func (l *recordingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	r := &recorder{Conn: c}
	l.conns <- r
	return r, nil
}

// A token is not sent over a network in clear, unless the app says so.
func TestTokenInClear(t *testing.T) {
	ofSessions(t)
	for _, outside := range outsideAddrs(t) {
		ln, err := net.Listen("tcp", outside)
		if err != nil {
			t.Fatal(err)
		}
		srv, err := relay.NewServer(relay.WithPublicHost("127.0.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		recording := &recordingListener{ln, make(chan *recorder, 10)}
		serveOn(t, srv, recording)
		addr := ln.Addr().String()

		start := len(srv.Refusals())
		_, err = signUp(t.Context(), addr, relay.WithToken(tokenA), relay.WithName("web"), relay.WithWait())
		expectRegisterError(t, err, addr, relay.CodeInsecure)
		if err == nil || strings.Contains(err.Error(), tokenA) || !strings.Contains(err.Error(), "WithTokenInClear") {
			t.Errorf("the error: %v", err)
		}
		rec := within(t, "a connection", recording.conns)
		eventually(t, "the relay sees its end", func() bool { return len(srv.Refusals()) > start })
		rec.mu.Lock()
		if n := rec.in.Len(); n != 0 {
			t.Errorf("%d bytes were sent, %q", n, rec.in.Bytes())
		}
		rec.mu.Unlock()

		var d net.Dialer
		for what, opts := range map[string][]relay.RegisterOption{
			"said so":      {relay.WithTokenInClear()},
			"another dial": {relay.WithDialer(d.DialContext)},
		} {
			l := register(t, addr, append(opts, relay.WithToken(tokenA))...)
			if rec := within(t, "a connection", recording.conns); !rec.has(tokenA) {
				t.Errorf("%s: the token was not sent", what)
			}
			go serveEcho(l)
			echoes(t, dial(t, l))
		}
		register(t, addr) // without one
		within(t, "a connection", recording.conns)
		if n := len(srv.Services()); n != 3 {
			t.Errorf("%d services", n)
		}
	}
}

// Over loopback, a Unix socket and TLS it is sent.
func TestTokenWithinMachine(t *testing.T) {
	srv, err := relay.NewServer(relay.WithTokens(tokenA))
	if err != nil {
		t.Fatal(err)
	}
	register(t, serve(t, srv, "127.0.0.1:0"), relay.WithToken(tokenA))
	if haveIPv6() {
		register(t, serve(t, srv, "[::1]:0"), relay.WithToken(tokenA))
	}
	path := filepath.Join(t.TempDir(), "relay")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, srv, ln)
	register(t, path, relay.WithToken(tokenA), relay.WithDialer(func(ctx context.Context, _, addr string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", addr)
	}))
	for _, outside := range outsideAddrs(t) {
		srv, err := relay.NewServer(relay.WithTokens(tokenA), relay.WithTLSConfig(relayTLS()))
		if err != nil {
			t.Fatal(err)
		}
		config := clientTLS()
		config.ServerName = "relay.example"
		register(t, serve(t, srv, outside), relay.WithToken(tokenA), relay.WithTLSConfig(config))
	}
}
