package relay_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
)

type authorize = func(context.Context, relay.Registration) (relay.Grant, error)

// rules are an authorizer that can be changed.
type rules struct{ now atomic.Pointer[authorize] }

func (r *rules) set(f authorize) { r.now.Store(&f) }

// setTokens has the tokens of each of several owners.
func (r *rules) setTokens(t testing.TB, groups ...[]string) {
	t.Helper()
	owners := make(map[string][]string)
	for i, tokens := range groups {
		owners[fmt.Sprint("owner ", i)] = tokens
	}
	f, err := relay.TokenAuthorizer(owners)
	if err != nil {
		t.Fatal(err)
	}
	r.set(f)
}

func (r *rules) option() relay.ServerOption {
	return relay.WithAuthorizer(func(ctx context.Context, reg relay.Registration) (relay.Grant, error) {
		return (*r.now.Load())(ctx, reg)
	})
}

// expectRevoked checks that an app was told that it is not authorized any more, and its
// client reset.
func (s *stage) expectRevoked(a *stagedApp, c net.Conn) {
	s.Helper()
	if _, err := a.Accept(); code(err) != relay.CodeUnauthorized {
		s.Errorf("Accept: %v", err)
	}
	within(s, "the end of the listener", a.Done())
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		s.Errorf("the client: %v", err)
	}
}

