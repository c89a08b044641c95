package relay_test

import (
	"bytes"
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
	"github.com/tcprelay/relay/internal/wire"
)

// An intruder is somebody who would have another's name and port.
type intruder struct {
	what string
	want string // the code that it gets
	try  func() (addr, code string)
}

// viaRegister is one who uses the library.
func viaRegister(n *memnet.Network, ip string, opts ...relay.RegisterOption) func() (string, string) {
	return func() (addr, got string) {
		l, err := signUp(context.Background(), relayAddr, append(opts, relay.WithDialer(n.DialFrom(ip)))...)
		if err != nil {
			return "", string(code(err))
		}
		defer l.Close()
		return l.Addr().String(), ""
	}
}

// viaHello is one who says what he likes.
func viaHello(n *memnet.Network, ip string, hello func() wire.Hello) func() (string, string) {
	return func() (addr, got string) {
		r, err := knock(n, ip, hello())
		if err != nil {
			return "", err.Error()
		}
		defer r.Session.Close()
		if r.reply.Error != nil {
			return "", r.reply.Error.Code
		}
		return r.reply.Address, ""
	}
}

// race has intruders try again and again, each in a goroutine, until the function that
// it returns is called. None may ever be registered, and each is told why.
func race(t testing.TB, all []intruder) (stop func()) {
	done := make(chan struct{})
	var racing sync.WaitGroup
	for i, who := range all {
		racing.Go(func() {
			for tries := 0; ; tries++ {
				if addr, got := who.try(); addr != "" || got != who.want {
					t.Errorf("%s, try %d: at %q, code %q, want %q", who.what, tries, addr, got, who.want)
					return
				}
				select {
				case <-done:
					if tries < 50 {
						t.Errorf("%s tried only %d times", who.what, tries)
					}
					return
				case <-time.After(time.Duration(30+i) * time.Millisecond):
				}
			}
		})
	}
	stop = sync.OnceFunc(func() {
		close(done)
		racing.Wait()
	})
	t.Cleanup(stop)
	return stop
}

