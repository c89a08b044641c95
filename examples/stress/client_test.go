package main

import (
	"context"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A pipe is an in-memory connection, for tests in which time is not real.
type pipe struct{ net.Conn }

func (p pipe) CloseWrite() error { panic("a pipe cannot be half-closed") }

// pipesTo returns params of round trips of 8 bytes whose clients are connected to serve.
func pipesTo(serve func(net.Conn)) *params {
	p := &params{mode: roundTrips, clients: 1, size: 8, time: time.Hour, timeout: time.Hour, pause: 250 * time.Millisecond}
	p.dial = func(context.Context) (conn, error) {
		client, server := net.Pipe()
		go func() {
			defer server.Close()
			serve(server)
		}()
		return pipe{client}, nil
	}
	return p
}

// stallAt sends messages of 8 bytes back, and takes d for the nth.
func stallAt(n int, d time.Duration) func(net.Conn) {
	return func(c net.Conn) {
		b := make([]byte, 8)
		for i := 0; ; i++ {
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			if i == n {
				time.Sleep(d)
			}
			c.Write(b)
		}
	}
}

// TestStallIsNotHidden has a service that is asked ten times a second stall for one. Each
// message that was due in that second is late by what was left of it.
func TestStallIsNotHidden(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipesTo(stallAt(5, time.Second))
		p.rate = 10
		p.time = 2050 * time.Millisecond
		r := run(t.Context(), p, &progress{w: io.Discard, mode: p.mode})
		// Of 21 messages those that were due at 0.5, 0.6, ... 1.4 s.
		want := latencies{Count: 21, Mean: 5.5e6 / 21, P90: 0.8e6, P99: 1e6, P999: 1e6, Max: 1e6}
		got := r.Latency
		if d := got.P90/want.P90 - 1; d < -0.005 || d > 0.005 {
			t.Errorf("p90 is %v", got.P90)
		}
		if d := got.Mean - want.Mean; d < -0.001 || d > 0.001 {
			t.Errorf("the mean is %v, not %v", got.Mean, want.Mean)
		}
		got.P90, got.Mean = want.P90, want.Mean
		if got != want {
			t.Errorf("%+v, not %+v", got, want)
		}
		if r.Totals.Unsent != 0 || r.Elapsed != 2.05 || r.Interrupted {
			t.Errorf("unsent %d, in %v s, interrupted: %v", r.Totals.Unsent, r.Elapsed, r.Interrupted)
		}
		// The rest after the second second is part of it.
		var per []int64
		for _, s := range r.Series {
			per = append(per, s.Messages)
		}
		if len(per) != 2 || per[0] != 5 || per[1] != 16 || r.Series[1].To != 2.05 {
			t.Errorf("the series is %+v", r.Series)
		}
	})
}

// TestStallUntilTheEnd awaits the message that is under way, and counts those that it has
// kept from being sent.
func TestStallUntilTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipesTo(stallAt(5, 10*time.Second))
		p.rate = 10
		p.time = 2050 * time.Millisecond
		r := run(t.Context(), p, &progress{w: io.Discard, mode: p.mode})
		if r.Totals.Messages != 6 || r.Totals.Unsent != 15 || r.Latency.Max != 10e6 || r.Elapsed != 10.5 {
			t.Errorf("%+v, %+v, in %v s", r.Totals, r.Latency, r.Elapsed)
		}
		if text := textOf(t, r); !strings.Contains(text, "unsent       15 ") {
			t.Errorf("unsent messages are not told:\n%s", text)
		}
	})
}

// TestWithoutRate has clients send as soon as they can, so that a stall is one message.
func TestWithoutRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipesTo(func(c net.Conn) {
			b := make([]byte, 8)
			for {
				if _, err := io.ReadFull(c, b); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
				c.Write(b)
			}
		})
		p.time = 950 * time.Millisecond
		r := run(t.Context(), p, &progress{w: io.Discard, mode: p.mode})
		if r.Totals.Messages != 10 || r.Latency.Min != 100e3 || r.Latency.Max != 100e3 || r.Totals.Unsent != 0 || r.Elapsed != 1 {
			t.Errorf("%+v, %+v, in %v s", r.Totals, r.Latency, r.Elapsed)
		}
	})
}

