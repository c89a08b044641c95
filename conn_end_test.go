package relay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

// The app hears of a client that waits for it to speak.
func TestServerSpeaksFirst(t *testing.T) {
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		client, app := pair()
		io.WriteString(app, "220 welcome\r\n")
		got := make([]byte, 13)
		if _, err := io.ReadFull(client, got); err != nil || string(got) != "220 welcome\r\n" {
			t.Errorf("the client reads %q, %v", got, err)
		}
	})
}

// A client that has sent all it has, and said so, gets the whole answer.
func TestAnswerAfterHalfClose(t *testing.T) {
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		for _, tt := range []struct{ times, question, answer int }{
			{30, 10, 10}, {30, 0, 100_000}, {30, 100_000, 0}, {2, 4 << 20, 4 << 20},
		} {
			question, answer := randomBytes(tt.question), randomBytes(tt.answer)
			for i := range tt.times {
				client, app := pair()
				served := make(chan error, 1)
				go func() {
					defer app.Close()
					got, err := io.ReadAll(onlyReader{app})
					if err == nil && !bytes.Equal(got, question) {
						err = fmt.Errorf("a question of %d bytes", len(got))
					}
					if err == nil {
						_, err = app.Write(answer)
					}
					served <- err
				}()
				if _, err := client.Write(question); err != nil {
					t.Fatal(err)
				}
				if err := client.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(client)
				if err != nil || !bytes.Equal(got, answer) {
					t.Fatalf("%d of %d: an answer of %d bytes and not %d, %v", i, tt.times, len(got), len(answer), err)
				}
				if err := <-served; err != nil {
					t.Fatalf("%d of %d: the app: %v", i, tt.times, err)
				}
				client.Close()
			}
		}
	})
}

// The other way round: the app says that it is done, and still hears the client.
func TestAppHalfClosesFirst(t *testing.T) {
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		client, app := pair()
		app.Write([]byte("all"))
		if err := app.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(client); err != nil || string(got) != "all" {
			t.Fatalf("the client reads %q, %v", got, err)
		}
		if _, err := app.Write([]byte("more")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("the app writes after CloseWrite: %v", err)
		}
		if err := app.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) {
			t.Errorf("CloseWrite again: %v", err)
		}
		want := randomBytes(1 << 20)
		go func() {
			client.Write(want)
			client.Close()
		}()
		if got, err := io.ReadAll(onlyReader{app}); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the app reads %d bytes, %v", len(got), err)
		}
	})
}

