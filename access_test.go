package relay_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

const (
	tokenA, tokenB = "alpha-Zk3vJ8qLw2xN5rT7", "beta-p9Yh4Gd6Fs1Kc0Vm"
	tokenC         = "gamma-u3Bn8Xe2Wq7Rj5To"
)

// The tokens of one call are one identity, and those of another call another one.
func TestTokens(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		for token, identity := range map[string]string{tokenA: "tokens 1", tokenB: "tokens 1", tokenC: "tokens 2"} {
			a := s.registerEcho(token)
			s.visit(a)
			if info := s.srv.Services()[0]; info.Identity != identity {
				t.Errorf("%s is of %q, want %q", token, info.Identity, identity)
			}
			for range len(s.events[relay.EventRegistered]) {
				if ev := s.await(relay.EventRegistered); ev.Identity != identity {
					t.Errorf("%s: event %+v", token, ev)
				}
			}
			s.end(a.Listener)
			if e := s.log.with("session ended"); e[len(e)-1].attrs["identity"] != identity {
				t.Errorf("%s: logged %+v", token, e[len(e)-1])
			}
		}

		// They share names as they share the identity.
		s.register(tokenA, relay.WithName("web"), relay.WithShared())
		s.register(tokenB, relay.WithName("web"), relay.WithShared())
		if n := len(s.srv.Services()); n != 1 {
			t.Errorf("%d services", n)
		}
		if code := s.registers("10.0.0.5", tokenC, relay.WithName("web"), relay.WithShared()); code != relay.CodeNameTaken {
			t.Errorf("another identity shares the name: %q", code)
		}
		s.expectRefusals(map[string]int64{"name_taken": 1})
	}, relay.WithTokens(tokenA, tokenB), relay.WithTokens(tokenC))
}

// What is not one of the tokens, however like one, is refused, and nobody learns what
// they are.
func TestTokensRefused(t *testing.T) {
	wrong := map[string]string{
		"none":         "",
		"another":      "delta-u3Bn8Xe2Wq7Rj5To",
		"truncated":    tokenA[:len(tokenA)-1],
		"a suffix":     tokenA[1:],
		"one byte":     tokenA[:1],
		"extended":     tokenA + "7",
		"a NUL":        tokenA + "\x00",
		"a newline":    tokenA + "\n",
		"a space":      " " + tokenA,
		"another case": strings.ToUpper(tokenA),
		"last byte":    tokenA[:len(tokenA)-1] + "8",
		"both":         tokenA + tokenB,
		"a list":       tokenA + "," + tokenB,
		"twice":        tokenA + tokenA,
		"long":         strings.Repeat(tokenA, 8<<10/len(tokenA)),
		"an identity":  "tokens 1",
	}
	onStage(t, func(t *testing.T, s *stage) {
		start := time.Now()
		n := int64(0)
		for name, token := range wrong {
			n++
			_, err := relay.Register(t.Context(), s.addr, relay.WithToken(token), relay.WithDialer(s.net.Dial),
				relay.WithWait()) // there is nothing to wait for
			expectRegisterError(t, err, s.addr, relay.CodeUnauthorized)
			if re, ok := errors.AsType[*relay.RegisterError](err); !ok || re.Err != nil || re.Message == "" {
				t.Errorf("%s: %+v", name, re)
			}
			s.expectRefusals(map[string]int64{"unauthorized": n})
			if ev := s.await(relay.EventRefused); ev.Err == nil || ev.Identity != "" || ev.Remote == "" {
				t.Errorf("%s: event %+v", name, ev)
			}
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("it took %v", took)
		}
		if lines := s.log.with("registration failed"); len(lines) != 1 || lines[0].attrs["kind"] != "unauthorized" {
			t.Errorf("logged %+v", lines)
		}
		for _, e := range s.log.with("") {
			for _, secret := range []string{tokenA, tokenB, "Zk3v"} {
				if strings.Contains(fmt.Sprint(e.msg, e.attrs), secret) {
					t.Errorf("the log tells a token: %+v", e)
				}
			}
		}
		if code := s.registers("10.0.0.5", tokenB); code != "" {
			t.Errorf("the right one: %s", code)
		}
	}, relay.WithTokens(tokenA, tokenB))
}

func TestTokensOptions(t *testing.T) {
	authorizer := relay.WithAuthorizer(func(context.Context, relay.Registration) (relay.Grant, error) {
		return relay.Grant{}, nil
	})
	for name, opts := range map[string][]relay.ServerOption{
		"none":                    {relay.WithTokens()},
		"empty":                   {relay.WithTokens("")},
		"empty among others":      {relay.WithTokens(tokenA, "", tokenB)},
		"empty in another call":   {relay.WithTokens(tokenA), relay.WithTokens("")},
		"and an authorizer":       {relay.WithTokens(tokenA), authorizer},
		"and an authorizer first": {authorizer, relay.WithTokens(tokenA)},
	} {
		if _, err := relay.NewServer(opts...); err == nil {
			t.Errorf("%s: no error", name)
		} else if strings.Contains(err.Error(), tokenA) {
			t.Errorf("%s: the error tells a token: %v", name, err)
		}
	}
	if _, err := relay.NewServer(relay.WithTokens(tokenA), relay.WithAuthorizer(nil)); err != nil {
		t.Errorf("tokens and no authorizer: %v", err)
	}
}

