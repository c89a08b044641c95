package relay_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
)

// An end is what a memnet.Conn and a conn have in common.
type end interface {
	net.Conn
	CloseWrite() error
	SetLinger(int) error
}

// A counter counts what is read of a connection.
type counter struct{ n atomic.Int64 }

func count(r io.Reader) *counter {
	c := new(counter)
	go func() {
		b := make([]byte, 32<<10)
		for {
			n, err := r.Read(b)
			c.n.Add(int64(n))
			if err != nil {
				return
			}
		}
	}()
	return c
}

// Rates bound what moves, in each direction for itself: no more than the rate and a
// burst, and no less. The clients of a service share its rate evenly; others are not
// slowed.
func TestRates(t *testing.T) {
	const rate, burst, clients = 100_000, 100_000 / 4, 3
	for _, tt := range []struct {
		name          string
		server, grant relay.Limits
		shared        bool // by all clients
	}{
		{"service", relay.Limits{BytesPerSecond: rate}, relay.Limits{}, true},
		{"service of an identity", relay.Limits{BytesPerSecond: 2 * rate}, relay.Limits{BytesPerSecond: rate}, true},
		{"client", relay.Limits{ClientBytesPerSecond: rate}, relay.Limits{}, false},
		{"client of an identity", relay.Limits{ClientBytesPerSecond: 2 * rate}, relay.Limits{ClientBytesPerSecond: rate}, false},
		{"service more than client", relay.Limits{BytesPerSecond: rate, ClientBytesPerSecond: 2 * rate}, relay.Limits{}, true},
		{"client more than service", relay.Limits{BytesPerSecond: 4 * rate, ClientBytesPerSecond: rate}, relay.Limits{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			onStage(t, func(t *testing.T, s *stage) {
				a, other := s.register("limited"), s.registerEcho("other")
				start := time.Now()
				var in, out [clients]*counter
				for i := range clients {
					client, app := s.pair(a)
					in[i], out[i] = count(app), count(client)
					go io.Copy(client, onlyReader{zeroes{}})
					go io.Copy(app, onlyReader{zeroes{}})
				}
				for _, seconds := range []int64{1, 10, 30} {
					time.Sleep(time.Until(start.Add(time.Duration(seconds) * time.Second)))
					synctest.Wait()
					least, most := rate*seconds, rate*seconds+burst
					for direction, counters := range map[string][clients]*counter{"in": in, "out": out} {
						var sum int64
						for _, c := range counters {
							n := c.n.Load()
							sum += n
							if !tt.shared && (n < least || n > most) || tt.shared && n < least/clients*3/4 {
								t.Errorf("after %d s a client has moved %d bytes %s", seconds, n, direction)
							}
						}
						if tt.shared && (sum < least || sum > most) {
							t.Errorf("after %d s all have moved %d bytes %s", seconds, sum, direction)
						}
					}
					before := time.Now()
					c := s.client(other)
					go c.Write(make([]byte, burst))
					if _, err := io.ReadFull(c, make([]byte, burst)); err != nil || time.Since(before) != 0 {
						t.Errorf("another service's client had to wait for %v, %v", time.Since(before), err)
					}
					c.Close()
				}
				s.expectRefusals(map[string]int64{})
			}, relay.WithLimits(tt.server), identify(tt.grant))
		})
	}
}

