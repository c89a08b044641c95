package relay_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// Drain keeps new clients away, and returns when Accept has returned those who were on
// their way, and all have been answered something.
func TestDrain(t *testing.T) {
	srv, addr := startRelay(t)
	check := nothingLeft(t)
	l := register(t, addr)
	const n = 5
	var clients []*net.TCPConn
	for range n {
		c := dial(t, l)
		c.Write([]byte("?"))
		clients = append(clients, c)
	}
	eventually(t, "the clients at the app", func() bool { return srv.Services()[0].BytesIn == n })
	drained := make(chan error, 1)
	go func() { drained <- l.Drain(t.Context()) }()
	notYet := func(when string) {
		t.Helper()
		select {
		case err := <-drained:
			t.Fatalf("%s Drain returned %v", when, err)
		default:
		}
	}
	eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })
	if c, err := net.Dial("tcp", l.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
		if err == nil {
			c.Close()
		}
		t.Errorf("a client that comes later: %v", err)
	}
	var apps []conn
	for range n {
		notYet("before all were accepted")
		apps = append(apps, accept(t, l))
	}
	for i, a := range apps {
		notYet("before all were answered")
		expectByte(t, a, '?')
		if i == 0 {
			a.Close() // no answer either
			continue
		}
		a.Write([]byte("!"))
	}
	if err := within(t, "Drain's return", drained); err != nil {
		t.Errorf("Drain: %v", err)
	}
	if err := l.Drain(t.Context()); err != nil {
		t.Errorf("Drain again: %v", err)
	}
	accepted := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		accepted <- err
	}()
	for _, a := range apps[1:] { // they go on
		a.Write([]byte("!"))
		a.Close()
	}
	var got int64
	for _, c := range clients {
		k, err := io.Copy(io.Discard, c)
		if err != nil {
			t.Errorf("a client reads to the end: %v", err)
		}
		got += k
		c.Close()
	}
	if got != 2*(n-1) {
		t.Errorf("the clients read %d bytes", got)
	}
	select {
	case err := <-accepted:
		t.Errorf("Accept before Close: %v", err)
	default:
	}
	l.Close()
	expectClosed(t, "Accept", within(t, "Accept's return", accepted))
	within(t, "Done", l.Done())
	expectClosed(t, "Drain after Close", l.Drain(t.Context()))
	expectNoneRefused(t, srv)
	check()
}

// What ends Drain early leaves new clients away all the same.
func TestDrainEnds(t *testing.T) {
	enough := errors.New("enough")
	for name, tt := range map[string]struct {
		end  func(l *relay.Listener, transport net.Conn, cancel context.CancelCauseFunc)
		want error
	}{
		"context": {func(_ *relay.Listener, _ net.Conn, cancel context.CancelCauseFunc) { cancel(enough) }, enough},
		"Close":   {func(l *relay.Listener, _ net.Conn, _ context.CancelCauseFunc) { l.Close() }, net.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			srv, addr := startRelay(t)
			l, transport := registerTapped(t, addr, relay.WithBackoff(time.Millisecond, time.Millisecond))
			client, app := dial(t, l), accept(t, l)
			client.Write([]byte("?"))
			expectByte(t, app, '?')
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			drained := make(chan error, 1)
			go func() { drained <- l.Drain(ctx) }()
			eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })
			tt.end(l, transport, cancel)
			err := within(t, "Drain's return", drained)
			if op, ok := err.(*net.OpError); !ok || op.Op != "drain" || !errors.Is(err, tt.want) {
				t.Errorf("Drain: %#v", err)
			}
			if !srv.Services()[0].Draining {
				t.Error("the service takes clients again")
			}
			app.Write([]byte("!"))
			expectByte(t, client, '!')
			// A session that breaks now is not opened anew.
			transport.Close()
			within(t, "Done", l.Done())
			eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
			if n := l.Stats().Reconnects; n != 0 {
				t.Errorf("%d reconnects", n)
			}
		})
	}
}

// A client who has said nothing for five seconds is not waited for any longer; one that
// waits for its answer is.
func TestDrainSilentClient(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		startOn(t, n)
		l := register(t, relayAddr, relay.WithDialer(n.Dial))
		connect := func() (client, app net.Conn) {
			client, err := n.Dial(t.Context(), "tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { client.Close() })
			app = accept(t, l)
			app.SetDeadline(time.Time{})
			return client, app
		}
		connect()
		client, app := connect()
		client.Write([]byte("?"))
		expectByte(t, app, '?')
		time.AfterFunc(time.Hour, func() { app.Write([]byte("!")) })
		time.Sleep(time.Second)
		_, late := connect()
		start := time.Now()
		time.AfterFunc(time.Second, func() { late.Close() })
		if err := l.Drain(t.Context()); err != nil {
			t.Errorf("Drain: %v", err)
		}
		// It looks every tenth of a second, if it has to wait for long.
		if waited := time.Since(start); waited < time.Hour-time.Second || waited > time.Hour {
			t.Errorf("Drain waited %v for the answer", waited)
		}

		l2 := register(t, relayAddr, relay.WithDialer(n.Dial))
		l = l2
		connect()
		start = time.Now()
		if err := l2.Drain(t.Context()); err != nil {
			t.Errorf("Drain: %v", err)
		}
		if waited := time.Since(start); waited < 5*time.Second || waited > 5*time.Second+100*time.Millisecond {
			t.Errorf("Drain waited %v for a client that is silent", waited)
		}
	})
}

// Drain does not outlast its context, be the relay out of reach and the transport full.
// What it has to say is said when there is room.
func TestDrainCongested(t *testing.T) {
	ofSessions(t)
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n)
		a := newRoamer(n)
		a.Listener = register(t, relayAddr, a.options([]relay.RegisterOption{relay.WithHeartbeat(time.Second, -1)})...)
		c, app := client(t, n, a.Addr()), accept(t, a)
		sendAndExpect(t, c, app)

		// Many small frames, so that there is no room for another one.
		a.transport().Freeze()
		app.SetWriteDeadline(time.Now().Add(time.Second))
		var err error
		for err == nil {
			_, err = app.Write([]byte("x"))
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("writing to a transport that takes nothing: %v", err)
		}
		time.Sleep(5 * time.Second) // pings take what the control stream has
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err = a.Drain(ctx)
		expectAt(t, "Drain's return", time.Now(), start, time.Second)
		if op, ok := err.(*net.OpError); !ok || op.Op != "drain" || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Drain: %#v", err)
		}
		if r.service(t).Draining {
			t.Error("the relay was told over a frozen transport")
		}
		time.Sleep(15 * time.Second) // longer than one try takes
		a.transport().Thaw()
		synctest.Wait()
		if !r.service(t).Draining {
			t.Error("the relay was not told")
		}
	})
}