// A token longer than the hello has room for fails at once, whatever it consists of.
func TestTokenTooLong(t *testing.T) {
	_, addr := startRelay(t, relay.WithTokens(tokenA))
	for _, token := range []string{strings.Repeat("t", 8<<10+1), strings.Repeat("t", 1<<20), strings.Repeat("\x01", 8<<10)} {
		_, err := relay.Register(t.Context(), addr, relay.WithToken(token), relay.WithWait())
		if err == nil || code(err) != "" && code(err) != relay.CodeMalformed || len(err.Error()) > 500 {
			t.Errorf("a token of %d bytes: %v", len(token), err)
		}
	}
}

// A token that holds no longer ends the listener when it comes back.
func TestTokenRevoked(t *testing.T) {
	var revoked atomic.Bool
	onStage(t, func(t *testing.T, s *stage) {
		a := s.register("limited")
		revoked.Store(true)
		a.transport.Cut()
		_, err := a.Accept()
		op, ok := err.(*net.OpError)
		if !ok || op.Op != "accept" || code(err) != relay.CodeUnauthorized || errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept: %v", err)
		}
		within(t, "the listener's end", a.Done())
		// Its address is kept no longer than the lease.
		if code := s.registers("10.0.0.5", "other", relay.WithPort(port(a))); code != relay.CodePortUnavailable {
			t.Errorf("the port of a lease: %q", code)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if code := s.registers("10.0.0.5", "other", relay.WithPort(port(a))); code != "" {
			t.Errorf("the port behind the lease: %s", code)
		}
		s.expectRefusals(map[string]int64{"unauthorized": 1, "port_unavailable": 1})
	}, relay.WithAuthorizer(func(_ context.Context, r relay.Registration) (relay.Grant, error) {
		if revoked.Load() && r.Token == "limited" {
			return relay.Grant{}, errors.New("revoked")
		}
		return relay.Grant{Identity: r.Token}, nil
	}))
}

// greet registers by the protocol's own words, and returns what the relay replies. The
// session is closed when the test ends.
func greet(t testing.TB, c net.Conn, hello wire.Hello) (*mux.Session, *mux.Stream, wire.Reply) {
	t.Helper()
	sess := mux.Client(c, mux.Config{})
	t.Cleanup(func() { sess.Close() })
	hello.Version = wire.Version
	line, err := wire.Line(hello)
	if err != nil {
		t.Fatal(err)
	}
	control, err := sess.Open(line)
	if err != nil {
		t.Fatal(err)
	}
	control.SetReadDeadline(time.Now().Add(patience))
	var reply wire.Reply
	if err := wire.NewReader(control).Read(&reply); err != nil {
		t.Fatalf("no reply: %v", err)
	}
	control.SetReadDeadline(time.Time{})
	return sess, control, reply
}

// A lease brings its address to who shows it, if he has the identity that took it, and
// as long as it lasts. Otherwise it is worth nothing.
func TestLeaseShown(t *testing.T) {
	greetStage := func(s *stage, hello wire.Hello) (*mux.Session, *mux.Stream, wire.Reply) {
		s.Helper()
		return greet(s, s.dialFrom("10.0.0.5", s.addr), hello)
	}
	taken := func(s *stage, what string, r wire.Reply) {
		s.Helper()
		if r.Error == nil || r.Error.Code != wire.CodeNameTaken || r.Lease != "" || r.Address != "" {
			s.Errorf("%s: %+v", what, r)
		}
	}
	onStage(t, func(t *testing.T, s *stage) {
		first, _, web := greetStage(s, wire.Hello{Name: "web", Token: tokenA})
		if web.Error != nil || len(web.Lease) < 20 {
			t.Fatalf("registered as %+v", web)
		}
		// Not his.
		for what, hello := range map[string]wire.Hello{
			"another identity": {Name: "web", Token: tokenC, Lease: web.Lease},
			"a part":           {Name: "web", Token: tokenA, Lease: web.Lease[1:]},
			"another case":     {Name: "web", Token: tokenA, Lease: strings.ToLower(web.Lease)},
			"none":             {Name: "web", Token: tokenA},
		} {
			_, _, r := greetStage(s, hello)
			taken(s, what, r)
		}
		_, _, r := greetStage(s, wire.Hello{Token: "wrong", Lease: web.Lease})
		if r.Error == nil || r.Error.Code != wire.CodeUnauthorized {
			t.Errorf("no token: %+v", r)
		}
		_, _, r = greetStage(s, wire.Hello{Token: tokenC, Lease: web.Lease})
		if r.Error != nil || r.Address == web.Address || r.Lease == web.Lease {
			t.Errorf("a lease of another identity brings %+v", r)
		}
		if first.Err() != nil {
			t.Errorf("the session has ended: %v", first.Err())
		}
		// His.
		second, control, r := greetStage(s, wire.Hello{Name: "web", Token: tokenB, Lease: web.Lease})
		if r.Error != nil || r.Address != web.Address || r.Lease != web.Lease {
			t.Errorf("the lease brings %+v, not %+v", r, web)
		}
		within(t, "the end of the older session", first.Done())

		// Over, because its app wanted it, and nobody else has the name.
		line, _ := wire.Line(wire.Control{Type: wire.Close})
		control.Write(line)
		within(t, "the end of a session that closes", second.Done())
		synctest.Wait()
		_, _, r = greetStage(s, wire.Hello{Name: "web", Token: tokenC})
		if r.Error != nil {
			t.Fatalf("the name is free: %+v", r)
		}
		_, _, r = greetStage(s, wire.Hello{Name: "web", Token: tokenA, Lease: web.Lease})
		taken(s, "an ended lease", r)
		_, _, r = greetStage(s, wire.Hello{Token: tokenA, Lease: web.Lease})
		if r.Error != nil || r.Address == web.Address || r.Lease == web.Lease {
			t.Errorf("an ended lease brings %+v", r)
		}
		// Over, because the operator wanted it.
		third, _, api := greetStage(s, wire.Hello{Name: "api", Token: tokenA})
		s.srv.Disconnect("api")
		within(t, "the end of a disconnected session", third.Done())
		greetStage(s, wire.Hello{Name: "api", Token: tokenC})
		_, _, r = greetStage(s, wire.Hello{Name: "api", Token: tokenA, Lease: api.Lease})
		if r.Error == nil || r.Error.Code != wire.CodeDisconnected {
			t.Errorf("a disconnected lease: %+v", r)
		}
		_, _, r = greetStage(s, wire.Hello{Name: "api", Token: tokenC, Lease: api.Lease})
		taken(s, "a disconnected lease of somebody else", r)
		// Over, because nobody came back in time.
		fourth, _, late := greetStage(s, wire.Hello{Name: "late", Token: tokenA})
		fourth.Close()
		time.Sleep(time.Minute)
		synctest.Wait()
		greetStage(s, wire.Hello{Name: "late", Token: tokenC})
		_, _, r = greetStage(s, wire.Hello{Name: "late", Token: tokenA, Lease: late.Lease})
		taken(s, "an expired lease", r)
	}, relay.WithTokens(tokenA, tokenB), relay.WithTokens(tokenC))
}

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
	return relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		*rec = &recorder{Conn: c}
		return *rec, nil
	})
}

