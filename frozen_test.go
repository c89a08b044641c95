package relay_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
	"github.com/tcprelay/relay/internal/pulse"
)

// A frozen peer is found dead when its time is over, by each side for itself.
func TestFrozen(t *testing.T) {
	ofSessions(t)
	const frozen = 14 * time.Second
	type beat struct{ interval, dead time.Duration }
	for _, tt := range []struct {
		relay, app         beat
		relayLost, appLost time.Duration // 0: never
	}{
		{beat{}, beat{}, 40 * time.Second, 40 * time.Second}, // heard at 10 s
		{beat{5 * time.Second, 12 * time.Second}, beat{}, 22 * time.Second, 40 * time.Second},
		{beat{}, beat{5 * time.Second, 12 * time.Second}, 40 * time.Second, 22 * time.Second},
		{beat{3 * time.Second, 0}, beat{4 * time.Second, 0}, 21 * time.Second, 24 * time.Second}, // heard at 12 s
		{beat{-1, -1}, beat{}, 0, 40 * time.Second},
		{beat{}, beat{-1, -1}, 40 * time.Second, 0},
		{beat{7 * time.Second, -1}, beat{}, 0, 44 * time.Second}, // heard at 14 s, just before
		{beat{-1, -1}, beat{-1, -1}, 0, 0},
		{beat{-1, 0}, beat{-1, 0}, 30 * time.Second, 30 * time.Second}, // and nobody pings
	} {
		t.Run(fmt.Sprintf("%v-%v", tt.relay, tt.app), func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n, relay.WithHeartbeat(tt.relay.interval, tt.relay.dead))
				start := time.Now()
				a := roam(t, n, relay.WithName("web"), relay.WithHeartbeat(tt.app.interval, tt.app.dead))
				sleepUntil(start, frozen)
				a.place("")
				a.transport().Freeze()
				sleepUntil(start, 10*time.Minute)
				a.expectAccepting(t)
				check := func(who string, lost []relay.Event, want time.Duration) {
					t.Helper()
					switch {
					case want == 0 && len(lost) != 0:
						t.Errorf("%s lost it: %+v", who, lost)
					case want != 0 && len(lost) != 1:
						t.Errorf("%s lost it %d times", who, len(lost))
					case want != 0:
						expectAt(t, who+" lost it", lost[0].Time, start, want)
						if !errors.Is(lost[0].Err, pulse.ErrSilent) {
							t.Errorf("%s lost it by %v", who, lost[0].Err)
						}
					}
				}
				check("the relay", r.of(relay.EventLost), tt.relayLost)
				check("the app", a.of(relay.EventLost), tt.appLost)
				a.transport().Thaw()
			})
		})
	}
}

// frozenShare has two apps share a name, of which the one with fewer clients freezes, 4 s
// after it was last heard, and then a client come. It returns when that client was served
// by the other, or 0 if it was not, and when the relay lost the frozen one.
func frozenShare(t *testing.T, came time.Duration, opts ...relay.ServerOption) (served, lost time.Duration) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n, opts...)
		start := time.Now()
		var apps []*roamer
		for i := range 2 {
			a := newRoamer(n)
			a.place(fmt.Sprintf("10.1.0.%d", 1+i))
			a.Listener = register(t, relayAddr, append(a.options(nil), relay.WithName("web"), relay.WithShared())...)
			go a.serve()
			apps = append(apps, a)
		}
		for range 3 {
			client(t, n, apps[0].Addr())
			synctest.Wait()
		}
		sleepUntil(start, 14*time.Second) // and both were heard at 10 s
		sessions := r.service(t).Sessions
		fewer := slices.MinFunc(sessions, func(a, b relay.SessionInfo) int { return a.Clients - b.Clients })
		if fewer.Clients != 1 || len(sessions) != 2 || fewer.LastHeard.Sub(start) != 10*time.Second {
			t.Fatalf("sessions %+v", sessions)
		}
		frozen := apps[0]
		if hostOf(fewer.Remote) == "10.1.0.2" {
			frozen = apps[1]
		}
		frozen.place("")
		frozen.transport().Freeze()
		sleepUntil(start, came)
		c := client(t, n, apps[0].Addr())
		if _, err := c.Write([]byte{7}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err == nil {
			served = time.Since(start)
		}
		sleepUntil(start, 2*time.Minute)
		event := r.one(t, relay.EventLost)
		if event.Remote != fewer.Remote {
			t.Errorf("lost %+v", event)
		}
		lost = event.Time.Sub(start)
		if s := r.service(t); len(s.Sessions) != 1 || s.Waiting != 0 || s.Address != apps[0].Addr().String() {
			t.Errorf("the service is %+v", s)
		}
	})
	return served, lost
}

