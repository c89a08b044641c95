package relay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"reflect"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

// conn is what a *relay.Conn has in common with a *net.TCPConn.
type conn interface {
	net.Conn
	io.ReaderFrom
	io.WriterTo
	CloseWrite() error
	SetLinger(int) error
}

var (
	_ conn = (*net.TCPConn)(nil)
	_ conn = (*relay.Conn)(nil)
)

// onBoth runs a case over a plain TCP listener, to show that it asks for what TCP
// does, and over a relay's. Pair connects a client and has the app accept it.
func onBoth(t *testing.T, f func(t *testing.T, pair func() (client *net.TCPConn, app conn))) {
	run := func(name string, listen func(t *testing.T) net.Listener) {
		t.Run(name, func(t *testing.T) {
			ln := listen(t)
			f(t, func() (*net.TCPConn, conn) {
				t.Helper()
				return dial(t, ln), accept(t, ln)
			})
		})
	}
	run("TCP", func(t *testing.T) net.Listener {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		return ln
	})
	run("relay", func(t *testing.T) net.Listener {
		_, addr := startRelay(t)
		return register(t, addr)
	})
}

// randomBytes returns bytes in which a missing or repeated piece shows.
func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(b)
	return b
}

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

// Large bodies by all the ways there are to move them.
func TestReadFromWriteTo(t *testing.T) {
	want := randomBytes(5<<20 + 17)
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		client, app := pair()
		go func() {
			client.Write(want)
			client.CloseWrite()
		}()
		var got bytes.Buffer
		if n, err := app.WriteTo(&got); err != nil || n != int64(len(want)) || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("WriteTo: %d of %d bytes, %v", n, len(want), err)
		}
		broken := errors.New("broken")
		go func() {
			n, err := app.ReadFrom(bytes.NewReader(want))
			if err != nil || n != int64(len(want)) {
				t.Errorf("ReadFrom: %d of %d bytes, %v", n, len(want), err)
			}
			// The reader's error comes through, and what it gave before.
			n, err = app.ReadFrom(io.MultiReader(bytes.NewReader([]byte("and")), errReader{broken}))
			if !errors.Is(err, broken) || n != 3 {
				t.Errorf("ReadFrom of a reader that fails: %d, %v", n, err)
			}
			app.Close()
		}()
		if b, err := io.ReadAll(client); err != nil || !bytes.Equal(b, append(bytes.Clone(want), "and"...)) {
			t.Errorf("the client reads %d bytes, %v", len(b), err)
		}

		// A writer's error too.
		client2, app2 := pair()
		client2.Write([]byte("x"))
		if _, err := app2.WriteTo(writerFunc(func([]byte) (int, error) { return 0, broken })); !errors.Is(err, broken) {
			t.Errorf("WriteTo to a writer that fails: %v", err)
		}
	})
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// expectTimeout checks all the ways in which callers recognise a timeout.
func expectTimeout(t testing.TB, what string, err error) {
	t.Helper()
	ne, ok := err.(net.Error)
	if !ok || !ne.Timeout() || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: %v, want a timeout", what, err)
	}
}