// A reset by the client is an error to the app, and never looks like an end.
func TestClientReset(t *testing.T) {
	reset := func(client *net.TCPConn) {
		client.SetLinger(0)
		client.Close()
	}
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		t.Run("idle", func(t *testing.T) {
			client, app := pair()
			sendAndExpect(t, client, app)
			read := make(chan error, 1)
			go func() {
				_, err := app.Read(make([]byte, 1))
				read <- err
			}()
			reset(client)
			if err := within(t, "Read's return", read); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("Read: %v", err)
			}
			// And again, whichever way one asks.
			if n, err := app.Read(make([]byte, 1)); n != 0 || err == nil {
				t.Errorf("Read again: %d, %v", n, err)
			}
			eventually(t, "a failing Write", func() bool {
				_, err := app.Write([]byte("x"))
				return isReset(err)
			})
		})
		t.Run("uploading", func(t *testing.T) {
			client, app := pair()
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					if _, err := client.Write(make([]byte, 64<<10)); err != nil {
						return
					}
				}
			}()
			if _, err := io.CopyN(io.Discard, app, 4<<20); err != nil {
				t.Fatal(err)
			}
			reset(client)
			<-done
			expectReset(t, app)
		})
		t.Run("uploading, WriteTo", func(t *testing.T) {
			client, app := pair()
			go client.Write(make([]byte, 1<<20))
			var once sync.Once
			_, err := app.WriteTo(writerFunc(func(p []byte) (int, error) {
				once.Do(func() { reset(client) })
				return len(p), nil
			}))
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("WriteTo: %v", err)
			}
		})
		t.Run("downloading", func(t *testing.T) {
			client, app := pair()
			wrote := make(chan error, 1)
			go func() {
				for {
					if _, err := app.Write(make([]byte, 64<<10)); err != nil {
						wrote <- err
						return
					}
				}
			}()
			if _, err := io.CopyN(io.Discard, client, 4<<20); err != nil {
				t.Fatal(err)
			}
			reset(client)
			if err := within(t, "Write's return", wrote); !isReset(err) {
				t.Errorf("Write: %v", err)
			}
			if _, err := app.Read(make([]byte, 1)); err == io.EOF && reflect.TypeOf(app) == reflect.TypeFor[*relay.Conn]() {
				t.Errorf("Read: %v", err) // of TCP, Write had the error and Read has the rest
			}
		})
		t.Run("downloading after its half-close", func(t *testing.T) {
			client, app := pair()
			client.CloseWrite()
			if _, err := app.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
			wrote := make(chan error, 1)
			go func() {
				_, err := app.ReadFrom(onlyReader{zeroes{}})
				wrote <- err
			}()
			if _, err := io.CopyN(io.Discard, client, 4<<20); err != nil {
				t.Fatal(err)
			}
			reset(client)
			if err := within(t, "ReadFrom's return", wrote); !isReset(err) {
				t.Errorf("ReadFrom: %v", err)
			}
		})
		t.Run("no more reading", func(t *testing.T) {
			// Without a reset asked for: it closes while the app is sending.
			client, app := pair()
			wrote := make(chan error, 1)
			go func() {
				_, err := io.Copy(app, onlyReader{zeroes{}})
				wrote <- err
			}()
			if _, err := io.CopyN(io.Discard, client, 4<<20); err != nil {
				t.Fatal(err)
			}
			client.Close()
			if err := within(t, "Copy's return", wrote); !isReset(err) {
				t.Errorf("Copy: %v", err)
			}
		})
	})
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) { return len(p), nil }

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// What the app aborts is a reset to the client, and never looks like an end.
func TestAppAbort(t *testing.T) {
	abort := func(t *testing.T, app conn) {
		if err := app.SetLinger(0); err != nil {
			t.Error(err)
		}
		if err := app.Close(); err != nil {
			t.Error(err)
		}
	}
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		t.Run("idle", func(t *testing.T) {
			client, app := pair()
			sendAndExpect(t, client, app)
			abort(t, app)
			expectReset(t, client)
		})
		t.Run("at once", func(t *testing.T) {
			client, app := pair()
			abort(t, app)
			expectReset(t, client)
		})
		t.Run("after the client's half-close", func(t *testing.T) {
			client, app := pair()
			client.CloseWrite()
			if _, err := app.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
			app.Write(make([]byte, 1<<10))
			abort(t, app)
			expectReset(t, client)
		})
		t.Run("downloading", func(t *testing.T) {
			client, app := pair()
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					if _, err := app.Write(make([]byte, 64<<10)); err != nil {
						return
					}
				}
			}()
			if _, err := io.CopyN(io.Discard, client, 4<<20); err != nil {
				t.Fatal(err)
			}
			abort(t, app)
			<-done
			expectReset(t, client)
		})
		t.Run("uploading", func(t *testing.T) {
			client, app := pair()
			wrote := make(chan error, 1)
			go func() {
				_, err := io.Copy(client, onlyReader{zeroes{}})
				wrote <- err
			}()
			if _, err := io.CopyN(io.Discard, app, 4<<20); err != nil {
				t.Fatal(err)
			}
			abort(t, app)
			if err := within(t, "Copy's return", wrote); !isReset(err) {
				t.Errorf("the client writes: %v", err)
			}
		})
		t.Run("changed its mind", func(t *testing.T) {
			client, app := pair()
			app.SetLinger(0)
			app.SetLinger(-1)
			app.Write([]byte("fine"))
			app.Close()
			if got, err := io.ReadAll(client); err != nil || string(got) != "fine" {
				t.Errorf("the client reads %q, %v", got, err)
			}
		})
	})
}

