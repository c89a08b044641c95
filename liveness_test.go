package relay_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/pulse"
	"github.com/tcprelay/relay/internal/wire"
)

// A puppet is one end of a session, relay or app, that says what the test has it say.
// It answers pings if it is to.
type puppet struct {
	*mux.Session
	control *mux.Stream
	answers bool
	start   time.Time

	mu    sync.Mutex
	pings []time.Duration // when they came
}

func (p *puppet) listen(lines *wire.Reader) {
	for {
		var c wire.Control
		if lines.Read(&c) != nil {
			return
		}
		if c.Type != wire.Ping {
			continue
		}
		p.mu.Lock()
		p.pings = append(p.pings, time.Since(p.start))
		p.mu.Unlock()
		if p.answers {
			p.say(wire.Control{Type: wire.Pong, ID: c.ID})
		}
	}
}

func (p *puppet) say(c wire.Control) {
	line, err := wire.Line(c)
	if err == nil {
		p.control.Write(line)
	}
}

// pinged returns when pings came since the last call.
func (p *puppet) pinged() (pings []time.Duration) {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	pings, p.pings = p.pings, nil
	return pings
}

func seconds(all ...int) (ds []time.Duration) {
	for _, s := range all {
		ds = append(ds, time.Duration(s)*time.Second)
	}
	return ds
}

// onBothSides runs f with a puppet that is a relay's app, and with one that is an app's
// relay. Lost tells when the true side lost it, if it did.
func onBothSides(t *testing.T, answers bool, f func(t *testing.T, p *puppet, lost func() []relay.Event)) {
	t.Run("the relay", func(t *testing.T) {
		inMemory(t, func(t *testing.T, n *memnet.Network) {
			r := startOn(t, n)
			start := time.Now()
			raw := mustKnock(t, n, wire.Hello{})
			p := &puppet{Session: raw.Session, control: raw.control, answers: answers, start: start}
			go p.listen(raw.lines)
			f(t, p, func() []relay.Event { return r.of(relay.EventLost) })
			raw.Session.Close()
		})
	})
	t.Run("the app", func(t *testing.T) {
		inMemory(t, func(t *testing.T, n *memnet.Network) {
			ln, err := n.Listen(t.Context(), "tcp", relayAddr)
			if err != nil {
				t.Fatal(err)
			}
			puppets := make(chan *puppet)
			go func() {
				defer close(puppets)
				c, err := ln.Accept()
				if err != nil {
					return
				}
				p := &puppet{Session: mux.Server(c, mux.Config{}), answers: answers, start: time.Now()}
				p.EnableStop()
				lines := wire.NewReader(nil)
				if p.control, err = p.Accept(); err == nil {
					lines = wire.NewReader(p.control)
					err = lines.Read(&wire.Hello{})
				}
				if err != nil {
					t.Errorf("the app's hello: %v", err)
					return
				}
				io.WriteString(p.control, `{"version":1,"address":"10.0.0.1:9000"}`+"\n")
				go p.listen(lines)
				puppets <- p
			}()
			var events diary
			l := register(t, relayAddr, relay.WithDialer(n.Dial), relay.WithEvents(events.note))
			p := <-puppets
			ln.Close()
			f(t, p, func() []relay.Event { return events.of(relay.EventLost) })
			l.Close()
			p.Session.Close()
		})
	})
}

