package relay_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// Clients wait for an app that is away as long as they may, and as many.
func TestWaiting(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n, relay.WithLease(time.Hour), relay.WithLimits(relay.Limits{WaitTime: 7 * time.Second, Waiting: 3}))
		a := roam(t, n, relay.WithName("web"))
		addr := a.Addr()
		start := time.Now()
		a.place("")
		a.transport().Cut()
		synctest.Wait()
		refused := make(chan time.Time, 10)
		come := func() {
			c := client(t, n, addr)
			go func() {
				expectReset(t, c)
				refused <- time.Now()
			}()
			synctest.Wait()
		}
		expectCounts := func(when string, waiting int, counts map[string]int64) {
			t.Helper()
			s := r.service(t)
			var all int64
			for kind, n := range counts {
				all += n
				if s.Refusals[kind] != n || r.Refusals()[kind] != n {
					t.Errorf("%s: refused %v and %v, want %v", when, s.Refusals, r.Refusals(), counts)
				}
			}
			if s.Waiting != waiting || s.Refused != all || s.Accepted != 0 || len(r.of(relay.EventClientRefused)) != int(all) {
				t.Errorf("%s: %+v", when, s)
			}
		}
		for i := range 3 { // at 1, 2 and 3 s
			sleepUntil(start, time.Duration(i+1)*time.Second)
			come()
		}
		expectCounts("three", 3, nil)
		sleepUntil(start, 4*time.Second)
		come()
		expectAt(t, "one too many is reset", <-refused, start, 4*time.Second)
		expectCounts("one too many", 3, map[string]int64{"waiting": 1})
		sleepUntil(start, 8*time.Second-1)
		expectCounts("nobody waited for too long", 3, map[string]int64{"waiting": 1})
		expectAt(t, "the first is reset", <-refused, start, 8*time.Second)
		synctest.Wait()
		expectCounts("one waited for too long", 2, map[string]int64{"waiting": 1, "waited": 1})
		come() // there is room again
		expectCounts("another one", 3, map[string]int64{"waiting": 1, "waited": 1})
		expectAt(t, "the second is reset", <-refused, start, 9*time.Second)
		expectAt(t, "the third is reset", <-refused, start, 10*time.Second)
		expectAt(t, "the last is reset", <-refused, start, 15*time.Second)
		synctest.Wait()
		expectCounts("all", 0, map[string]int64{"waiting": 1, "waited": 4})
		for _, ev := range r.of(relay.EventClientRefused) {
			if ev.Service != "web" || ev.Err == nil || hostOf(ev.Remote) != "10.2.0.1" {
				t.Errorf("event %+v", ev)
			}
		}
		a.place("10.1.0.1")
		sleepUntil(start, 20*time.Second)
		if err := visit(n, addr); err != nil {
			t.Errorf("in the end: %v", err)
		}
	})
}

// If they may not wait at all, they are told at once.
func TestNoWaiting(t *testing.T) {
	for _, tt := range []struct {
		limits relay.Limits
		kind   string
	}{
		{relay.Limits{WaitTime: -1}, "waited"},
		{relay.Limits{Waiting: 0, WaitTime: 10 * time.Second}, ""}, // 0 is the default
	} {
		inMemory(t, func(t *testing.T, n *memnet.Network) {
			r := startOn(t, n, relay.WithLimits(tt.limits))
			a := roam(t, n)
			start := time.Now()
			sleepUntil(start, 5*time.Second)
			if err := visit(n, a.Addr()); err != nil { // waits for an answer, not for the app
				t.Errorf("while the app is there: %v", err)
			}
			a.place("")
			a.transport().Cut()
			synctest.Wait()
			gap := time.Now()
			c := client(t, n, a.Addr())
			want, kind := time.Duration(0), tt.kind
			if kind == "" {
				want, kind = 10*time.Second, "waited"
			}
			expectReset(t, c)
			expectAt(t, "the reset", time.Now(), gap, want)
			synctest.Wait()
			if s := r.service(t); s.Refusals[kind] != 1 || s.Refused != 1 || s.Waiting != 0 {
				t.Errorf("the service is %+v", s)
			}
		})
	}
}

// All who wait for an app that is found dead wait on, however many there are.
func TestManyWaitBeyondDeath(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		const clients = 100
		r := startOn(t, n, relay.WithLimits(relay.Limits{WaitTime: 2 * time.Minute, Waiting: clients}))
		a := roam(t, n, relay.WithName("web"))
		a.place("")
		a.transport().Freeze()
		time.Sleep(2500 * time.Millisecond) // so that all are asking when it is found dead
		visits := make(chan error, clients)
		for range clients {
			go func() { visits <- visit(n, a.Addr()) }()
		}
		time.Sleep(time.Minute)
		a.place("10.1.0.1")
		for range clients {
			if err := within(t, "a client", visits); err != nil {
				t.Fatalf("%v; refused %v", err, r.Refusals())
			}
		}
	})
}

// Who may not wait for an app that is away still waits some seconds for the answer of one
// that was quiet, and no longer.
func TestNoWaitingForAnswer(t *testing.T) {
	ofSessions(t)
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n, relay.WithLimits(relay.Limits{WaitTime: -1}))
		a := roam(t, n)
		a.transport().Freeze()
		time.Sleep(2 * time.Second)
		start := time.Now()
		c := client(t, n, a.Addr())
		expectReset(t, c)
		expectAt(t, "the reset", time.Now(), start, 5*time.Second)
		synctest.Wait()
		if s := r.service(t); s.Refusals["waited"] != 1 || s.Waiting != 0 || len(s.Sessions) != 1 {
			t.Errorf("the service is %+v", s)
		}
		a.transport().Thaw()
		if err := visit(n, a.Addr()); err != nil {
			t.Errorf("after it: %v", err)
		}
	})
}
