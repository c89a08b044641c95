package relay_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"maps"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
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
			_, err := signUp(t.Context(), s.addr, relay.WithToken(token), relay.WithDialer(s.net.Dial),
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
		_, err := signUp(t.Context(), addr, relay.WithToken(token), relay.WithWait())
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
	_, err := signUp(t.Context(), addr, recorded(&rec))
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
					l, err := signUp(t.Context(), s.addr, relay.WithDialer(s.net.Dial), relay.WithName(a.name), relay.WithPort(a.port))
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

// Who shows no token is told that there has to be one, and not what it is to be.
func TestNoToken(t *testing.T) {
	_, addr := startRelay(t, relay.WithTokens(tokenA))
	for token, want := range map[string]string{"": "not authorized without a token", "a guess": "not authorized"} {
		_, err := signUp(t.Context(), addr, relay.WithToken(token))
		expectRegisterError(t, err, addr, relay.CodeUnauthorized)
		if got := err.(*relay.RegisterError).Message; got != want {
			t.Errorf("with the token %q: %q", token, got)
		}
	}
}