// Who sees all that passes between app and relay over TLS sees no secret.
func TestNothingInClear(t *testing.T) {
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
		_, err = relay.Register(t.Context(), addr, relay.WithToken(tokenA), relay.WithName("web"), relay.WithWait())
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

// An authorizer sees all that an app shows.
func TestAuthorizerSees(t *testing.T) {
	free := freePorts(t, 1)
	identity, known := clientCert(t, pkix.Name{CommonName: "app", Organization: []string{"us"}}, time.Hour)
	mutual := relayTLS()
	mutual.ClientAuth, mutual.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
	mutual.ClientCAs.AddCert(known)
	shows := clientTLS()
	shows.Certificates = []tls.Certificate{identity}

	for name, tt := range map[string]struct {
		tls  *tls.Config // the relay's
		opts []relay.RegisterOption
		want relay.Registration
	}{
		"nothing": {nil, nil, relay.Registration{}},
		"all": {nil, []relay.RegisterOption{relay.WithToken("the token"), relay.WithName("web"), relay.WithPort(free), relay.WithShared()},
			relay.Registration{Token: "the token", Name: "web", Port: free, Shared: true}},
		"TLS":        {relayTLS(), []relay.RegisterOption{relay.WithTLSConfig(clientTLS())}, relay.Registration{TLS: &tls.ConnectionState{}}},
		"mutual TLS": {mutual, []relay.RegisterOption{relay.WithTLSConfig(shows)}, relay.Registration{TLS: &tls.ConnectionState{PeerCertificates: []*x509.Certificate{known}}}},
	} {
		t.Run(name, func(t *testing.T) {
			asked := make(chan relay.Registration, 1)
			_, addr := startRelay(t, relay.WithTLSConfig(tt.tls),
				relay.WithAuthorizer(func(ctx context.Context, r relay.Registration) (relay.Grant, error) {
					if at, ok := ctx.Deadline(); !ok || time.Until(at) > 10*time.Second {
						t.Errorf("the context ends at %v", at)
					}
					asked <- r
					return relay.Grant{}, nil
				}))
			var rec *recorder
			register(t, addr, append(tt.opts, recorded(&rec))...)
			got := within(t, "a question", asked)
			if got.Remote.String() != rec.LocalAddr().String() {
				t.Errorf("from %v, not %v", got.Remote, rec.LocalAddr())
			}
			if (got.TLS != nil) != (tt.want.TLS != nil) {
				t.Fatalf("TLS %+v", got.TLS)
			}
			if got.TLS != nil {
				if !got.TLS.HandshakeComplete || got.TLS.Version != tls.VersionTLS13 ||
					len(got.TLS.PeerCertificates) != len(tt.want.TLS.PeerCertificates) {
					t.Errorf("TLS %+v", got.TLS)
				}
				for i, c := range got.TLS.PeerCertificates {
					if !c.Equal(tt.want.TLS.PeerCertificates[i]) {
						t.Errorf("certificate %v", c.Subject)
					}
				}
			}
			got.Remote, got.TLS, tt.want.TLS = nil, nil, nil
			if got != tt.want {
				t.Errorf("shown %+v, want %+v", got, tt.want)
			}
		})
	}
}

// Why an authorizer says no is for the relay's log alone.
func TestAuthorizerRefuses(t *testing.T) {
	const reason = "the-database-says-no"
	srv, addr, log := startLogged(t, relay.WithAuthorizer(func(context.Context, relay.Registration) (relay.Grant, error) {
		return relay.Grant{Identity: "somebody"}, fmt.Errorf("%s\nto everybody", reason)
	}))
	check := nothingLeft(t)
	var rec *recorder
	_, err := relay.Register(t.Context(), addr, recorded(&rec))
	expectRegisterError(t, err, addr, relay.CodeUnauthorized)
	if strings.Contains(err.Error(), reason) || rec.has(reason) {
		t.Errorf("the app is told why: %v", err)
	}
	if e := log.wait(t, "registration failed", 1)[0]; !strings.Contains(fmt.Sprint(e.attrs["err"]), reason) || strings.Contains(fmt.Sprint(e.attrs["err"]), "\n") {
		t.Errorf("logged %+v", e)
	}
	if n := srv.Refusals(); !maps.Equal(n, map[string]int64{"unauthorized": 1}) || len(srv.Services()) != 0 {
		t.Errorf("refused %v", n)
	}
	check()
}

// A grant says which names and ports an app may have.
func TestGrants(t *testing.T) {
	type ask struct {
		name string
		port int
		want relay.Code
	}
	for name, tt := range map[string]struct {
		grant relay.Grant
		opts  []relay.ServerOption
		asks  []ask
	}{
		"any": {relay.Grant{}, nil, []ask{{"", 0, ""}, {"web", 0, ""}, {"x/y", 20_000, ""}, {"[", 1, ""}}},
		"names": {relay.Grant{Names: []string{"web", "api-*", "v[12]", "x/?"}}, nil, []ask{
			{"", 0, ""}, {"web", 0, ""}, {"api-", 0, ""}, {"api-one", 0, ""}, {"v1", 0, ""}, {"x/y", 0, ""},
			{"Web", 0, relay.CodeUnauthorized}, {"web2", 0, relay.CodeUnauthorized}, {"aweb", 0, relay.CodeUnauthorized},
			{"api", 0, relay.CodeUnauthorized}, {"api-a/b", 0, relay.CodeUnauthorized}, {"v3", 0, relay.CodeUnauthorized},
			{"web\n", 0, relay.CodeUnauthorized}, {"*", 0, relay.CodeUnauthorized}, {"api-*", 0, ""},
		}},
		"no names": {relay.Grant{Names: []string{}}, nil, []ask{{"", 0, ""}, {"web", 0, relay.CodeUnauthorized}}},
		"ports": {relay.Grant{FirstPort: 20_000, LastPort: 20_001}, nil, []ask{
			{"", 19_999, relay.CodePortUnavailable}, {"", 20_002, relay.CodePortUnavailable}, {"", 1, relay.CodePortUnavailable},
			{"", 20_000, ""}, {"", 20_001, ""}, {"", 0, ""},
		}},
		"ports of the relay's": {relay.Grant{FirstPort: 20_000, LastPort: 20_005}, []relay.ServerOption{relay.WithPorts(20_004, 20_010)}, []ask{
			{"", 20_003, relay.CodePortUnavailable}, {"", 20_006, relay.CodePortUnavailable}, {"", 20_005, ""}, {"", 0, ""},
		}},
		"no ports of the relay's": {relay.Grant{FirstPort: 20_000, LastPort: 20_005}, []relay.ServerOption{relay.WithPorts(30_000, 30_010)}, []ask{
			{"", 20_000, relay.CodePortUnavailable}, {"", 30_000, relay.CodePortUnavailable}, {"", 0, relay.CodePortUnavailable},
		}},
		"first port below": {relay.Grant{FirstPort: -1, LastPort: 10}, nil, []ask{{"", 0, relay.CodeUnauthorized}}},
		"last port above":  {relay.Grant{FirstPort: 1, LastPort: 65536}, nil, []ask{{"", 0, relay.CodeUnauthorized}}},
		"no first port":    {relay.Grant{LastPort: 10}, nil, []ask{{"", 0, relay.CodeUnauthorized}}},
		"ports reversed":   {relay.Grant{FirstPort: 11, LastPort: 10}, nil, []ask{{"", 0, relay.CodeUnauthorized}}},
		"a bad pattern":    {relay.Grant{Names: []string{"web", "["}}, nil, []ask{{"", 0, relay.CodeUnauthorized}, {"web", 0, relay.CodeUnauthorized}}},
		"a bad limit":      {relay.Grant{Limits: relay.Limits{HelloSize: 1 << 20}}, nil, []ask{{"", 0, relay.CodeUnauthorized}}},
	} {
		t.Run(name, func(t *testing.T) {
			tt.grant.Identity = "id"
			onStage(t, func(t *testing.T, s *stage) {
				refused := make(map[string]int64)
				for _, a := range tt.asks {
					l, err := relay.Register(t.Context(), s.addr, relay.WithDialer(s.net.Dial), relay.WithName(a.name), relay.WithPort(a.port))
					if code(err) != a.want || err != nil && a.want == "" {
						t.Errorf("%q, port %d: %v, want %q", a.name, a.port, err, a.want)
					}
					if err != nil {
						refused[string(code(err))]++
						continue
					}
					if p := port(l); tt.grant.FirstPort != 0 && (p < tt.grant.FirstPort || p > tt.grant.LastPort) || a.port != 0 && p != a.port {
						t.Errorf("%q, port %d: got port %d", a.name, a.port, p)
					}
					if info := s.srv.Services(); len(info) != 1 || info[0].Identity != "id" {
						t.Errorf("services %+v", info)
					}
					s.end(l)
				}
				s.expectRefusals(refused)
			}, append(tt.opts, relay.WithAuthorizer(func(context.Context, relay.Registration) (relay.Grant, error) {
				return tt.grant, nil
			}))...)
		})
	}
}

// Who may choose among few ports gets each, and then none.
func TestGrantOfPortsIsFull(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		got := map[int]bool{}
		for range 3 {
			got[port(s.register("a"))] = true
		}
		if !maps.Equal(got, map[int]bool{20_000: true, 20_001: true, 20_002: true}) {
			t.Errorf("ports %v", got)
		}
		if code := s.registers("10.0.0.5", "a"); code != relay.CodeServerFull {
			t.Errorf("a fourth: %q", code)
		}
	}, relay.WithAuthorizer(func(context.Context, relay.Registration) (relay.Grant, error) {
		return relay.Grant{FirstPort: 20_000, LastPort: 20_002}, nil
	}))
}