// A ping goes out at once, to see how far away the other side is; later ones are for the
// times when nothing else is heard, or sent.
func TestPings(t *testing.T) {
	t.Run("silence", func(t *testing.T) {
		onBothSides(t, false, func(t *testing.T, p *puppet, lost func() []relay.Event) {
			sleepUntil(p.start, 30*time.Second-1)
			if got := p.pinged(); !slices.Equal(got, seconds(0, 10, 20)) || len(lost()) != 0 {
				t.Errorf("pinged at %v, lost %v", got, lost())
			}
			sleepUntil(p.start, time.Minute)
			if got := p.pinged(); len(got) != 0 {
				t.Errorf("pinged at %v", got)
			}
			if l := lost(); len(l) != 1 || l[0].Time.Sub(p.start) != 30*time.Second || !errors.Is(l[0].Err, pulse.ErrSilent) {
				t.Errorf("lost %v", l)
			}
		})
	})
	t.Run("answers", func(t *testing.T) {
		onBothSides(t, true, func(t *testing.T, p *puppet, lost func() []relay.Event) {
			sleepUntil(p.start, time.Minute)
			if got := p.pinged(); !slices.Equal(got, seconds(0, 10, 20, 30, 40, 50, 60)) || len(lost()) != 0 {
				t.Errorf("pinged at %v, lost %v", got, lost())
			}
		})
	})
	t.Run("the peer pings", func(t *testing.T) {
		onBothSides(t, true, func(t *testing.T, p *puppet, lost func() []relay.Event) {
			for i := range 20 {
				sleepUntil(p.start, time.Duration(i+1)*9*time.Second)
				p.say(wire.Control{Type: wire.Ping, ID: int64(i)})
			}
			if got := p.pinged(); !slices.Equal(got, seconds(0)) || len(lost()) != 0 { // its answers are enough
				t.Errorf("pinged at %v, lost %v", got, lost())
			}
			sleepUntil(p.start, 191*time.Second)
			if got := p.pinged(); !slices.Equal(got, seconds(190)) {
				t.Errorf("pinged at %v", got)
			}
		})
	})
	t.Run("the peer talks", func(t *testing.T) {
		onBothSides(t, false, func(t *testing.T, p *puppet, lost func() []relay.Event) {
			for i := range 20 {
				sleepUntil(p.start, time.Duration(i+1)*9*time.Second+time.Millisecond)
				p.say(wire.Control{Type: "of the future"})
			}
			// It is heard, and hears something too, as it may need to.
			if got := p.pinged(); !slices.Equal(got[:4], seconds(0, 10, 20, 30)) || len(lost()) != 0 {
				t.Errorf("pinged at %v, lost %v", got, lost())
			}
		})
	})
}

// No ping is sent while clients' bytes go both ways, and one is as soon as they do so
// only one way for the interval.
func TestPingsAndTraffic(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n)
		start := time.Now()
		raw := mustKnock(t, n, wire.Hello{})
		p := &puppet{Session: raw.Session, control: raw.control, answers: true, start: start}
		go p.listen(raw.lines)
		addr, err := net.ResolveTCPAddr("tcp", raw.reply.Address)
		if err != nil {
			t.Fatal(err)
		}
		c := client(t, n, addr)
		st, err := p.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(st, make([]byte, len(wire.AppendProxy(nil, c.LocalAddr(), addr)))); err != nil {
			t.Fatal(err)
		}
		for i := range 100 { // one of them each 4 s
			sleepUntil(start, time.Duration(4*(i+1))*time.Second)
			if i%2 == 0 {
				c.Write([]byte{1})
				expectByte(t, st, 1)
			} else {
				st.Write([]byte{2})
				expectByte(t, c, 2)
			}
		}
		if got := p.pinged(); !slices.Equal(got, seconds(0)) {
			t.Errorf("pinged at %v", got)
		}
		// Only to the app from now on, which said the last at 400 s.
		for i := range 5 {
			sleepUntil(start, time.Duration(404+4*i)*time.Second)
			c.Write([]byte{3})
			expectByte(t, st, 3)
		}
		if got := p.pinged(); !slices.Equal(got, seconds(410, 420)) {
			t.Errorf("pinged at %v", got)
		}
		// Only to the client.
		for i := range 5 {
			sleepUntil(start, time.Duration(424+4*i)*time.Second)
			st.Write([]byte{4})
			expectByte(t, c, 4)
		}
		if got := p.pinged(); !slices.Equal(got, seconds(430, 440)) {
			t.Errorf("pinged at %v", got)
		}
		if lost := r.of(relay.EventLost); len(lost) != 0 {
			t.Errorf("lost: %+v", lost)
		}
		st.Close()
	})
}

