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

// A pipe is an in-memory connection, for tests in which time is not real. It cannot be
// half-closed: it is closed.
type pipe struct{ net.Conn }

func (p pipe) CloseWrite() error { return p.Close() }

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
		if text := textOf(t, r); !strings.Contains(text, "unsent       15    of 21 that were due: slower than -rate\n") {
			t.Errorf("unsent messages are not told:\n%s", text)
		}
		// What came after the time does not count for what was done in it.
		if r.Span != 2.05 || r.Rates.Messages != perSecond(5, 2.05) || r.Rates.Bytes != perSecond(40, 2.05) || r.Rates.Connections != perSecond(1, 2.05) {
			t.Errorf("%+v in %v s", r.Rates, r.Span)
		}
	})
}

// TestLateService has messages be due that there is no connection for, from the start.
func TestLateService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, late := range []time.Duration{time.Second, time.Hour} {
			p := pipesTo(stallAt(-1, 0))
			up, start := p.dial, time.Now()
			p.dial = func(ctx context.Context) (conn, error) {
				if time.Since(start) < late {
					return nil, io.ErrClosedPipe
				}
				return up(ctx)
			}
			p.rate = 10
			p.time = 2050 * time.Millisecond
			r := run(t.Context(), p, &progress{w: io.Discard, mode: p.mode})
			if r.Totals.Due != 21 || r.Totals.Messages+r.Totals.Unsent != 21 || (r.Totals.Unsent == 0) != (late == time.Second) {
				t.Errorf("late by %v: %+v", late, r.Totals)
			}
			if late == time.Second && r.Latency.Max != 1e6 {
				t.Errorf("%+v", r.Latency)
			}
		}
	})
}

// TestInterruptWithRate has a signal end a run while a message is under way for long:
// nothing is due after the signal, nor counts for the rates.
func TestInterruptWithRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipesTo(stallAt(5, 10*time.Second))
		p.rate = 10
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(2050*time.Millisecond, cancel)
		r := run(ctx, p, &progress{w: io.Discard, mode: p.mode})
		if !r.Interrupted || r.Totals.Due != 21 || r.Totals.Unsent != 15 || r.Elapsed != 10.5 || r.Span != 2.05 || r.Rates.Messages != perSecond(5, 2.05) {
			t.Errorf("interrupted: %v, %+v, %+v in %v s of %v", r.Interrupted, r.Totals, r.Rates, r.Span, r.Elapsed)
		}
	})
}

// A closing takes a second to be closed, and can be half-closed, which its other side does
// not see.
type closing struct{ net.Conn }

func (c closing) CloseWrite() error { return nil }

func (c closing) Close() error {
	time.Sleep(time.Second)
	return c.Conn.Close()
}

// TestClosingIsNotMeasured has the latency of an exchange end with the end that it expects.
func TestClosingIsNotMeasured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipesTo(func(c net.Conn) { io.CopyN(c, c, 8) })
		p.mode = connections
		p.time = 500 * time.Millisecond
		up := p.dial
		p.dial = func(ctx context.Context) (conn, error) {
			time.Sleep(100 * time.Millisecond)
			c, err := up(ctx)
			return closing{c}, err
		}
		r := run(t.Context(), p, &progress{w: io.Discard, mode: p.mode})
		if r.Latency.Count != 1 || r.Latency.Max != 100e3 {
			t.Errorf("%+v, %+v", r.Latency, r.Errors)
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

// TestInflight has a service that answers nothing read all that a client of bulk has under
// way at most, which does not become more.
func TestInflight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, inflight = 1000, 5
		read := 0
		p := pipesTo(func(c net.Conn) {
			for b := make([]byte, size); ; {
				n, err := c.Read(b)
				read += n
				if err != nil {
					return
				}
			}
		})
		p.mode, p.size, p.inflight = bulk, size, inflight
		ctx, cancel := context.WithCancel(t.Context())
		over := make(chan *report)
		go func() { over <- run(ctx, p, &progress{w: io.Discard, mode: p.mode}) }()
		synctest.Wait() // until nobody can go on
		if read != size*inflight {
			t.Errorf("%d bytes were under way, not %d", read, size*inflight)
		}
		time.Sleep(30 * time.Minute)
		if read != size*inflight {
			t.Errorf("then %d", read)
		}
		cancel()
		if r := <-over; r.Totals.Messages != 0 {
			t.Errorf("%+v", r.Totals)
		}
	})
}