// TestRampAndPhase notes when clients connect and when they send.
func TestRampAndPhase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var mu sync.Mutex
		var dials, messages []time.Duration
		p := pipesTo(func(c net.Conn) {
			mu.Lock()
			dials = append(dials, time.Since(start))
			mu.Unlock()
			b := make([]byte, 8)
			for {
				if _, err := io.ReadFull(c, b); err != nil {
					return
				}
				mu.Lock()
				messages = append(messages, time.Since(start))
				mu.Unlock()
				c.Write(b)
			}
		})
		p.clients, p.rate, p.ramp, p.time = 4, 0.1, 2*time.Second, 12*time.Second
		run(t.Context(), p, &progress{w: io.Discard, mode: p.mode})
		ms := time.Millisecond
		// A client begins half a second after the last, and then takes its turn within ten.
		if want := []time.Duration{0, 500 * ms, 1000 * ms, 1500 * ms}; !slices.Equal(dials, want) {
			t.Errorf("connected at %v, not %v", dials, want)
		}
		if want := []time.Duration{0, 3000 * ms, 6000 * ms, 9000 * ms, 10_000 * ms}; !slices.Equal(messages, want) {
			t.Errorf("sent at %v, not %v", messages, want)
		}
	})
}

// TestComesBack loses its service for some time: the messages that were due then are late,
// but for those that have failed.
func TestComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipesTo(stallAt(-1, 0))
		start := time.Now()
		up := p.dial
		p.dial = func(ctx context.Context) (conn, error) {
			switch now := time.Since(start); {
			case now < time.Second:
				c, err := up(ctx)
				time.AfterFunc(1010*time.Millisecond-now, func() { c.Close() })
				return c, err
			case now < 2*time.Second:
				return nil, io.ErrClosedPipe
			}
			return up(ctx)
		}
		p.rate = 10
		p.time = 3050 * time.Millisecond
		r := run(t.Context(), p, &progress{w: io.Discard, mode: p.mode})
		// The message of 1.1 s fails, and the client tries again at 1.35 s and so on to
		// 2.1 s. Those of 1.2 to 2 s are sent then.
		if r.Totals.Errors != 4 || r.Totals.Messages != 30 || r.Totals.Connections != 2 || r.Totals.Unsent != 0 {
			t.Errorf("%+v, %+v", r.Totals, r.Errors)
		}
		if r.Latency.Max != 0.9e6 {
			t.Errorf("%+v", r.Latency)
		}
	})
}

// TestMessageThatNoBufferHolds has a service that cannot take a message before its echo is
// read, since there are no buffers in between.
func TestMessageThatNoBufferHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipesTo(func(c net.Conn) { io.Copy(c, c) })
		p.size = 100_000
		p.rate = 1
		p.time = 2500 * time.Millisecond
		r := run(t.Context(), p, &progress{w: io.Discard, mode: p.mode})
		if r.Totals.Messages != 3 || r.Totals.Bytes != 300_000 || r.Totals.Errors != 0 {
			t.Errorf("%+v, %+v", r.Totals, r.Errors)
		}
	})
}

// TestConnectedClients has the samples tell how many clients are connected.
func TestConnectedClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipesTo(stallAt(-1, 0))
		p.clients, p.rate, p.ramp, p.time = 4, 100, 3999*time.Millisecond, 5500*time.Millisecond
		r := run(t.Context(), p, &progress{w: io.Discard, mode: p.mode})
		var per []int64
		for _, s := range r.Series {
			per = append(per, s.Clients)
		}
		if want := []int64{2, 3, 4, 4, 4, 0}; !slices.Equal(per, want) {
			t.Errorf("clients %v, not %v", per, want)
		}
	})
}

// TestInflight has a service that answers nothing but reads count what a client of bulk
// has under way.
func TestInflight(t *testing.T) {
	t.Parallel()
	const size, inflight = 1000, 5
	read := make(chan int64, 1)
	var first sync.Once
	p := paramsFor(directly(t, func(c conn) {
		first.Do(func() {
			n, _ := io.Copy(io.Discard, c)
			read <- n
		})
	}), bulk)
	p.size, p.inflight, p.timeout = size, inflight, 200*time.Millisecond
	if r := runUntilFailed(t, p); r.Errors.ByKind["timeout"] == 0 {
		t.Errorf("%+v", r.Errors)
	}
	if n := <-read; n > size*inflight {
		t.Errorf("%d bytes were under way, of %d at most", n, size*inflight)
	}
}