// Nobody is parked with an app that does not answer: who comes is given to another one
// that shares the name, a second after it was asked.
func TestFrozenShare(t *testing.T) {
	for _, tt := range []struct{ came, served, lost time.Duration }{
		{14500 * time.Millisecond, 15500 * time.Millisecond, 40 * time.Second}, // when it has not answered for a second
		{17 * time.Second, 18 * time.Second, 40 * time.Second},
		{22 * time.Second, 23 * time.Second, 40 * time.Second},
		{25*time.Second + 1, 25*time.Second + 1, 40 * time.Second}, // who has missed a beat is not chosen
		{39 * time.Second, 39 * time.Second, 40 * time.Second},
		{40*time.Second + 1, 40*time.Second + 1, 40 * time.Second}, // and is dead in the end
	} {
		t.Run(tt.came.String(), func(t *testing.T) {
			served, lost := frozenShare(t, tt.came, relay.WithLimits(relay.Limits{WaitTime: time.Minute}))
			if served != tt.served || lost != tt.lost {
				t.Errorf("it came after %v and was served after %v, want %v; the relay lost the frozen app after %v, want %v",
					tt.came, served, tt.served, lost, tt.lost)
			}
		})
	}
}

// Nor if the check would take longer than the client may wait.
func TestFrozenShareInTime(t *testing.T) {
	for _, wait := range []time.Duration{0, 5 * time.Second} {
		came := 14500 * time.Millisecond
		limits := relay.Limits{WaitTime: wait}
		if served, _ := frozenShare(t, came, relay.WithLimits(limits)); served == 0 || served > came+cmp.Or(wait, 10*time.Second) {
			t.Errorf("it may wait for %v, came after %v, and was served after %v by the app that lives", wait, came, served)
		}
	}
}

// An app that hangs when its session is to end in order is cut off when it would be
// dead; one that is only slow is not.
func TestHungAtTheEnd(t *testing.T) {
	ofSessions(t)
	const (
		frozen  = 14 * time.Second
		end     = 15 * time.Second
		dead    = 30 * time.Second
		goodbye = 250 * time.Millisecond
	)
	for _, tt := range []struct {
		name  string
		end   func(t *testing.T, r *memRelay, a *roamer) error
		want  error
		after time.Duration
	}{
		{"Shutdown", func(t *testing.T, r *memRelay, a *roamer) error { return r.Shutdown(t.Context()) }, nil, dead + goodbye},
		{
			"Shutdown with a deadline",
			func(t *testing.T, r *memRelay, a *roamer) error {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				return r.Shutdown(ctx)
			},
			context.DeadlineExceeded, 5*time.Second + goodbye,
		},
		{"Close", func(t *testing.T, r *memRelay, a *roamer) error { return r.Close() }, nil, goodbye},
		{"Disconnect", func(t *testing.T, r *memRelay, a *roamer) error { return r.Disconnect("web") }, nil, goodbye},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n)
				start := time.Now()
				a := roam(t, n, relay.WithName("web"))
				addr := a.Addr()
				sleepUntil(start, frozen)
				a.place("")
				a.transport().Freeze()
				sleepUntil(start, end)
				done := make(chan struct{})
				go func() {
					defer close(done)
					if err := tt.end(t, r, a); err != tt.want {
						t.Errorf("%v, want %v", err, tt.want)
					}
					expectAt(t, "its return", time.Now(), start, end+tt.after)
				}()
				synctest.Wait()
				if err := listens(n, addr); err != nil { // at once
					t.Errorf("listening: %v", err)
				}
				<-done
				synctest.Wait()
				if s := r.Services(); len(s) != 0 {
					t.Errorf("services %+v", s)
				}
			})
		})
	}
	t.Run("Listener.Close", func(t *testing.T) {
		inMemory(t, func(t *testing.T, n *memnet.Network) {
			r := startOn(t, n)
			start := time.Now()
			a := roam(t, n, relay.WithName("web"))
			transport := a.transport()
			sleepUntil(start, end)
			transport.SetLatency(time.Millisecond) // so that the relay's answer is still under way
			a.Close()
			sleepUntil(start, end+time.Millisecond)
			transport.Freeze()
			if s := r.service(t); !s.Draining {
				t.Errorf("the service is %+v", s)
			}
			if err := listens(n, a.Addr()); err != nil {
				t.Errorf("listening: %v", err)
			}
			sleepUntil(start, end+dead)
			r.service(t)
			sleepUntil(start, end+dead+time.Millisecond+goodbye)
			if s := r.Services(); len(s) != 0 {
				t.Errorf("services %+v", s)
			}
			if err := r.one(t, relay.EventEnded).Err; err != nil {
				t.Errorf("ended by %v, which the app wanted", err)
			}
			<-a.Done()
		})
	})
	t.Run("slow", func(t *testing.T) {
		inMemory(t, func(t *testing.T, n *memnet.Network) {
			r := startOn(t, n)
			start := time.Now()
			a := newRoamer(n)
			a.Listener = register(t, relayAddr, a.options(nil)...)
			const clients = 20
			var near []*memnet.Conn
			var far []conn
			for range clients {
				near = append(near, client(t, n, a.Addr()))
				c, err := a.Accept()
				if err != nil {
					t.Fatal(err)
				}
				far = append(far, c.(conn))
			}
			a.transport().SetLatency(time.Second)
			a.transport().SetBuffer(1 << 10)
			want := randomBytes(3000)
			for i := range clients {
				far[i].CloseWrite()
				near[i].Write(want)
				near[i].Close()
			}
			a.Close()
			sleepUntil(start, 5*time.Second)
			if s := r.service(t); len(s.Clients) != 0 || !s.Draining { // and the session has only to be finished
				t.Errorf("the service is %+v", s)
			}
			for i, c := range far {
				if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
					t.Errorf("from client %d the app read %d bytes, %v", i, len(got), err)
				}
				c.Close()
			}
			if took := time.Since(start); took < dead+20*time.Second {
				t.Errorf("all that took only %v", took)
			}
			<-a.Done()
			time.Sleep(2 * time.Second) // that is on its way
			synctest.Wait()
			if err := r.one(t, relay.EventEnded).Err; err != nil {
				t.Errorf("ended by %v", err)
			}
		})
	})
}