// A bulk is clients of an app, who all send what they can, or are sent what the app can.
type bulk struct {
	toApp, toClients atomic.Int64  // bytes that arrived
	failed           chan error    // the end of each of their directions
	gone             chan struct{} // closed after that of the last
}

// startBulk connects clients. L must have no Accept of its own meanwhile.
func startBulk(t testing.TB, n *memnet.Network, l *relay.Listener, clients int, up, down bool) *bulk {
	t.Helper()
	w := &bulk{failed: make(chan error, 4*clients), gone: make(chan struct{})}
	var all sync.WaitGroup
	carry := func(c net.Conn, sends bool, arrived *atomic.Int64) {
		c.SetDeadline(time.Time{})
		if sends {
			all.Go(func() {
				_, err := io.Copy(c, onlyReader{zeroes{}})
				w.failed <- err
			})
		}
		all.Go(func() {
			_, err := io.Copy(writerFunc(func(b []byte) (int, error) {
				arrived.Add(int64(len(b)))
				return len(b), nil
			}), onlyReader{c})
			w.failed <- err
		})
	}
	var near, far []net.Conn
	for range clients {
		near = append(near, client(t, n, l.Addr()))
		a, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		far = append(far, a)
	}
	for i := range clients {
		carry(near[i], up, &w.toClients)
		carry(far[i], down, &w.toApp)
	}
	go func() {
		all.Wait()
		close(w.gone)
	}()
	return w
}

// However busy or slow a session is, it is not taken for dead.
func TestNeverFalselyDead(t *testing.T) {
	ofSessions(t)
	const long = 10 * time.Minute
	for _, link := range []struct {
		name    string
		latency time.Duration
		buffer  int // that crosses in it
		clients int
		beat    time.Duration
	}{
		{"busy", 50 * time.Millisecond, 8 << 10, 1, 10 * time.Second},
		{"busy with many clients", 100 * time.Millisecond, 8 << 10, 20, 10 * time.Second},
		{"slow", time.Second, 4 << 10, 2, 10 * time.Second},
		{"very slow", 4 * time.Second, 1 << 10, 3, 10 * time.Second},
		{"impatient", time.Second, 16 << 10, 2, time.Second},
	} {
		for _, way := range []struct {
			name     string
			up, down bool
		}{{"up", true, false}, {"down", false, true}, {"both", true, true}, {"idle", false, false}} {
			t.Run(link.name+"/"+way.name, func(t *testing.T) {
				inMemory(t, func(t *testing.T, n *memnet.Network) {
					beat := relay.WithHeartbeat(link.beat, 0)
					r := startOn(t, n, beat)
					start := time.Now()
					a := newRoamer(n)
					a.Listener = register(t, relayAddr, append(a.options(nil), beat)...)
					a.transport().SetLatency(link.latency)
					a.transport().SetBuffer(link.buffer)
					w := startBulk(t, n, a.Listener, link.clients, way.up, way.down)
					sleepUntil(start, long)
					for _, d := range []*diary{&r.diary, &a.diary} {
						if len(d.of(relay.EventLost)) != 0 || len(d.sessions()) != 1 {
							t.Errorf("events %+v", d.sessions())
						}
					}
					select {
					case err := <-w.failed:
						t.Errorf("a client failed: %v", err)
					default:
					}
					// It was busy all the time.
					least := int64(long/link.latency) * int64(link.buffer) * 9 / 10
					if got := w.toApp.Load(); way.up && got < least {
						t.Errorf("%d bytes up, want %d", got, least)
					}
					if got := w.toClients.Load(); way.down && got < least {
						t.Errorf("%d bytes down, want %d", got, least)
					}
					if !a.Stats().Connected || a.Stats().Live != link.clients {
						t.Errorf("the app's figures: %+v", a.Stats())
					}

					// And if it is dead, in the middle of that, it is found so.
					froze := time.Now()
					heard := r.service(t).Sessions[0].LastHeard
					if since := time.Since(heard); since > link.beat+link.latency {
						t.Errorf("last heard %v ago", since)
					}
					a.place("")
					a.transport().Freeze()
					<-w.gone
					sleepUntil(froze, time.Minute)
					expectAt(t, "the relay lost it", r.one(t, relay.EventLost).Time, heard, 3*link.beat)
					if took := a.one(t, relay.EventLost).Time.Sub(froze); took > 3*link.beat || took < 2*link.beat-link.latency {
						t.Errorf("the app lost it after %v", took)
					}
				})
			})
		}
	}
}