// What an app is granted when it comes back counts.
func TestGrantChanges(t *testing.T) {
	type step struct {
		name  string
		grant relay.Grant
		want  relay.Code // of the refusal; "" if it is back at its address
		ends  bool       // the listener
	}
	for _, tt := range []step{
		{"the same", relay.Grant{Identity: "id"}, "", false},
		{"still the name", relay.Grant{Identity: "id", Names: []string{"w*"}}, "", false},
		{"not the name", relay.Grant{Identity: "id", Names: []string{"api"}}, relay.CodeUnauthorized, true},
		{"still the port", relay.Grant{Identity: "id", FirstPort: 20_000, LastPort: 20_000}, "", false},
		{"not the port", relay.Grant{Identity: "id", FirstPort: 20_001, LastPort: 20_010}, relay.CodePortUnavailable, false},
		{"another identity", relay.Grant{Identity: "other"}, relay.CodeNameTaken, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var grant atomic.Pointer[relay.Grant]
			grant.Store(&relay.Grant{Identity: "id"})
			onStage(t, func(t *testing.T, s *stage) {
				a := s.registerEcho("", relay.WithName("web"), relay.WithPort(20_000))
				addr := a.Addr().String()
				grant.Store(&tt.grant)
				a.leave()
				a.away.Store(false)
				if tt.want == "" {
					s.await(relay.EventResumed)
					s.visit(a)
					s.expectRefusals(map[string]int64{})
					return
				}
				if ev := s.await(relay.EventRefused); ev.Err == nil {
					t.Errorf("event %+v", ev)
				}
				if n := s.srv.Refusals()[string(tt.want)]; n == 0 {
					t.Errorf("refused %v, want %q", s.srv.Refusals(), tt.want)
				}
				if tt.ends {
					if _, err := a.Accept(); code(err) != tt.want {
						t.Errorf("Accept: %v", err)
					}
					return
				}
				// It goes on trying, and is back as soon as it may.
				grant.Store(&relay.Grant{Identity: "id"})
				s.await(relay.EventResumed)
				s.visit(a)
				if a.Addr().String() != addr {
					t.Errorf("now at %v", a.Addr())
				}
			}, relay.WithAuthorizer(func(context.Context, relay.Registration) (relay.Grant, error) {
				return *grant.Load(), nil
			}))
		})
	}
}