func TestDeadlines(t *testing.T) {
	past := time.Unix(1, 0)
	never := time.Time{}
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		t.Run("read", func(t *testing.T) {
			client, app := pair()
			b := make([]byte, 10)
			app.SetReadDeadline(past)
			client.Write([]byte("x"))
			_, err := app.Read(b)
			expectTimeout(t, "Read", err)
			_, err = app.WriteTo(io.Discard)
			expectTimeout(t, "WriteTo", err)
			// The other direction goes on, and so does this one without a deadline.
			if _, err := app.Write([]byte("y")); err != nil {
				t.Errorf("Write: %v", err)
			}
			expectByte(t, client, 'y')
			app.SetReadDeadline(never)
			expectByte(t, app, 'x')
			// One that passes while Read waits.
			app.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			_, err = app.Read(b)
			expectTimeout(t, "Read", err)
			// One that is set while Read waits, to the past or from later to soon.
			for _, at := range []time.Time{past, time.Now().Add(20 * time.Millisecond)} {
				app.SetReadDeadline(time.Now().Add(time.Hour))
				read := make(chan error, 1)
				go func() {
					_, err := app.Read(b)
					read <- err
				}()
				app.SetReadDeadline(at)
				expectTimeout(t, "Read", within(t, "Read's return", read))
			}
			// One that is moved away is none.
			app.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			app.SetReadDeadline(never)
			read := make(chan error, 1)
			go func() {
				n, err := app.Read(b)
				if err == nil && string(b[:n]) != "z" {
					err = fmt.Errorf("read %q", b[:n])
				}
				read <- err
			}()
			client.SetReadDeadline(time.Now().Add(40 * time.Millisecond))
			client.Read(b) // nothing comes: time has passed
			client.Write([]byte("z"))
			if err := within(t, "Read's return", read); err != nil {
				t.Error(err)
			}
		})
		t.Run("write", func(t *testing.T) {
			client, app := pair()
			app.SetWriteDeadline(past)
			_, err := app.Write([]byte("x"))
			expectTimeout(t, "Write", err)
			_, err = app.ReadFrom(bytes.NewReader([]byte("x")))
			expectTimeout(t, "ReadFrom", err)
			client.Write([]byte("y"))
			expectByte(t, app, 'y')
			app.SetWriteDeadline(never)
			app.Write([]byte("z"))
			expectByte(t, client, 'z')
			// The client reads no more, so that Write comes to wait.
			app.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
			var sent int64
			for err = nil; err == nil; {
				var n int
				n, err = app.Write(randomBytes(1 << 20))
				sent += int64(n)
			}
			expectTimeout(t, "Write", err)
			app.SetWriteDeadline(time.Now().Add(time.Hour))
			wrote := make(chan error, 1)
			go func() {
				n, err := app.Write(make([]byte, 64<<20))
				sent += int64(n)
				wrote <- err
			}()
			app.SetWriteDeadline(past)
			expectTimeout(t, "Write", within(t, "Write's return", wrote))
			// What was said to be sent arrives, and nothing else.
			app.Close()
			if n, err := io.Copy(io.Discard, client); err != nil || n != sent {
				t.Errorf("%d bytes arrived of %d, %v", n, sent, err)
			}
		})
		t.Run("both", func(t *testing.T) {
			_, app := pair()
			app.SetDeadline(past)
			_, err := app.Read(make([]byte, 1))
			expectTimeout(t, "Read", err)
			_, err = app.Write([]byte("x"))
			expectTimeout(t, "Write", err)
		})
	})
}

// Close ends what waits, and afterwards every method says that the conn is closed,
// in the words of a *net.TCPConn.
func TestClosedConn(t *testing.T) {
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		_, app := pair()
		calls := make(chan error, 2)
		go func() {
			_, err := app.Read(make([]byte, 1))
			calls <- err
		}()
		go func() {
			_, err := io.Copy(onlyWriter{app}, zeroes{}) // until it waits for the client
			calls <- err
		}()
		if err := app.Close(); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := within(t, "the return of Read and Write", calls); !errors.Is(err, net.ErrClosed) {
				t.Errorf("a call that waited: %v", err)
			}
		}
		for _, tt := range []struct {
			op  string
			err error
		}{
			{"close", app.Close()},
			{"close", app.CloseWrite()},
			{"set", app.SetDeadline(time.Time{})},
			{"set", app.SetReadDeadline(time.Time{})},
			{"set", app.SetWriteDeadline(time.Time{})},
			{"set", app.SetLinger(0)},
			{"read", second(app.Read(make([]byte, 1)))},
			{"read", second(app.Read(nil))},
			{"write", second(app.Write([]byte("x")))},
			{"readfrom", second(app.ReadFrom(onlyReader{zeroes{}}))},
			{"writeto", second(app.WriteTo(onlyWriter{io.Discard}))},
		} {
			op, ok := tt.err.(*net.OpError)
			if !ok || !errors.Is(tt.err, net.ErrClosed) || op.Net != "tcp" {
				t.Errorf("%s: %#v", tt.op, tt.err)
				continue
			}
			// A plain conn reads and writes through net.genericReadFrom and WriteTo,
			// whose errors are those of what they call.
			if op.Op != tt.op && app.RemoteAddr().Network() == "tcp" && op.Op != "read" && op.Op != "write" {
				t.Errorf("%s: %#v", tt.op, tt.err)
			}
		}
	})
}

func second[A, B any](_ A, b B) B { return b }