// An app that closes gets out what it wrote, and a client that goes on sending is
// told.
func TestAppClose(t *testing.T) {
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		t.Run("client sending", func(t *testing.T) {
			client, app := pair()
			wrote := make(chan error, 1)
			go func() {
				_, err := io.Copy(client, onlyReader{zeroes{}})
				wrote <- err
			}()
			if _, err := io.CopyN(io.Discard, app, 1<<20); err != nil {
				t.Fatal(err)
			}
			if err := app.Close(); err != nil {
				t.Error(err)
			}
			if err := within(t, "Copy's return", wrote); !isReset(err) {
				t.Errorf("the client writes: %v", err)
			}
		})
		t.Run("client idle", func(t *testing.T) {
			client, app := pair()
			sendAndExpect(t, client, app)
			want := randomBytes(1 << 20)
			go func() {
				app.Write(want)
				app.Close()
			}()
			if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("the client reads %d bytes, %v", len(got), err)
			}
			eventually(t, "a failing Write", func() bool {
				_, err := client.Write([]byte("x"))
				return isReset(err)
			})
		})
		t.Run("client stopped", func(t *testing.T) {
			// What was written is on its way when Close returns, however late the
			// client reads it.
			client, app := pair()
			want := randomBytes(200_000)
			if _, err := app.Write(want); err != nil {
				t.Fatal(err)
			}
			app.Close()
			if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("the client reads %d bytes, %v", len(got), err)
			}
		})
	})
}

// When the app's connection to the relay is lost, be it that its process died, its
// clients are reset, also in the middle of a transfer; what is left of the app hears
// of an error on each conn, and that is not an end, nor its own doing. Its listener is
// back soon, at the same address, as if nothing had happened.
func TestSessionLost(t *testing.T) {
	var log logbook
	toldRelay, relayEvents := watch(relay.EventRegistered, relay.EventLost, relay.EventResumed, relay.EventEnded)
	srv, addr := startRelay(t, relay.WithLogger(log.logger()), toldRelay)
	told, events := watch(relay.EventLost, relay.EventResumed)
	transports := make(chan net.Conn, 1)   // of the first session
	var gate atomic.Pointer[chan struct{}] // closed when it may dial
	open := make(chan struct{})
	close(open)
	gate.Store(&open)
	l := register(t, addr, told, relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		select {
		case <-*gate.Load():
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		select {
		case transports <- c:
		default:
		}
		return c, err
	}))
	public := l.Addr().String()
	idle, idleApp := dial(t, l), accept(t, l)
	sendAndExpect(t, idle, idleApp)
	down, downApp := dial(t, l), accept(t, l)
	wrote := make(chan error, 1)
	go func() {
		_, err := io.Copy(downApp, onlyReader{zeroes{}})
		wrote <- err
	}()
	up, upApp := dial(t, l), accept(t, l)
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(up, onlyReader{zeroes{}})
		sent <- err
	}()
	halfClosed, halfClosedApp := dial(t, l), accept(t, l)
	halfClosed.CloseWrite()
	if _, err := halfClosedApp.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, down, 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, upApp, 1<<20); err != nil {
		t.Fatal(err)
	}
	waiting := startAccept(l)

	mayDial := make(chan struct{})
	gate.Store(&mayDial)
	(<-transports).Close()
	expectLost(t, events)
	for _, c := range []*net.TCPConn{idle, down, halfClosed} {
		expectReset(t, c)
	}
	for what, c := range map[string]chan error{"the client writes": sent, "the app writes": wrote} {
		if err := within(t, "the end of writing", c); err == nil || errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, c := range []conn{idleApp, upApp, downApp} {
		if _, err := io.Copy(io.Discard, onlyReader{c}); err == nil || errors.Is(err, net.ErrClosed) {
			t.Errorf("the app reads to the end: %v", err)
		}
		if _, err := c.Write([]byte("x")); err == nil || errors.Is(err, net.ErrClosed) {
			t.Errorf("the app writes: %v", err)
		}
	}
	// A client that had said it was done had.
	if _, err := halfClosedApp.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the app reads a second time at the end: %v", err)
	}
	if e := log.wait(t, "session ended", 1)[0]; e.attrs["kept"] != true || e.attrs["err"] == nil {
		t.Errorf("logged %+v", e)
	}
	log.wait(t, "client left", 4)

	close(mayDial) // not before the relay has noticed
	next(t, events, relay.EventResumed)
	next(t, relayEvents, relay.EventRegistered)
	expectLost(t, relayEvents)
	next(t, relayEvents, relay.EventResumed)
	expectWaiting(t, waiting)
	if l.Addr().String() != public {
		t.Errorf("back at %v, and not at %s", l.Addr(), public)
	}
	client := dial(t, l)
	sendAndExpect(t, client, accepted(t, waiting))
	if s := srv.Services(); len(s) != 1 || len(s[0].Sessions) != 1 || s[0].Accepted != 5 || s[0].Refused != 0 {
		t.Errorf("services %+v", s)
	}
	// Of those that were lost the app has closed none yet.
	if got := l.Stats(); got.Accepted != 5 || got.Live != 5 || got.Reconnects != 1 || !got.Connected {
		t.Errorf("stats %+v", got)
	}
	l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