// Without its lease an app has no claim to what it is not granted any more.
func TestGrantWithoutLease(t *testing.T) {
	grants := map[string]relay.Grant{
		"all":   {Identity: "id"},
		"ports": {Identity: "id", FirstPort: 30_000, LastPort: 30_010},
		"names": {Identity: "id", Names: []string{"api"}},
	}
	onStage(t, func(t *testing.T, s *stage) {
		shared := s.register("all", relay.WithName("shared"), relay.WithShared(), relay.WithPort(20_000))
		if code := s.registers("10.0.0.5", "ports", relay.WithName("shared"), relay.WithShared()); code != relay.CodePortUnavailable {
			t.Errorf("a share of a port that is not granted: %q", code)
		}
		s.end(shared.Listener)

		parked := s.register("all", relay.WithName("parked"), relay.WithPort(20_001))
		parked.leave()
		l := register(t, s.addr, relay.WithToken("ports"), relay.WithName("parked"), relay.WithDialer(s.net.Dial))
		if p := port(l); p < 30_000 || p > 30_010 {
			t.Errorf("the app of a parked name got port %d", p)
		}
		s.end(l)

		// The name in the lease counts, and not the one asked for.
		sess, _, reply := greet(s, s.dialFrom("10.0.0.5", s.addr), wire.Hello{Token: "all", Name: "web"})
		if reply.Error != nil {
			t.Fatal(reply.Error)
		}
		_, _, got := greet(s, s.dialFrom("10.0.0.5", s.addr), wire.Hello{Token: "names", Lease: reply.Lease})
		if got.Error == nil || got.Error.Code != wire.CodeUnauthorized {
			t.Errorf("a lease on a name that is not granted brings %+v", got)
		}
		if sess.Err() != nil {
			t.Errorf("the session with the lease has ended: %v", sess.Err())
		}
	}, relay.WithAuthorizer(func(_ context.Context, r relay.Registration) (relay.Grant, error) {
		return grants[r.Token], nil
	}))
}

// clientCert makes a client's certificate that is its own authority and holds for d
// from now.
func clientCert(t *testing.T, subject pkix.Name, d time.Duration) (tls.Certificate, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      subject,
		NotAfter:     time.Now().Add(d),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, leaf
}