// Errors tell both addresses, as those of a *net.TCPConn do.
func TestErrorForm(t *testing.T) {
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		client, app := pair()
		app.SetDeadline(time.Unix(1, 0))
		_, rerr := app.Read(make([]byte, 1))
		_, werr := app.Write([]byte("x"))
		for want, err := range map[string]error{"read": rerr, "write": werr} {
			op, ok := err.(*net.OpError)
			if !ok || op.Op != want || op.Net != "tcp" ||
				op.Source.String() != client.RemoteAddr().String() || op.Addr.String() != client.LocalAddr().String() {
				t.Errorf("%s: %#v", want, err)
			}
		}
		// An end is plain, so that == does.
		app.SetDeadline(time.Time{})
		client.CloseWrite()
		if _, err := app.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("Read at the end: %#v", err)
		}
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
	transports := make(chan net.Conn, 2)
	mayDial := make(chan struct{}, 2)
	mayDial <- struct{}{}
	l := register(t, addr, told, relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		select {
		case <-mayDial:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err == nil {
			transports <- c
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

	mayDial <- struct{}{} // not before the relay has noticed
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

// Goroutines that use one conn in every way at once do not upset it.
func TestConcurrentUse(t *testing.T) {
	_, addr := startRelay(t)
	l := register(t, addr)
	client, app := dial(t, l), accept(t, l)
	go io.Copy(client, onlyReader{client}) // echo
	read := make(chan int64, 2)
	for range 2 {
		go func() {
			n, _ := io.Copy(io.Discard, onlyReader{app}) // until Close
			read <- n
		}()
	}
	var users sync.WaitGroup
	const times, piece = 300, 100
	for _, use := range []func(){
		func() { app.Write(make([]byte, piece)) },
		func() { app.ReadFrom(bytes.NewReader(make([]byte, piece))) },
		func() { app.SetDeadline(time.Now().Add(patience)) },
		func() { app.SetLinger(5) },
		func() { l.Stats() },
		func() { _ = fmt.Sprint(app.LocalAddr(), app.RemoteAddr()) },
	} {
		users.Go(func() {
			for range times {
				use()
			}
		})
	}
	users.Wait()
	eventually(t, "all back", func() bool { return l.Stats().BytesIn == 2*times*piece })
	app.Close() // while Read waits
	if n := within(t, "Read's end", read) + within(t, "Read's end", read); n != 2*times*piece {
		t.Errorf("%d bytes came back", n)
	}
}

// Two at once write whole pieces.
func TestConcurrentWrites(t *testing.T) {
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		client, app := pair()
		const size, times = 100_000, 20
		var writers sync.WaitGroup
		for _, b := range []byte("ab") {
			writers.Go(func() {
				for range times {
					app.Write(bytes.Repeat([]byte{b}, size))
				}
			})
		}
		go func() {
			writers.Wait()
			app.Close()
		}()
		got, err := io.ReadAll(client)
		if err != nil || len(got) != 2*size*times {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		for i := 0; i < len(got); i += size {
			if !bytes.Equal(got[i:i+size], bytes.Repeat(got[i:i+1], size)) {
				t.Fatalf("writes are mixed in piece %d", i/size)
			}
		}
	})
}

// Bytes arrive in order whatever the sizes of reads and writes, both ways at once.
func TestSizes(t *testing.T) {
	want := randomBytes(8 << 20)
	onBoth(t, func(t *testing.T, pair func() (*net.TCPConn, conn)) {
		client, app := pair()
		var all sync.WaitGroup
		for i, d := range []struct{ from, to conn }{{client, app}, {app, client}} {
			all.Go(func() {
				r := rand.New(rand.NewPCG(uint64(i), 1))
				for rest := want; len(rest) > 0; {
					n := min(len(rest), 1+r.IntN(1<<r.IntN(19)))
					if _, err := d.from.Write(rest[:n]); err != nil {
						t.Error(err)
						return
					}
					rest = rest[n:]
				}
				d.from.CloseWrite()
			})
			all.Go(func() {
				r := rand.New(rand.NewPCG(uint64(i), 2))
				b := make([]byte, 1<<18)
				for at := 0; ; {
					n, err := d.to.Read(b[:1+r.IntN(1<<r.IntN(19))])
					if !bytes.Equal(b[:n], want[at:min(at+n, len(want))]) {
						t.Errorf("what came is wrong behind byte %d", at)
						return
					}
					at += n
					if err == io.EOF && at == len(want) {
						return
					}
					if err != nil {
						t.Errorf("after %d bytes: %v", at, err)
						return
					}
				}
			})
		}
		all.Wait()
	})
}
