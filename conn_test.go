package relay_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/tcprelay/relay"
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