// What was received whole before the relay was lost can be read.
func TestSessionLostBehindEnd(t *testing.T) {
	addr, sessions := fakeRelay(t, goodReply)
	told, events := watch(relay.EventLost)
	l := register(t, addr, told, relay.WithBackoff(never, never))
	sess := within(t, "a session", sessions)
	open := func(s string) *mux.Stream {
		st, err := sess.Open(append(wire.AppendProxy(nil, nil, nil), s...))
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	open("all of it").CloseWrite()
	open("part")
	app, otherApp := accept(t, l), accept(t, l)
	sess.Close()
	expectLost(t, events)
	if got, err := io.ReadAll(onlyReader{app}); err != nil || string(got) != "all of it" {
		t.Errorf("the app reads %q, %v", got, err)
	}
	if got, err := io.ReadAll(onlyReader{otherApp}); err == nil || string(got) != "part" {
		t.Errorf("the app reads %q, %v", got, err)
	}
}

// The relay's death is the same to the app as the app's to the relay.
func TestRelayLost(t *testing.T) {
	conns := make(chan net.Conn, 100)
	srv, err := relay.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, srv, tappedListener{ln, conns})
	told, events := watch(relay.EventLost, relay.EventResumed)
	l := register(t, ln.Addr().String(), told)
	public := l.Addr().String()
	client, app := dial(t, l), accept(t, l)
	sendAndExpect(t, client, app)
	(<-conns).Close()
	expectReset(t, client)
	if _, err := app.Read(make([]byte, 1)); err == nil || err == io.EOF || errors.Is(err, net.ErrClosed) {
		t.Errorf("the app reads %v", err)
	}
	expectLost(t, events)
	next(t, events, relay.EventResumed)
	if s := srv.Services(); len(s) != 1 || s[0].Address != public || l.Addr().String() != public {
		t.Errorf("back at %v, and not at %s; services %+v", l.Addr(), public, s)
	}
	client, app = dial(t, l), accept(t, l)
	sendAndExpect(t, client, app)
	l.Close()
	app.Close()
	eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
}

type tappedListener struct {
	net.Listener
	conns chan net.Conn
}

func (l tappedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.conns <- c
	}
	return c, err
}