// Whatever others show and ask for, a service that is away is its owner's, who is back
// at its address in the end.
func TestIntruders(t *testing.T) {
	for _, tt := range []struct {
		name    string
		opts    []relay.ServerOption
		owner   []relay.RegisterOption
		guarded bool // by tokens: else all are nobody
	}{
		{
			name:    "tokens",
			opts:    []relay.ServerOption{relay.WithTokens("owner"), relay.WithTokens("rival", "rival 2")},
			owner:   []relay.RegisterOption{relay.WithToken("owner")},
			guarded: true,
		},
		{name: "anonymous"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				opts := append(tt.opts, relay.WithPorts(8001, 8010), relay.WithLease(time.Minute),
					relay.WithLimits(relay.Limits{WaitTime: time.Minute}))
				r := startOn(t, n, opts...)
				start := time.Now()
				named := roam(t, n, append(tt.owner, relay.WithName("web"), relay.WithPort(8005))...)
				nameless := roam(t, n, append(tt.owner, relay.WithPort(8006))...)
				shared := roam(t, n, append(tt.owner, relay.WithName("crowd"), relay.WithShared(), relay.WithPort(8007))...)
				owners := []*roamer{named, nameless, shared}
				lease := named.transport().lease(t)

				rival := ""
				if tt.guarded {
					rival = "rival"
				}
				with := func(opts ...relay.RegisterOption) []relay.RegisterOption {
					if tt.guarded {
						opts = append(opts, relay.WithToken("rival 2"))
					}
					return opts
				}
				say := func(h wire.Hello) func() wire.Hello {
					h.Token = rival
					return func() wire.Hello { return h }
				}
				guess := 0
				guessed := func() wire.Hello {
					guess++
					b := []byte(lease)
					b[guess%len(b)] ^= byte(1 + guess%7)
					return wire.Hello{Token: rival, Name: "web", Lease: string(b)}
				}
				const taken, used = wire.CodeNameTaken, wire.CodePortUnavailable
				intruders := []intruder{
					{"name", taken, viaRegister(n, "10.6.0.1", with(relay.WithName("web"))...)},
					{"name and port", taken, viaRegister(n, "10.6.0.2", with(relay.WithName("web"), relay.WithPort(8005))...)},
					{"port", used, viaRegister(n, "10.6.0.3", with(relay.WithPort(8005))...)},
					{"port of one without a name", used, viaRegister(n, "10.6.0.4", with(relay.WithPort(8006))...)},
					{"port with another name", used, viaRegister(n, "10.6.0.5", with(relay.WithName("other"), relay.WithPort(8006))...)},
					{"name, shared", taken, viaRegister(n, "10.6.0.6", with(relay.WithName("web"), relay.WithShared())...)},
					{"shared name", taken, viaRegister(n, "10.6.0.7", with(relay.WithName("crowd"))...)},
					{"port of a shared name", used, viaRegister(n, "10.6.0.8", with(relay.WithPort(8007))...)},
					{"guessed lease", taken, viaHello(n, "10.6.0.9", guessed)},
					{"truncated lease", taken, viaHello(n, "10.6.0.10", say(wire.Hello{Name: "web", Lease: lease[:len(lease)-1]}))},
					{"longer lease", used, viaHello(n, "10.6.0.11", say(wire.Hello{Port: 8005, Lease: lease + "A"}))},
					{"lease in other letters", taken, viaHello(n, "10.6.0.12", say(wire.Hello{Name: "web", Lease: string(bytes.ToLower([]byte(lease)))}))},
				}
				if tt.guarded {
					intruders = append(intruders,
						intruder{"shared name, shared", taken, viaRegister(n, "10.6.0.13", with(relay.WithName("crowd"), relay.WithShared())...)},
						intruder{"no token", wire.CodeUnauthorized, viaRegister(n, "10.6.0.14", relay.WithName("web"))},
						intruder{"wrong token", wire.CodeUnauthorized, viaRegister(n, "10.6.0.15", relay.WithName("web"), relay.WithToken("owner "))},
						intruder{"no token and the lease", wire.CodeUnauthorized, viaHello(n, "10.6.0.16", func() wire.Hello { return wire.Hello{Lease: lease} })},
						// Even the right one is no good to somebody else.
						intruder{"stolen lease", taken, viaHello(n, "10.6.0.17", say(wire.Hello{Name: "web", Lease: lease}))},
						intruder{"stolen lease and port", used, viaHello(n, "10.6.0.18", say(wire.Hello{Port: 8005, Lease: lease}))},
					)
				}
				stop := race(t, intruders)
				sleepUntil(start, 500*time.Millisecond) // while the owners live
				for _, a := range owners {
					a.place("")
					a.transport().Cut()
				}
				visits := make(chan error, 10)
				sleepUntil(start, time.Second)
				for _, a := range owners {
					go func() { visits <- visit(n, a.Addr()) }()
				}
				sleepUntil(start, 3*time.Second)
				for _, s := range r.Services() {
					if len(s.Sessions) != 0 || s.Waiting != 1 {
						t.Errorf("in the gap: %+v", s)
					}
				}
				for _, a := range owners {
					a.place("10.1.0.2")
				}
				for range owners {
					if err := <-visits; err != nil {
						t.Errorf("a client of the gap: %v", err)
					}
				}
				sleepUntil(start, 5*time.Second)
				stop()
				for i, a := range owners {
					a.expectAccepting(t)
					if s := a.Stats(); s.Reconnects != 1 || !s.Connected || port(a) != 8005+i {
						t.Errorf("owner %d at %v: %+v", i, a.Addr(), s)
					}
				}
				if got := serviceNames(r.Server); !slices.Equal(got, []string{"10.0.0.1:8006", "crowd", "web"}) {
					t.Errorf("services %q", got)
				}
				if n := len(r.of(relay.EventRegistered)); n != len(owners) {
					t.Errorf("%d registered", n)
				}
			})
		})
	}
}