// With mutual TLS an app is known by the subject of its certificate, and refused if
// that is not good.
func TestCertificateIdentity(t *testing.T) {
	config := relayTLS()
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
	apps := make(map[string]relay.RegisterOption)
	for name, tt := range map[string]struct {
		subject pkix.Name
		lasts   time.Duration
		foreign bool
	}{
		"one":           {pkix.Name{CommonName: "one", Organization: []string{"us"}}, time.Hour, false},
		"two":           {pkix.Name{CommonName: "two"}, time.Hour, false},
		"nameless, one": {pkix.Name{}, time.Hour, false},
		"nameless, two": {pkix.Name{}, time.Hour, false},
		"foreign":       {pkix.Name{CommonName: "one", Organization: []string{"us"}}, time.Hour, true},
		"expired":       {pkix.Name{CommonName: "one", Organization: []string{"us"}}, -time.Hour, false},
	} {
		cert, leaf := clientCert(t, tt.subject, tt.lasts)
		if !tt.foreign {
			config.ClientCAs.AddCert(leaf)
		}
		app := clientTLS()
		app.Certificates = []tls.Certificate{cert}
		// Also one that the relay does not ask for.
		app.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		apps[name] = relay.WithTLSConfig(app)
	}
	srv, addr, log := startLogged(t, relay.WithTLSConfig(config))
	check := nothingLeft(t)
	for n, name := range []string{"foreign", "expired", "none"} {
		with := apps[name]
		if with == nil {
			with = relay.WithTLSConfig(clientTLS())
		}
		_, err := relay.Register(t.Context(), addr, with)
		expectRegisterError(t, err, addr, relay.CodeTLS)
		eventually(t, "it counted", func() bool { return srv.Refusals()["tls"] == int64(n+1) })
		if len(srv.Services()) != 0 {
			t.Errorf("%s: services %+v", name, srv.Services())
		}
	}
	if e := log.wait(t, "registration failed", 1)[0]; e.attrs["kind"] != "tls" || e.attrs["remote"] == nil || e.attrs["err"] == nil {
		t.Errorf("logged %+v", e)
	}
	check()

	one := register(t, addr, apps["one"], relay.WithName("web"), relay.WithShared())
	if got := srv.Services(); len(got) != 1 || got[0].Identity != "CN=one,O=us" {
		t.Errorf("services %+v", got)
	}
	go serveEcho(one)
	go serveEcho(register(t, addr, apps["one"], relay.WithName("web"), relay.WithShared()))
	if _, err := relay.Register(t.Context(), addr, apps["two"], relay.WithName("web"), relay.WithShared()); code(err) != relay.CodeNameTaken {
		t.Errorf("another subject shares the name: %v", err)
	}
	// Without a subject it is the key that says who it is.
	register(t, addr, apps["nameless, one"], relay.WithName("api"), relay.WithShared())
	register(t, addr, apps["nameless, one"], relay.WithName("api"), relay.WithShared())
	if _, err := relay.Register(t.Context(), addr, apps["nameless, two"], relay.WithName("api"), relay.WithShared()); code(err) != relay.CodeNameTaken {
		t.Errorf("another key shares the name: %v", err)
	}
	if got := srv.Services()[0]; !strings.HasPrefix(got.Identity, "key ") || len(got.Identity) != 4+64 {
		t.Errorf("service %+v", got)
	}
	echoes(t, dial(t, one))
}

// With an authorizer mutual TLS is asked for too.
func TestCertificateAndAuthorizer(t *testing.T) {
	config := relayTLS()
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, theCerts().pool
	srv, addr := startRelay(t, relay.WithTLSConfig(config), relay.WithTokens(tokenA))
	known := clientTLS()
	known.Certificates = []tls.Certificate{theCerts().client}
	for _, tt := range []struct {
		tls   *tls.Config
		token string
		want  relay.Code
	}{
		{clientTLS(), tokenA, relay.CodeTLS},
		{known, tokenB, relay.CodeUnauthorized},
		{known, tokenA, ""},
	} {
		l, err := relay.Register(t.Context(), addr, relay.WithTLSConfig(tt.tls), relay.WithToken(tt.token))
		if code(err) != tt.want || err != nil && tt.want == "" {
			t.Errorf("Register: %v, want %q", err, tt.want)
		}
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
	}
	if got := srv.Services(); len(got) != 1 || got[0].Identity != "tokens 1" {
		t.Errorf("services %+v", got)
	}
}

// TLS on one side alone is told on both, in words that say so.
func TestTLSOneSideTold(t *testing.T) {
	for _, tt := range []struct {
		name string
		opts []relay.ServerOption
		app  []relay.RegisterOption
	}{
		{"relay", []relay.ServerOption{relay.WithTLSConfig(relayTLS())}, nil},
		{"app", nil, []relay.RegisterOption{relay.WithTLSConfig(clientTLS())}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv, addr, log := startLogged(t, append(tt.opts, relay.WithTokens(tokenA))...)
			var rec *recorder
			_, err := relay.Register(t.Context(), addr, append(tt.app, relay.WithToken(tokenA), recorded(&rec))...)
			if err == nil || !strings.Contains(err.Error(), "TLS") && !strings.Contains(err.Error(), "tls") {
				t.Errorf("the app is told %v", err)
			}
			e := log.wait(t, "registration failed", 1)[0]
			if s := fmt.Sprint(e.attrs["err"]); e.attrs["kind"] != "tls" || !strings.Contains(s, "TLS") && !strings.Contains(s, "tls") {
				t.Errorf("logged %+v", e)
			}
			if n := srv.Refusals(); !maps.Equal(n, map[string]int64{"tls": 1}) {
				t.Errorf("refused %v", n)
			}
			if len(tt.app) > 0 && rec.has(tokenA) {
				t.Error("the token was sent in clear")
			}
		})
	}
}