// A freeze that is over in time is not noticed but by the clock.
func TestShortFreeze(t *testing.T) {
	ofSessions(t)
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n)
		start := time.Now()
		a := roam(t, n, relay.WithName("web"))
		addr := a.Addr()
		idle := client(t, n, addr)
		echoes(t, idle)
		a.transport().SetLatency(100 * time.Millisecond)
		a.transport().SetBuffer(1 << 10) // so that a visit takes 40 s when nothing is frozen
		visited := make(chan error, 2)
		for _, at := range []time.Duration{0, 3 * time.Second} {
			go func() {
				sleepUntil(start, at)
				visited <- visit(n, addr)
			}()
		}
		for _, at := range []time.Duration{5 * time.Second, 40 * time.Second} {
			sleepUntil(start, at)
			a.transport().Freeze()
			sleepUntil(start, at+29*time.Second)
			a.transport().Thaw()
		}
		for range 2 {
			if err := <-visited; err != nil {
				t.Error(err)
			}
		}
		if took := time.Since(start); took < 69*time.Second {
			t.Errorf("they took only %v", took)
		}
		echoes(t, idle)
		sleepUntil(start, 5*time.Minute)
		a.expectAccepting(t)
		r.expect(t, "web", addr.String(), relay.EventRegistered)
		a.expect(t, "web", addr.String(), relay.EventRegistered)
	})
}

// A stranger who comes while the app cannot answer does not have it taken for dead: who
// is connected goes on after a freeze that is shorter than the dead time.
func TestFrozenWhenStrangersCome(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n)
		a := roam(t, n, relay.WithHeartbeat(200*time.Millisecond, 20*time.Second))
		c := client(t, n, a.Addr())
		echoes(t, c)
		a.transport().Freeze()
		for range 5 {
			time.Sleep(3 * time.Second)
			stranger := client(t, n, a.Addr())
			defer stranger.Close()
		}
		time.Sleep(time.Second / 2)
		a.transport().Thaw()
		echoes(t, c)
		synctest.Wait()
		if got := r.sessions(); len(got) != 1 {
			t.Errorf("events %+v", got)
		}
		if s := r.service(t); len(s.Clients) != 1+4 || s.Refused != 1 || r.Refusals()["waited"] != 1 { // the first had ten seconds
			t.Errorf("the service is %+v", s)
		}
	})
}