// A conn that is held back by a rate ends like any other.
func TestHeldBack(t *testing.T) {
	ofSessions(t)
	const rate, burst, size = 10_000, 4 << 10, 100_000
	const all = time.Second * (size - burst) / rate // how long it takes
	const early = 3 * time.Second
	// expect checks an end and when it came.
	expect := func(s *stage, what string, start time.Time, want time.Duration, n, wantN int64, err, wantErr error) {
		s.Helper()
		took := time.Since(start)
		if took != want || n != wantN && wantN >= 0 || !errors.Is(err, wantErr) {
			s.Errorf("%s ended after %v with %d bytes, %v; want %v, %d, %v", what, took, n, err, want, wantN, wantErr)
		}
	}
	for _, tt := range []struct {
		name string
		f    func(s *stage, client, app end)
	}{
		{"half-closes", func(s *stage, client, app end) {
			for _, d := range []struct{ from, to end }{{client, app}, {app, client}} {
				start := time.Now()
				go func() {
					d.from.Write(make([]byte, size))
					d.from.CloseWrite()
				}()
				n, err := io.Copy(io.Discard, d.to)
				expect(s, "a transfer", start, all, n, size, err, nil)
			}
		}},
		{"app closes", func(s *stage, client, app end) {
			start := time.Now()
			app.Write(make([]byte, size))
			app.Close()
			n, err := io.Copy(io.Discard, client)
			expect(s, "the client", start, all, n, size, err, nil)
		}},
		{"app resets", func(s *stage, client, app end) {
			start := time.Now()
			app.Write(make([]byte, size))
			time.AfterFunc(early, func() { app.SetLinger(0); app.Close() })
			n, err := io.Copy(io.Discard, client)
			expect(s, "the client", start, early, n, -1, err, syscall.ECONNRESET)
		}},
		{"client resets what it gets", func(s *stage, client, app end) {
			start := time.Now()
			go io.Copy(app, onlyReader{zeroes{}})
			time.AfterFunc(early, func() { client.SetLinger(0); client.Close() })
			n, err := io.Copy(io.Discard, app)
			expect(s, "the app", start, early, n, 0, err, syscall.ECONNRESET)
		}},
		{"client resets what it sends", func(s *stage, client, app end) {
			start := time.Now()
			client.Write(make([]byte, 50_000))
			client.SetLinger(0)
			client.Close()
			n, err := io.Copy(io.Discard, app)
			// The reset stands behind the bytes, as on any socket.
			expect(s, "the app", start, time.Second*(50_000-burst)/rate, n, 50_000, err, syscall.ECONNRESET)
		}},
		{"Close", func(s *stage, client, app end) {
			start := time.Now()
			wrote := make(chan error, 1)
			go func() {
				_, err := io.Copy(client, onlyReader{zeroes{}})
				wrote <- err
			}()
			go io.Copy(app, onlyReader{zeroes{}})
			time.AfterFunc(early, func() {
				s.srv.Close()
				expect(s, "Close", start, early, 0, 0, nil, nil)
			})
			n, err := io.Copy(io.Discard, client)
			if err == nil {
				err = <-wrote // a reset is told once
			}
			expect(s, "the client", start, early, n, -1, err, syscall.ECONNRESET)
			n, err = io.Copy(io.Discard, onlyReader{app})
			if err == nil {
				s.Errorf("the app reads %d bytes and a clean end", n)
			}
		}},
		{"Shutdown", func(s *stage, client, app end) {
			start := time.Now()
			app.Write(make([]byte, size))
			app.Close()
			done := make(chan error, 1)
			time.AfterFunc(early, func() {
				done <- s.srv.Shutdown(context.Background())
				expect(s, "Shutdown", start, all, 0, 0, nil, nil)
			})
			n, err := io.Copy(io.Discard, client)
			expect(s, "the client", start, all, n, size, err, nil)
			client.Close()
			if err := within(s, "Shutdown's return", done); err != nil {
				s.Errorf("Shutdown: %v", err)
			}
		}},
		{"Shutdown that is cut short", func(s *stage, client, app end) {
			start := time.Now()
			app.Write(make([]byte, size))
			app.Close()
			done := make(chan error, 1)
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), early)
				defer cancel()
				done <- s.srv.Shutdown(ctx)
				expect(s, "Shutdown", start, early, 0, 0, nil, nil)
			}()
			n, err := io.Copy(io.Discard, client)
			expect(s, "the client", start, early, n, -1, err, syscall.ECONNRESET)
			if err := within(s, "Shutdown's return", done); !errors.Is(err, context.DeadlineExceeded) {
				s.Errorf("Shutdown: %v", err)
			}
		}},
	} {
		for what, limits := range map[string]relay.Limits{
			"service": {BytesPerSecond: rate}, "client": {ClientBytesPerSecond: rate},
		} {
			t.Run(tt.name+" "+what, func(t *testing.T) {
				onStage(t, func(t *testing.T, s *stage) {
					client, app := s.pair(s.register("a"))
					tt.f(s, client, app)
					s.expectRefusals(map[string]int64{})
				}, relay.WithLimits(limits))
			})
		}
	}
}

// Who is held back by a rate is not cut off for it, however low that is.
func TestHeldBackIsNotStalled(t *testing.T) {
	for _, limits := range []relay.Limits{
		{ClientBytesPerSecond: 400, IdleTime: time.Minute},
		{BytesPerSecond: 4000, StallTime: 30 * time.Second},
	} {
		onStage(t, func(t *testing.T, s *stage) {
			a := s.register("a")
			var clients sync.WaitGroup
			for range 5 {
				client, app := s.pair(a)
				go func() {
					app.Write(make([]byte, 500_000))
					app.Close()
				}()
				clients.Go(func() {
					if n, err := io.Copy(io.Discard, client); n != 500_000 || err != nil {
						t.Errorf("%d bytes, %v: %v", n, err, s.srv.Refusals())
					}
				})
			}
			clients.Wait()
			s.expectRefusals(map[string]int64{})
		}, relay.WithLimits(limits))
	}
}

// Clients that wait for their rate, however long, are not taken for stalled or idle.
func TestRateIsNotStalling(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		const clients, size = 300, 200 << 10
		a := s.register("a")
		go func() {
			for {
				c, err := a.Accept()
				if err != nil {
					return
				}
				go func() {
					c.Write(make([]byte, size))
					c.Close()
				}()
			}
		}()
		result := make(chan error, clients)
		for range clients {
			c := s.client(a)
			go func() {
				n, err := io.Copy(io.Discard, c)
				if err == nil && n != size {
					err = fmt.Errorf("%d bytes", n)
				}
				result <- err
			}()
		}
		for range clients {
			if err := <-result; err != nil {
				t.Errorf("a client: %v", err)
			}
		}
		s.expectRefusals(map[string]int64{})
	}, relay.WithLimits(relay.Limits{BytesPerSecond: 1 << 20, StallTime: 5 * time.Second, IdleTime: 5 * time.Second}))
}