// A client that comes when the app was quiet waits for it to answer, and no longer; if
// it was heard of just before, not even for that. Who comes meanwhile waits for the same
// answer.
func TestQuietApp(t *testing.T) {
	ofSessions(t)
	const latency = 50 * time.Millisecond
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n)
		start := time.Now()
		a := newRoamer(n)
		a.Listener = register(t, relayAddr, a.options(nil)...)
		a.transport().SetLatency(latency)
		come := func(after, want time.Duration) {
			t.Helper()
			came := time.Now()
			c := client(t, n, a.Addr())
			served, err := a.Accept()
			if err != nil {
				t.Fatal(err)
			}
			expectAt(t, fmt.Sprintf("%v after the app was heard, a client is accepted", after), time.Now(), came, want)
			c.Close()
			served.Close()
		}
		heard := func() time.Time {
			synctest.Wait()
			return r.service(t).Sessions[0].LastHeard
		}
		sleepUntil(start, 5*time.Second)
		come(5*time.Second, 3*latency) // there, back, and there again
		for _, tt := range []struct{ after, want time.Duration }{
			{time.Second, latency},
			{time.Second + 1, 3 * latency},
			{3 * time.Second, 3 * latency},
			{9 * time.Second, 3 * latency},
		} {
			time.Sleep(time.Second / 2) // until all is said of the last one
			last := heard()
			sleepUntil(last, tt.after)
			come(tt.after, tt.want)
		}
		if s := r.service(t); s.Refused != 0 || s.Waiting != 0 {
			t.Errorf("the service is %+v", s)
		}
	})
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n)
		start := time.Now()
		raw := mustKnock(t, n, wire.Hello{})
		p := &puppet{Session: raw.Session, control: raw.control, start: start}
		go p.listen(raw.lines)
		addr, err := net.ResolveTCPAddr("tcp", raw.reply.Address)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 10 {
			sleepUntil(start, 5*time.Second+time.Duration(i)*time.Second/10)
			client(t, n, addr)
		}
		synctest.Wait()
		if got := p.pinged(); !slices.Equal(got, seconds(0, 5)) {
			t.Errorf("pinged at %v", got)
		}
		p.say(wire.Control{Type: wire.Pong, ID: 1})
		for range 10 {
			if _, err := p.Accept(); err != nil {
				t.Fatal(err)
			}
		}
		expectAt(t, "all are given to the app", time.Now(), start, 5900*time.Millisecond)
		synctest.Wait()
		if s := r.service(t); s.Accepted != 10 || s.Waiting != 0 {
			t.Errorf("the service is %+v", s)
		}
	})
}

// An app whose answer is held up, by what its link can carry, gets its clients all the
// same.
func TestNewClientsOfBusyApp(t *testing.T) {
	ofSessions(t)
	for _, way := range []struct {
		name     string
		up, down bool
	}{{"up", true, false}, {"down", false, true}, {"both", true, true}} {
		t.Run(way.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n)
				start := time.Now()
				a := newRoamer(n)
				a.Listener = register(t, relayAddr, a.options(nil)...)
				a.transport().SetLatency(time.Second)
				a.transport().SetBuffer(4 << 10) // takes a minute for the window of a client
				w := startBulk(t, n, a.Listener, 2, way.up, way.down)
				go func() {
					for {
						if _, err := a.Accept(); err != nil {
							return
						}
					}
				}()
				for i := range 20 {
					sleepUntil(start, 2*time.Minute+time.Duration(i)*7*time.Second)
					client(t, n, a.Addr())
				}
				sleepUntil(start, 5*time.Minute)
				if s := r.service(t); s.Accepted != 22 || s.Refused != 0 || len(r.of(relay.EventLost)) != 0 {
					t.Errorf("%d clients are with the app, %v refused; %d losses", s.Accepted, s.Refusals, len(r.of(relay.EventLost)))
				}
				a.place("")
				a.transport().Cut()
				<-w.gone
			})
		})
	}
}