// What is wrong with TLS is no better for waiting, which would only hide it. A relay that
// hangs up in the middle may be a better one soon.
func TestTLSInVain(t *testing.T) {
	mutual := relayTLS()
	mutual.ClientAuth, mutual.ClientCAs = tls.RequireAndVerifyClientCert, theCerts().pool
	plain, overTLS, asks := []relay.ServerOption(nil), []relay.ServerOption{relay.WithTLSConfig(relayTLS())}, []relay.ServerOption{relay.WithTLSConfig(mutual)}
	for name, tt := range map[string]struct {
		relay []relay.ServerOption
		app   *tls.Config
	}{
		"not trusted":     {overTLS, &tls.Config{}},
		"another host's":  {overTLS, &tls.Config{RootCAs: theCerts().pool, ServerName: "example.com"}},
		"no certificate":  {asks, clientTLS()},
		"the relay plain": {plain, clientTLS()},
		"the app plain":   {overTLS, nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, addr := startRelay(t, tt.relay...)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			_, err := relay.Register(ctx, addr, relay.WithTLSConfig(tt.app), relay.WithWait(), relay.WithBackoff(never, never))
			expectRegisterError(t, err, addr, relay.CodeTLS)
		})
	}
	t.Run("cut", func(t *testing.T) {
		_, addr := startRelay(t, overTLS...)
		tries := 0
		l := register(t, addr, relay.WithTLSConfig(clientTLS()), relay.WithWait(), relay.WithBackoff(time.Millisecond, time.Millisecond),
			relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
				if tries++; tries > 3 {
					return new(net.Dialer).DialContext(ctx, network, addr)
				}
				a, b := net.Pipe()
				go func() {
					b.Read(make([]byte, 64<<10)) // the hello
					b.Close()
				}()
				return a, nil
			}))
		if tries != 4 || l.Addr() == nil {
			t.Errorf("%d tries", tries)
		}
	})
}

// A relay at which anybody may register says so, once, unless only this machine can.
func TestOpenRelayWarning(t *testing.T) {
	certs := func(auth tls.ClientAuthType) relay.ServerOption {
		config := relayTLS()
		config.ClientAuth, config.ClientCAs = auth, theCerts().pool
		return relay.WithTLSConfig(config)
	}
	anybody := relay.WithAuthorizer(func(context.Context, relay.Registration) (relay.Grant, error) { return relay.Grant{}, nil })
	for _, tt := range []struct {
		name  string
		opts  []relay.ServerOption
		addrs []string
		warn  string // of which address
	}{
		{"loopback", nil, []string{"127.0.0.1:1", "127.5.5.5:1", "[::1]:1"}, ""},
		{"an address", nil, []string{"10.0.0.1:1"}, "10.0.0.1:1"},
		{"all addresses", nil, []string{"0.0.0.0:1"}, "0.0.0.0:1"},
		{"all IPv6 addresses", nil, []string{"[::]:1"}, "[::]:1"},
		{"several", nil, []string{"127.0.0.1:1", "10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"}, "10.0.0.1:1"},
		{"tokens", []relay.ServerOption{relay.WithTokens(tokenA)}, []string{"10.0.0.1:1"}, ""},
		{"authorizer", []relay.ServerOption{anybody}, []string{"10.0.0.1:1"}, ""},
		{"no authorizer", []relay.ServerOption{relay.WithAuthorizer(nil)}, []string{"10.0.0.1:1"}, "10.0.0.1:1"},
		{"TLS", []relay.ServerOption{relay.WithTLSConfig(relayTLS())}, []string{"10.0.0.1:1"}, "10.0.0.1:1"},
		{"mutual TLS", []relay.ServerOption{certs(tls.RequireAndVerifyClientCert)}, []string{"10.0.0.1:1"}, ""},
		{"any certificate", []relay.ServerOption{certs(tls.RequireAnyClientCert)}, []string{"10.0.0.1:1"}, "10.0.0.1:1"},
		{"a certificate if there is one", []relay.ServerOption{certs(tls.VerifyClientCertIfGiven)}, []string{"10.0.0.1:1"}, "10.0.0.1:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var log logbook
			srv, err := relay.NewServer(append(tt.opts, relay.WithLogger(log.logger()))...)
			if err != nil {
				t.Fatal(err)
			}
			for n, addr := range tt.addrs {
				ln, err := memnet.New().Listen(t.Context(), "tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				serveOn(t, srv, sameAddr{ln, addr})
				log.wait(t, "listening", n+1)
			}
			var warned []string
			for _, e := range log.with("") {
				if e.level >= slog.LevelWarn {
					warned = append(warned, fmt.Sprint(e.attrs["addr"]))
					if !strings.Contains(e.msg, "anybody") || !strings.Contains(e.msg, "WithTokens") {
						t.Errorf("logged %q", e.msg)
					}
				}
			}
			if tt.warn == "" && warned != nil || tt.warn != "" && !slices.Equal(warned, []string{tt.warn}) {
				t.Errorf("warned of %q, want %q", warned, tt.warn)
			}
		})
	}
}

// sameAddr is a listener whose address is what it was asked to be.
type sameAddr struct {
	net.Listener
	addr string
}

func (l sameAddr) Addr() net.Addr {
	a, _ := net.ResolveTCPAddr("tcp", l.addr)
	return a
}