func TestReauthorize(t *testing.T) {
	var r rules
	r.setTokens(t, []string{"old", "new"}, []string{"other"})
	onStage(t, func(t *testing.T, s *stage) {
		old := s.registerEcho("old", relay.WithName("web"))
		others := []*stagedApp{s.registerEcho("new"), s.registerEcho("other", relay.WithName("db"))}
		c := s.client(old)
		clients := []net.Conn{s.client(others[0]), s.client(others[1])}
		s.mustServe(append(clients, c)...)

		if err := s.srv.Reauthorize(t.Context()); err != nil { // as nothing has changed
			t.Fatal(err)
		}
		s.mustServe(append(clients, c)...)
		s.expectRefusals(map[string]int64{})

		r.setTokens(t, []string{"new"}, []string{"other"})
		if err := s.srv.Reauthorize(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.net.Dial(t.Context(), "tcp", old.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("the public port of what was cut off: %v", err)
		}
		s.expectRevoked(old, c)
		s.mustServe(clients...)
		s.mustServe(s.client(others[0]), s.client(others[1]))
		s.expectRefusals(map[string]int64{"revoked": 1})
		if ev := s.await(relay.EventEnded); ev.Service != "web" || ev.Err == nil {
			t.Errorf("event %+v", ev)
		}
		s.register("new", relay.WithName("web")) // the name is free
	}, r.option())
}

// Of those that share an address the others keep it.
func TestReauthorizeShared(t *testing.T) {
	var r rules
	r.setTokens(t, []string{"old", "new"})
	onStage(t, func(t *testing.T, s *stage) {
		old := s.register("old", relay.WithName("web"), relay.WithShared())
		c, _ := s.pair(old)
		stays := s.registerEcho("new", relay.WithName("web"), relay.WithShared())
		kept := s.client(stays)
		s.mustServe(kept)
		r.setTokens(t, []string{"new"})
		if err := s.srv.Reauthorize(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.expectRevoked(old, c)
		s.mustServe(kept, s.client(stays), s.client(stays))
		if infos := s.srv.Services(); len(infos) != 1 || len(infos[0].Sessions) != 1 {
			t.Errorf("services %+v", infos)
		}
	}, r.option())
}

// What an app may have can shrink, or turn out to be somebody else's.
func TestReauthorizeGrants(t *testing.T) {
	grant := func(g relay.Grant) authorize {
		return func(context.Context, relay.Registration) (relay.Grant, error) { return g, nil }
	}
	for name, tt := range map[string]struct {
		now  relay.Grant
		kept bool
	}{
		"the same":           {relay.Grant{Identity: "a"}, true},
		"as much as it has":  {relay.Grant{Identity: "a", Names: []string{"w*"}, FirstPort: 100, LastPort: 100}, true},
		"another identity":   {relay.Grant{Identity: "b"}, false},
		"another name":       {relay.Grant{Identity: "a", Names: []string{"db"}}, false},
		"another port":       {relay.Grant{Identity: "a", FirstPort: 101, LastPort: 200}, false},
		"one that is broken": {relay.Grant{Identity: "a", FirstPort: -1}, false},
	} {
		t.Run(name, func(t *testing.T) {
			var r rules
			r.set(grant(relay.Grant{Identity: "a"}))
			onStage(t, func(t *testing.T, s *stage) {
				a := s.registerEcho("", relay.WithName("web"), relay.WithPort(100))
				c := s.client(a)
				s.mustServe(c)
				r.set(grant(tt.now))
				if err := s.srv.Reauthorize(t.Context()); err != nil {
					t.Fatal(err)
				}
				if tt.kept {
					s.mustServe(c)
				} else {
					s.expectRevoked(a, c)
				}
			}, r.option())
		})
	}
}

// An app that registers while the rules change does not get past the new ones: neither at
// a place of its own nor at one that it had.
func TestReauthorizeWhileRegistering(t *testing.T) {
	for _, resumes := range []bool{false, true} {
		t.Run(fmt.Sprint("resumes=", resumes), func(t *testing.T) {
			var r rules
			yes := func(context.Context, relay.Registration) (relay.Grant, error) { return relay.Grant{Identity: "a"}, nil }
			r.set(yes)
			onStage(t, func(t *testing.T, s *stage) {
				var a *stagedApp
				if resumes {
					a = s.register("", relay.WithName("web"))
					a.leave()
				}
				asked, answer := make(chan struct{}), make(chan struct{})
				r.set(func(context.Context, relay.Registration) (relay.Grant, error) {
					close(asked)
					<-answer
					return relay.Grant{Identity: "a"}, nil
				})
				failed := make(chan error, 1)
				if resumes {
					a.away.Store(false)
					go func() { _, err := a.Accept(); failed <- err }()
				} else {
					go func() {
						_, err := signUp(t.Context(), s.addr, relay.WithName("web"), relay.WithDialer(s.net.Dial))
						failed <- err
					}()
				}
				<-asked
				r.set(func(context.Context, relay.Registration) (relay.Grant, error) { return relay.Grant{}, errors.New("no") })
				if err := s.srv.Reauthorize(t.Context()); err != nil {
					t.Fatal(err)
				}
				close(answer)
				if err := within(t, "refusal", failed); code(err) != relay.CodeUnauthorized {
					t.Errorf("not refused: %v", err)
				}
				s.expectRefusals(map[string]int64{"unauthorized": 1})
				synctest.Wait()
				for _, info := range s.srv.Services() {
					if !resumes || len(info.Sessions) > 0 {
						t.Errorf("service %+v", info)
					}
				}
			}, r.option())
		})
	}
}

// An app that is away is asked about when it comes back.
func TestReauthorizeAway(t *testing.T) {
	var r rules
	r.setTokens(t, []string{"old", "new"})
	onStage(t, func(t *testing.T, s *stage) {
		a := s.register("old")
		a.leave()
		r.setTokens(t, []string{"new"})
		if err := s.srv.Reauthorize(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.expectRefusals(map[string]int64{})
		a.away.Store(false)
		if _, err := a.Accept(); code(err) != relay.CodeUnauthorized {
			t.Errorf("Accept: %v", err)
		}
	}, r.option())
}

// Nobody is cut off for an authorizer that does not answer.
func TestReauthorizeInTime(t *testing.T) {
	var r rules
	r.setTokens(t, []string{"token"})
	onStage(t, func(t *testing.T, s *stage) {
		var clients []net.Conn
		for range 40 { // more than are asked about at once
			clients = append(clients, s.client(s.registerEcho("token")))
		}
		s.mustServe(clients...)
		r.set(func(ctx context.Context, _ relay.Registration) (relay.Grant, error) {
			<-ctx.Done()
			return relay.Grant{}, ctx.Err()
		})
		enough := errors.New("enough")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, enough)
		defer cancel()
		start := time.Now()
		if err := s.srv.Reauthorize(ctx); err != enough || time.Since(start) != time.Second {
			t.Errorf("Reauthorize: %v after %v", err, time.Since(start))
		}
		s.mustServe(clients...)
		s.expectRefusals(map[string]int64{})
	}, r.option())
}

// An owner that is gone from the list takes nothing from those behind it.
func TestReauthorizeOwners(t *testing.T) {
	var r rules
	owners := map[string][]string{"a": {"of a"}, "b": {"of b"}, "c": {"of c"}}
	set := func() {
		t.Helper()
		f, err := relay.TokenAuthorizer(owners)
		if err != nil {
			t.Fatal(err)
		}
		r.set(f)
	}
	set()
	onStage(t, func(t *testing.T, s *stage) {
		a, b := s.register("of a"), s.registerEcho("of b", relay.WithName("web"))
		ca, _ := s.pair(a)
		cb := s.client(b)
		s.mustServe(cb)
		delete(owners, "a")
		set()
		if err := s.srv.Reauthorize(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.expectRevoked(a, ca)
		s.mustServe(cb)
		b.leave()
		if got := s.registers("10.0.0.9", "of c", relay.WithName("web")); got != relay.CodeNameTaken {
			t.Errorf("the name of somebody who is away: %q", got)
		}
		b.comeBack(t)
	}, r.option())
}

// An authorizer that does not know is no reason to end anybody: who registers is told to try
// again, and who is there stays.
func TestUndecided(t *testing.T) {
	for name, err := range map[string]error{
		"said so":  fmt.Errorf("no database: %w", relay.ErrUndecided),
		"too late": fmt.Errorf("database: %w", context.DeadlineExceeded),
	} {
		t.Run(name, func(t *testing.T) {
			var r rules
			yes := func(context.Context, relay.Registration) (relay.Grant, error) { return relay.Grant{Identity: "a"}, nil }
			no := func(context.Context, relay.Registration) (relay.Grant, error) { return relay.Grant{}, err }
			r.set(yes)
			onStage(t, func(t *testing.T, s *stage) {
				a := s.registerEcho("")
				c := s.client(a)
				s.mustServe(c)
				r.set(no)
				if got := s.srv.Reauthorize(t.Context()); !errors.Is(got, err) {
					t.Errorf("Reauthorize: %v", got)
				}
				s.mustServe(c)
				if got := s.registers("10.0.0.9", ""); got != relay.CodeUnavailable {
					t.Errorf("a new app is told %q", got)
				}
				s.expectRefusals(map[string]int64{"unavailable": 1})

				// One that lost its session tries until there is an answer.
				a.leave()
				a.away.Store(false)
				eventually(t, "a try", func() bool { return s.srv.Refusals()["unavailable"] > 3 })
				r.set(yes)
				a.comeBack(t)
				s.mustServe(s.client(a))
			}, r.option())
		})
	}
}

// A question has the handshake's time, and no app waits for one longer.
func TestReauthorizeTime(t *testing.T) {
	var r rules
	r.setTokens(t, []string{"token"})
	onStage(t, func(t *testing.T, s *stage) {
		a := s.registerEcho("token")
		r.set(func(ctx context.Context, _ relay.Registration) (relay.Grant, error) {
			<-ctx.Done()
			return relay.Grant{}, ctx.Err()
		})
		start := time.Now()
		if err := s.srv.Reauthorize(t.Context()); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 10*time.Second {
			t.Errorf("Reauthorize: %v after %v", err, time.Since(start))
		}
		s.mustServe(s.client(a))
	}, r.option())
}

// Services with a hostname are asked about, too.
func TestReauthorizeHosts(t *testing.T) {
	var r rules
	grant := func(g relay.Grant) func(context.Context, relay.Registration) (relay.Grant, error) {
		return func(context.Context, relay.Registration) (relay.Grant, error) { return g, nil }
	}
	r.set(grant(relay.Grant{Identity: "a"}))
	srv, addr := startRelay(t, r.option())
	serveHosts(t, srv)
	stays := register(t, addr, relay.WithHostname("stays.example"))
	goes := register(t, addr, relay.WithHostname("goes.example"))
	r.set(grant(relay.Grant{Identity: "a", Hostnames: []string{"stays.*"}, Names: []string{"none"}}))
	if err := srv.Reauthorize(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := goes.Accept(); code(err) != relay.CodeUnauthorized {
		t.Errorf("Accept: %v", err)
	}
	eventually(t, "one service", func() bool {
		infos := srv.Services()
		return len(infos) == 1 && infos[0].Hostname == "stays.example"
	})
	if !stays.Stats().Connected {
		t.Error("the one that may stay does not")
	}
}

func TestTokenAuthorizer(t *testing.T) {
	f, err := relay.TokenAuthorizer(map[string][]string{"one": {"a", "b"}, "two": {"c"}})
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]string)
	for _, token := range []string{"a", "b", "c", "", "d"} {
		g, err := f(t.Context(), relay.Registration{Token: token})
		if err != nil {
			g.Identity = "refused"
		}
		got[token] = g.Identity
	}
	if want := map[string]string{"a": "one", "b": "one", "c": "two", "": "refused", "d": "refused"}; !maps.Equal(got, want) {
		t.Errorf("identities %v", got)
	}
	nobody, err := relay.TokenAuthorizer(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nobody(t.Context(), relay.Registration{}); err == nil {
		t.Error("without tokens everybody is let in")
	}
	for _, owners := range []map[string][]string{{"one": nil}, {"one": {""}}, {"one": {"a"}, "two": nil}, {"": {"a"}}, {"one": {"a"}, "two": {"b", "a"}}} {
		if _, err := relay.TokenAuthorizer(owners); err == nil {
			t.Errorf("TokenAuthorizer(%q) works", owners)
		}
	}
}