// Services tell when an app was last heard, and how long its answer took.
func TestRoundTrip(t *testing.T) {
	ofSessions(t)
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		const latency = 30 * time.Millisecond
		r := startOn(t, n)
		start := time.Now()
		a := roam(t, n)
		synctest.Wait() // what is asked at once is answered at once
		a.transport().SetLatency(latency)
		expect := func(at, rtt, heard time.Duration) {
			t.Helper()
			sleepUntil(start, at)
			s := r.service(t).Sessions[0]
			if s.RoundTrip != rtt || s.LastHeard.Sub(start) != heard || !s.Since.Equal(start) {
				t.Errorf("after %v: round trip %v, heard after %v; want %v and %v", at, s.RoundTrip, s.LastHeard.Sub(start), rtt, heard)
			}
		}
		second := time.Second
		expect(10*second, 0, 0)
		expect(10*second+latency, 0, 10*second+latency) // the app's ping
		expect(11*second, 2*latency, 10*second+2*latency)
		c := client(t, n, a.Addr())
		echoes(t, c)
		expectAt(t, "the echo", time.Now(), start, 11*second+2*latency)
		expect(12*second, 2*latency, 11*second+2*latency)
		a.transport().SetLatency(4 * latency)
		expect(22*second, 8*latency, 21*second+8*latency)
	})
}

// A heartbeat that cannot work is an error, and what each side may choose works with
// what the other has chosen.
func TestWithHeartbeat(t *testing.T) {
	type beat struct{ interval, dead time.Duration }
	for _, b := range []beat{
		{10 * time.Second, 10 * time.Second}, {0, 9 * time.Second}, {time.Minute, time.Second}, {1, 1},
	} {
		if _, err := relay.NewServer(relay.WithHeartbeat(b.interval, b.dead)); err == nil {
			t.Errorf("WithHeartbeat(%v, %v) is right for a server", b.interval, b.dead)
		}
		_, err := signUp(t.Context(), "nowhere", relay.WithHeartbeat(b.interval, b.dead))
		if _, tried := errors.AsType[*relay.RegisterError](err); err == nil || tried {
			t.Errorf("WithHeartbeat(%v, %v) is right for an app: %v", b.interval, b.dead, err)
		}
	}
	good := []beat{
		{}, {time.Second, 0}, {0, 11 * time.Second}, {time.Hour, 0}, {-1, -1}, {-1, 0}, {0, -1},
		{time.Second / 2, 2 * time.Second}, {time.Minute, 90 * time.Second},
	}
	for _, ofRelay := range good {
		for _, ofApp := range good {
			if ofRelay.interval < 0 && ofApp.interval < 0 {
				continue // nobody pings
			}
			t.Run(fmt.Sprintf("%v-%v", ofRelay, ofApp), func(t *testing.T) {
				inMemory(t, func(t *testing.T, n *memnet.Network) {
					r := startOn(t, n, relay.WithHeartbeat(ofRelay.interval, ofRelay.dead))
					start := time.Now()
					a := roam(t, n, relay.WithHeartbeat(ofApp.interval, ofApp.dead))
					a.transport().SetLatency(50 * time.Millisecond)
					sleepUntil(start, 3*time.Minute)
					a.expectAccepting(t)
					if len(r.sessions()) != 1 || len(a.sessions()) != 1 {
						t.Errorf("events %+v and %+v", r.sessions(), a.sessions())
					}
				})
			})
		}
	}
}