// A lockedBuffer is a log's.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) lines() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Split(strings.TrimSuffix(b.b.String(), "\n"), "\n")
}

// What strangers say gets into the log quoted and cut, and under the same names
// everywhere.
func TestLogOfUntrusted(t *testing.T) {
	long := strings.Repeat("long", 63) + "er!" // 255 bytes
	names := []string{
		"plain", "two\nlines time=now level=ERROR msg=forged", "\r\x1b[2J\x1b[31mred\x07", "quote\"s \\ and = {}", "right\u202eleft\u2028",
		strings.Repeat("\x01", 255), long, long[:254] + "\n", strings.Repeat("é", 127), "\x00",
	}
	// The attributes that lines of the relay have, by message.
	attrs := map[string][]string{
		"listening":           {"addr"},
		"registered":          {"service", "addr", "identity", "remote", "protocol", "resumed"},
		"session ended":       {"service", "addr", "identity", "remote", "kept", "err"},
		"client left":         {"service", "addr", "identity", "client", "bytes_in", "bytes_out", "seconds", "err"},
		"client refused":      {"kind", "suppressed", "service", "addr", "identity", "client", "err"},
		"client cut off":      {"kind", "suppressed", "service", "addr", "identity", "client"},
		"registration failed": {"kind", "suppressed", "remote", "err"},
		"lease ended":         {"service", "addr", "identity", "err"},
	}
	optional := []string{"suppressed"}
	for _, format := range []string{"json", "text"} {
		t.Run(format, func(t *testing.T) {
			out := new(lockedBuffer)
			all := &slog.HandlerOptions{Level: slog.LevelDebug}
			var h slog.Handler = slog.NewJSONHandler(out, all)
			if format == "text" {
				h = slog.NewTextHandler(out, all)
			}
			onStage(t, func(t *testing.T, s *stage) {
				for _, name := range names {
					time.Sleep(2 * time.Second) // so that nothing is suppressed
					a := s.register(name, relay.WithName(name))
					go serveEcho(a)
					c := s.client(a)
					s.mustServe(c)
					if s.served(s.client(a)) { // refused
						t.Error("two clients")
					}
					if code := s.registers("10.0.0.5", name, relay.WithName(name)); code != relay.CodeNameTaken {
						t.Errorf("the name again: %q", code)
					}
					if info := s.srv.Services(); len(info) != 1 || info[0].Name != name || info[0].Identity != name {
						t.Errorf("services %+v", info)
					}
					time.Sleep(2 * time.Minute) // cut off
					synctest.Wait()
					s.end(a.Listener)
					b := s.register(name, relay.WithName(name))
					b.leave()
					s.end(b.Listener)
					time.Sleep(2 * time.Minute) // expired
				}
				// JSON that is not UTF-8, in which nothing stays as it was sent.
				for _, hello := range []string{
					"{\"version\":1,\"name\":\"\xff\xfe\n\x1b\"}\n", "{\"version\":1,\"name\":\"\xff\xfe\\u001b\"}\n",
					"{\"version\":1,\"name\":\"\\ud800\\u0000\"}\n", "\xff\x00\n", `{"version":"` + strings.Repeat("\x1b", 1000) + `"}` + "\n",
					`{"version":1,"port":` + strings.Repeat("9", 1000) + "}\n", `{"version":1e400}` + "\n",
				} {
					time.Sleep(2 * time.Second)
					sess := mux.Client(s.dialFrom("10.0.0.5", s.addr), mux.Config{})
					sess.Open([]byte(hello))
					time.Sleep(5 * time.Second)
					sess.Close()
				}
			}, relay.WithLogger(slog.New(h)), relay.WithLimits(relay.Limits{ClientsPerService: 1, IdleTime: time.Minute}),
				relay.WithAuthorizer(func(_ context.Context, r relay.Registration) (relay.Grant, error) {
					return relay.Grant{Identity: r.Token}, nil
				}))

			seen := make(map[string]int)
			for _, line := range out.lines() {
				// All is printable, so no line and no terminal is fooled.
				if !utf8.ValidString(line) || strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
					t.Errorf("logged %q", line)
				}
				if strings.Contains(line, long[:200]) || strings.Contains(line, strings.Repeat("é", 70)) {
					t.Errorf("logged uncut: %q", line)
				}
				if format == "text" {
					if !strings.HasPrefix(line, "time=") {
						t.Errorf("logged %q", line)
					}
					continue
				}
				var got map[string]any
				if err := json.Unmarshal([]byte(line), &got); err != nil {
					t.Errorf("logged %q: %v", line, err)
					continue
				}
				msg, _ := got["msg"].(string)
				seen[msg]++
				for k, v := range got {
					if s, ok := v.(string); ok && len(s) > 600 {
						t.Errorf("%s: %s has %d bytes", msg, k, len(s))
					}
					if !slices.Contains(attrs[msg], k) && k != "time" && k != "level" && k != "msg" {
						t.Errorf("%q has the attribute %q", msg, k)
					}
				}
				for _, k := range attrs[msg] {
					if _, ok := got[k]; !ok && !slices.Contains(optional, k) && got["service"] != nil {
						// A nameless service of nobody has no identity.
						if k != "identity" || got["kind"] != nil {
							t.Errorf("%q lacks the attribute %q: %q", msg, k, line)
						}
					}
				}
			}
			for msg := range attrs {
				if format == "json" && seen[msg] == 0 {
					t.Errorf("never logged: %q", msg)
				}
			}
		})
	}
}
