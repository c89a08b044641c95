package relay_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

// startFakeRelay registers an app that comes to the address it returns, and then has
// speak go on with the control stream.
func startFakeRelay(t *testing.T, speak func(st *mux.Stream, lines *wire.Reader)) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		sess := mux.Server(conn, mux.Config{})
		defer sess.Close()
		st, err := sess.Accept()
		if err != nil {
			return
		}
		lines := wire.NewReader(st)
		var hello wire.Hello
		lines.Read(&hello)
		reply, _ := wire.Line(wire.Reply{Version: wire.Version, Address: "127.0.0.1:1"})
		st.Write(reply)
		speak(st, lines)
	}()
	return ln.Addr().String()
}

// A relay that asks for more and more connections, and reads nothing, gets no more of an
// app than the app allows.
func TestOpenFlood(t *testing.T) {
	lines := make(chan int, 1)
	addr := startFakeRelay(t, func(st *mux.Stream, _ *wire.Reader) {
		line, _ := wire.Line(wire.Control{Type: wire.Open, Secrets: make([]wire.Secret, 1)})
		n := 0
		st.SetWriteDeadline(time.Now().Add(2 * time.Second)) // by when it takes no more
		for ; ; n++ {
			if _, err := st.Write(line); err != nil {
				break
			}
		}
		lines <- n
	})
	before := runtime.NumGoroutine()
	l, err := relay.Register(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n := within(t, "the flood's end", lines)
	if now := runtime.NumGoroutine(); now > before+100 {
		t.Errorf("%d goroutines more after %d lines", now-before, n)
	}
}

// A relay can have an app open so many connections and use none, and is told of every
// further one that it is not opened.
func TestOpenMany(t *testing.T) {
	const most, more = 1000, 150
	told := make(chan int, 1)
	addr := startFakeRelay(t, func(st *mux.Stream, lines *wire.Reader) {
		secrets := make([]wire.Secret, most+more)
		for i := range secrets {
			secrets[i] = wire.Secret{byte(i), byte(i >> 8)}
		}
		for some := range slices.Chunk(secrets, 25) {
			line, err := wire.Line(wire.Control{Type: wire.Open, Secrets: some})
			if err != nil {
				t.Error(err)
			}
			st.Write(line)
		}
		n := 0
		for n < more {
			var c wire.Control
			if lines.Read(&c) != nil {
				break
			}
			if c.Type == wire.Unopened {
				n += len(c.Secrets)
			}
		}
		told <- n
	})
	release := make(chan struct{})
	var dials atomic.Int64
	l := dedicated(t, addr, 0, relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		if dials.Add(1) > 1 {
			<-release
			return nil, io.ErrClosedPipe
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	}))
	defer l.Close()
	defer close(release)
	if n := within(t, "word of those not opened", told); n != more {
		t.Errorf("%d of %d were declined", n, most+more)
	}
	if n := dials.Load(); n > 1+64 {
		t.Errorf("%d were being opened at once", n)
	}
}

// An app gets no more spare connections ready than the relay has any app have.
func TestDedicatedSpares(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		startOn(t, n)
		var dials atomic.Int64
		dedicated(t, relayAddr, 100_000, relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials.Add(1)
			return n.DialFrom("10.1.0.1")(ctx, network, addr)
		}))
		time.Sleep(time.Minute)
		if n := dials.Load() - 1; n != 256 {
			t.Errorf("%d are ready", n)
		}
	})
}

// As many clients wait for connections that are being opened as may come in time; the
// others are carried by streams at once, and so are the first ones in the end.
func TestDedicatedWaiting(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		const waiting = 4 // for each that the app is asked for at once
		startOn(t, n, relay.WithLimits(relay.Limits{PendingPerIP: 2}))
		var dials atomic.Int64
		l := dedicated(t, relayAddr, 0, relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			if dials.Add(1) > 1 {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return n.DialFrom("10.1.0.1")(ctx, network, addr)
		}))
		var mu sync.Mutex
		var conns []net.Conn
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				mu.Lock()
				conns = append(conns, c)
				mu.Unlock()
			}
		}()
		accepted := func() int {
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			return len(conns)
		}
		const clients = 10
		for range clients {
			client(t, n, l.Addr())
		}
		if got := accepted(); got != clients-waiting {
			t.Errorf("%d clients at once, of %d", got, clients)
		}
		time.Sleep(3*time.Second - time.Millisecond)
		if got := accepted(); got != clients-waiting {
			t.Errorf("%d clients after three seconds but a millisecond", got)
		}
		time.Sleep(time.Millisecond)
		if got := accepted(); got != clients {
			t.Errorf("%d clients after three seconds", got)
		}
		for _, c := range conns {
			c.Close()
		}
	})
}

// Of the process's files clients take four fifths, with the connections that carry them;
// and dedicated connections half of those, so that there is no spare one without a client
// in the end, and no client without one that had to be turned away.
func TestDedicatedByFiles(t *testing.T) {
	if !inChild() {
		if out, err := withFiles(t, 100).CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS")) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		srv := startOn(t, n)
		l := dedicated(t, relayAddr, 10, relay.WithDialer(n.DialFrom("10.1.0.1")))
		go serveEcho(l)
		served := 0
		for range 60 {
			time.Sleep(10 * time.Second) // until there are spare ones again, if there may be
			c := client(t, n, l.Addr())
			c.Write([]byte("x"))
			if _, err := io.ReadFull(c, make([]byte, 1)); err == nil {
				served++
			} else if !isReset(err) {
				t.Errorf("client %d: %v", served, err)
			}
		}
		if served != 40 {
			t.Errorf("%d clients over connections of their own, of a process that may have 100 files", served)
		}
		synctest.Wait() // until the last one was counted
		if r := srv.Refusals(); r["clients"] != 20 || r["files"] == 0 {
			t.Errorf("refusals %v", r)
		}
	})
}

// What an app has sent before it closed is on its way for as long as it takes, however
// long the way is held up.
func TestDedicatedTailHeldUp(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		startOn(t, n)
		var mu sync.Mutex
		var last *memnet.Conn
		l := dedicated(t, relayAddr, 0, relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := n.DialFrom("10.1.0.1")(ctx, network, addr)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				last = c.(*memnet.Conn)
			}
			return c, err
		}))
		c, app := client(t, n, l.Addr()), accept(t, l)
		sendAndExpect(t, c, app)
		mu.Lock()
		last.Freeze()
		mu.Unlock()
		sent := randomBytes(20_000)
		if _, err := app.Write(sent); err != nil {
			t.Fatal(err)
		}
		app.Close()
		time.Sleep(3 * time.Minute)
		mu.Lock()
		last.Thaw()
		mu.Unlock()
		if got, err := io.ReadAll(onlyReader{c}); err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%d bytes of %d, %v", len(got), len(sent), err)
		}
	})
}
