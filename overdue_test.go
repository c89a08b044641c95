package relay_test

import (
	"io"
	"maps"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// A client is reset when its time is over, not before, and not while it need not be.
func TestCutOff(t *testing.T) {
	exchange := func(s *stage, from, to end) {
		s.Helper()
		from.Write([]byte("x"))
		expectByte(s, to, 'x')
	}
	for _, tt := range []struct {
		kind   string
		name   string
		limits func(time.Duration) relay.Limits
		usual  time.Duration // the default; 0: none
		begin  func(s *stage, client *memnet.Conn, app conn)
		keep   func(s *stage, client *memnet.Conn, app conn) // what makes the time begin anew
		whole  string                                        // who had all that the other had to say
	}{
		{"idle", "idle", func(d time.Duration) relay.Limits { return relay.Limits{IdleTime: d} }, 0,
			func(s *stage, client *memnet.Conn, app conn) { exchange(s, client, app) },
			func(s *stage, client *memnet.Conn, app conn) { exchange(s, app, client) },
			"",
		},
		{"stalled", "stalled", func(d time.Duration) relay.Limits { return relay.Limits{StallTime: d} }, 5 * time.Minute,
			func(s *stage, client *memnet.Conn, app conn) {
				client.SetBuffer(2000)
				go app.Write(make([]byte, 1<<20))
			},
			func(s *stage, client *memnet.Conn, app conn) {
				if _, err := io.ReadFull(client, make([]byte, 5000)); err != nil { // more than a piece of the gauge
					s.Fatalf("a client that takes a little: %v", err)
				}
			},
			"",
		},
		{"lingered", "the client has half-closed", func(d time.Duration) relay.Limits { return relay.Limits{LingerTime: d} }, 5 * time.Minute,
			func(s *stage, client *memnet.Conn, app conn) { client.CloseWrite() },
			func(s *stage, client *memnet.Conn, app conn) { exchange(s, app, client) },
			"",
		},
		{"lingered", "the app has half-closed", func(d time.Duration) relay.Limits { return relay.Limits{LingerTime: d} }, 5 * time.Minute,
			func(s *stage, client *memnet.Conn, app conn) { app.CloseWrite() },
			func(s *stage, client *memnet.Conn, app conn) { exchange(s, client, app) },
			"client",
		},
	} {
		for _, by := range []struct {
			name          string
			server, grant relay.Limits
			want          time.Duration
		}{
			{"server", tt.limits(time.Minute), relay.Limits{}, time.Minute},
			{"identity", tt.limits(time.Hour), tt.limits(time.Minute), time.Minute},
			{"identity, longer", tt.limits(time.Minute), tt.limits(20 * time.Minute), 20 * time.Minute},
			{"default", relay.Limits{}, relay.Limits{}, tt.usual},
			{"none for an identity", tt.limits(time.Minute), tt.limits(-1), 0},
		} {
			t.Run(tt.name+" "+by.name, func(t *testing.T) {
				onStage(t, func(t *testing.T, s *stage) {
					a := s.register("limited")
					kept := by.want
					if kept == 0 {
						kept = 10 * time.Minute
					}
					cut := int64(0)
					// Whenever it begins, and however long nothing was amiss before.
					for _, wait := range []time.Duration{0, 7300 * time.Millisecond, 29900 * time.Millisecond, 10 * time.Minute} {
						client, app := s.pair(a)
						sendAndExpect(s, client, app)
						if tt.kind != "idle" {
							time.Sleep(wait)
						}
						tt.begin(s, client, app)
						for range 10 {
							time.Sleep(kept / 5)
							tt.keep(s, client, app)
						}
						s.expectRefusals(s.ofServices())
						start := time.Now()
						if by.want == 0 {
							time.Sleep(time.Hour)
							if tt.kind == "stalled" {
								client.SetBuffer(0)
							}
							tt.keep(s, client, app)
							s.expectRefusals(map[string]int64{})
							client.Close()
							app.Close()
							continue
						}
						ev := s.await(relay.EventClientLeft)
						took := ev.Time.Sub(start)
						if most := by.want + min(by.want/4, 30*time.Second); took < by.want || took > most {
							t.Errorf("cut off after %v, want %v, or up to %v", took, by.want, most)
						}
						if ev.Err == nil {
							t.Error("the event tells of an end in order")
						}
						synctest.Wait()
						for who, from := range map[string]end{"client": client, "app": app} {
							_, rerr := io.Copy(io.Discard, onlyReader{from})
							_, werr := from.Write([]byte("x"))
							whole := who == tt.whole
							if overDedicated && tt.name == "the client has half-closed" {
								whole = whole || who == "app" // a TCP reset takes no end back that came before
							}
							if (rerr == nil) != whole || rerr != nil && !isReset(rerr) || !isReset(werr) {
								t.Errorf("the %s reads to %v and writes to %v", who, rerr, werr)
							}
						}
						client.Close()
						app.Close()
						cut++
						want := map[string]int64{tt.kind: cut}
						s.expectRefusals(want)
						if got := s.ofServices(); !maps.Equal(got, want) {
							t.Errorf("services counted %v, want %v", got, want)
						}
						if e := s.log.with("client cut off"); len(e) == 0 || e[len(e)-1].attrs["kind"] != tt.kind {
							t.Errorf("logged %+v", e)
						}
					}
				}, relay.WithLimits(by.server), identify(by.grant))
			})
		}
	}
}

// Over TCP, where the system takes much for a slow client at once and then nothing for
// long, one who takes a little now and then is not taken for one who takes nothing.
func TestSlowOverTCP(t *testing.T) {
	srv, addr := startRelay(t, relay.WithLimits(relay.Limits{StallTime: 3 * time.Second}))
	l := register(t, addr)
	pair := func() *net.TCPConn {
		client := dial(t, l)
		client.SetReadBuffer(16 << 10)
		client.SetDeadline(time.Time{})
		app := accept(t, l)
		app.SetDeadline(time.Time{})
		go io.Copy(app, onlyReader{zeroes{}})
		return client
	}
	slow := pair()
	// Until the window that it had at first has come down to its buffer.
	if _, err := io.CopyN(io.Discard, slow, 1<<20); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var taken int64
	// As long as it takes to cut off two others, one after the other.
	for n := range int64(2) {
		pair()
		for srv.Refusals()["stalled"] == n {
			<-tick.C
			m, err := slow.Read(make([]byte, 1<<10))
			if taken += int64(m); err != nil {
				t.Fatalf("the slow client after %d bytes: %v", taken, err)
			}
		}
	}
	there := slices.ContainsFunc(srv.Services()[0].Clients, func(c relay.ClientInfo) bool {
		return c.Remote == slow.LocalAddr().String()
	})
	if n := srv.Refusals()["stalled"]; n != 2 || !there {
		t.Errorf("%d were cut off; the slow one, after %d bytes, is there: %t", n, taken, there)
	}
}
