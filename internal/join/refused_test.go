package join

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/tcptest"
)

// pairs are what sessions talk over.
var pairs = map[string]func(*testing.T) (net.Conn, net.Conn){
	"pipe": func(*testing.T) (net.Conn, net.Conn) { return net.Pipe() },
	"TCP": func(t *testing.T) (net.Conn, net.Conn) {
		a, b := tcptest.Pair(t)
		return a, b
	},
}

// sessions returns both ends of a session: the relay's, which opens streams, and the
// service's.
func sessions(t *testing.T, pair func(*testing.T) (net.Conn, net.Conn), cfg mux.Config) (relay, service *mux.Session) {
	t.Helper()
	a, b := pair(t)
	relay, service = mux.Server(a, mux.Config{}), mux.Client(b, cfg)
	relay.EnableStop()
	service.EnableStop()
	t.Cleanup(func() { relay.Close(); service.Close() })
	return relay, service
}

// plain is a connection that is no socket for those who look for one.
type plain struct{ *net.TCPConn }

// conns are what a client's connection may be.
var conns = map[string]func(*net.TCPConn) Conn{
	"socket": func(c *net.TCPConn) Conn { return c },
	"plain":  func(c *net.TCPConn) Conn { return plain{c} },
}

// waitFor waits until what is asked for has come.
func waitFor(t *testing.T, what string, there func() bool) {
	t.Helper()
	for giveUp := time.Now().Add(patience); !there(); runtime.Gosched() {
		if time.Now().After(giveUp) {
			t.Fatalf("no %s", what)
		}
	}
}

func goJoin(c Conn, st Stream) chan error {
	done := make(chan error, 1)
	go func() { done <- Join(c, st) }()
	return done
}

func wait(t *testing.T, done chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		buf := make([]byte, 1<<20)
		t.Fatalf("Join does not return\n\n%s", buf[:runtime.Stack(buf, true)])
		return nil
	}
}

// TestRefused has a service refuse its stream at each moment, and another one go on
// with the client as if nothing had been.
func TestRefused(t *testing.T) {
	big := data(Window + 100_000)
	for _, test := range []struct {
		name  string
		send  []byte
		done  bool // and half-closes
		ready func(app *mux.Stream) bool
		head  int // the least
	}{
		{"idle", nil, false, func(*mux.Stream) bool { return true }, 0},
		{"some bytes", big[:1000], false, func(app *mux.Stream) bool { return app.Unread() == 1000 }, 1000},
		{"amid the bytes", big, false, func(app *mux.Stream) bool { return app.Unread() > 0 }, 1},
		{"spent window", big, false, func(app *mux.Stream) bool { return app.Unread() == Window }, Window},
		{"half-closed", nil, true, func(app *mux.Stream) bool { return app.Progress().HalfClosed }, 0},
		{"half-closed behind bytes", big[:1000], true, func(app *mux.Stream) bool { return app.Progress().HalfClosed }, 1000},
	} {
		for pair := range pairs {
			for kind := range conns {
				t.Run(fmt.Sprintf("%s/%s/%s", test.name, pair, kind), func(t *testing.T) {
					relay, service := sessions(t, pairs[pair], mux.Config{})
					client, accepted := tcptest.Pair(t)
					client.SetDeadline(time.Now().Add(patience))
					c := conns[kind](accepted)
					st, err := relay.Open(nil)
					if err != nil {
						t.Fatal(err)
					}
					st.Keep(1 << 20)
					joined := goJoin(c, st)
					app, err := service.Accept()
					if err != nil {
						t.Fatal(err)
					}
					written := make(chan error, 1)
					go func() {
						_, err := client.Write(test.send)
						if test.done {
							client.CloseWrite()
						}
						written <- err
					}()
					waitFor(t, test.name, func() bool { return test.ready(app) })
					if err := app.Refuse(); err != nil {
						t.Fatal(err)
					}
					err = wait(t, joined)
					refused, ok := errors.AsType[*Refused](err)
					if !ok {
						t.Fatalf("Join: %v", err)
					}
					if want := (mux.StreamError{Code: mux.StreamRefused, Remote: true}); !isStreamError(refused, want) || !errors.Is(refused, syscall.ECONNRESET) {
						t.Errorf("the error is %v", refused)
					}
					if n := len(refused.Head); n < test.head || !bytes.HasPrefix(test.send, refused.Head) {
						t.Fatalf("the head is %d bytes, or other ones", n)
					}
					if err := st.Close(); err != net.ErrClosed {
						t.Errorf("the stream was left open: %v", err)
					}

					if st, err = relay.Open(nil); err != nil {
						t.Fatal(err)
					}
					if app, err = service.Accept(); err != nil {
						t.Fatal(err)
					}
					app.SetDeadline(time.Now().Add(patience))
					read := make(chan struct{})
					go func() {
						defer close(read)
						readAll(t, app, test.send)
						app.Write([]byte("answer"))
						app.Close()
					}()
					if _, err := st.Write(refused.Head); err != nil {
						t.Fatal(err)
					}
					joined = goJoin(c, st)
					if err := <-written; err != nil {
						t.Errorf("the client writes: %v", err)
					}
					if !test.done {
						client.CloseWrite()
					}
					<-read
					readAll(t, client, []byte("answer"))
					if err := wait(t, joined); err != nil {
						t.Errorf("Join: %v", err)
					}
				})
			}
		}
	}
}

// Window is what a service takes of a stream that it does not read.
const Window = mux.Window

func isStreamError(err error, want mux.StreamError) bool {
	se, ok := errors.AsType[*mux.StreamError](err)
	return ok && *se == want
}

// TestRefusedBefore joins streams whose refusal is there already.
func TestRefusedBefore(t *testing.T) {
	for name, code := range map[string]mux.Code{"RefuseStreams": mux.StreamRefused, "backlog": mux.AcceptQueueFull} {
		t.Run(name, func(t *testing.T) {
			relay, service := sessions(t, pairs["TCP"], mux.Config{Backlog: 1})
			if code == mux.StreamRefused {
				service.RefuseStreams()
			} else if _, err := relay.Open(nil); err != nil {
				t.Fatal(err)
			}
			st, err := relay.Open(nil)
			if err != nil {
				t.Fatal(err)
			}
			waitFor(t, "refusal", func() bool { ended, _ := st.Ended(); return ended })
			st.Keep(1000)
			client, c := tcptest.Pair(t)
			client.Write([]byte("hello"))
			err = wait(t, goJoin(c, st))
			refused, ok := errors.AsType[*Refused](err)
			if !ok || len(refused.Head) != 0 || !isStreamError(err, mux.StreamError{Code: code, Remote: true}) {
				t.Fatalf("Join: %v", err)
			}
			b := make([]byte, 5)
			c.SetReadDeadline(time.Now().Add(patience))
			if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
				t.Errorf("read %q, %v", b, err)
			}
		})
	}
}

// TestNotRefused resets the client, as ever, when the stream did not keep everything,
// or was in use.
func TestNotRefused(t *testing.T) {
	for _, test := range []struct {
		name string
		keep int
		use  func(app *mux.Stream)
		want mux.Code
	}{
		{"no Keep", -1, func(*mux.Stream) {}, mux.StreamRefused},
		{"beyond the limit", 999, func(*mux.Stream) {}, mux.StreamRefused},
		{"read", 10_000, func(app *mux.Stream) { app.Read(make([]byte, 1)) }, mux.StreamReset},
		{"written to", 10_000, func(app *mux.Stream) { app.Write([]byte("x")) }, mux.StreamReset},
		{"half-closed", 10_000, func(app *mux.Stream) { app.CloseWrite() }, mux.StreamReset},
	} {
		for kind := range conns {
			t.Run(test.name+"/"+kind, func(t *testing.T) {
				relay, service := sessions(t, pairs["TCP"], mux.Config{})
				client, accepted := tcptest.Pair(t)
				client.SetDeadline(time.Now().Add(patience))
				c := conns[kind](accepted)
				st, err := relay.Open(nil)
				if err != nil {
					t.Fatal(err)
				}
				if test.keep >= 0 {
					st.Keep(test.keep)
				}
				joined := goJoin(c, st)
				app, err := service.Accept()
				if err != nil {
					t.Fatal(err)
				}
				client.Write(data(1000))
				waitFor(t, "bytes", func() bool { return app.Unread() == 1000 })
				test.use(app)
				app.Refuse()
				err = wait(t, joined)
				if _, ok := errors.AsType[*Refused](err); ok || !isStreamError(err, mux.StreamError{Code: test.want, Remote: true}) {
					t.Errorf("Join: %v", err)
				}
				if test.name != "half-closed" { // whose end the client may have read before
					readReset(t, client)
				}
			})
		}
	}
}

// TestRefusedAtRandom has some services refuse a client one after the other, at any
// moment, before one takes it. What comes out in the end, both ways, is what was sent.
func TestRefusedAtRandom(t *testing.T) {
	for pair := range pairs {
		for kind := range conns {
			t.Run(pair+"/"+kind, func(t *testing.T) {
				for seed := range uint64(150) {
					refuseAtRandom(t, rand.New(rand.NewPCG(seed, 0)), pairs[pair], conns[kind])
					if t.Failed() {
						t.Fatalf("with seed %d", seed)
					}
				}
			})
		}
	}
}

func refuseAtRandom(t *testing.T, rnd *rand.Rand, pair func(*testing.T) (net.Conn, net.Conn), kind func(*net.TCPConn) Conn) {
	client, accepted := tcptest.Pair(t)
	defer client.Close()
	defer accepted.Close()
	client.SetDeadline(time.Now().Add(patience))
	c := kind(accepted)
	dither := func() func() {
		seed := rnd.Uint64()
		own := rand.New(rand.NewPCG(seed, 1))
		return func() {
			for range own.IntN(1 + own.IntN(300)) {
				runtime.Gosched()
			}
		}
	}
	question := data(rnd.IntN(1 + rnd.IntN(Window+150_000)))
	answer := data(rnd.IntN(300_000))
	refusals := 1 + rnd.IntN(4)

	// The client.
	pieces, pause := 1+rnd.IntN(1+len(question)/3), dither()
	asked := make(chan error, 1)
	go func() {
		for rest := question; len(rest) > 0; {
			n, err := client.Write(rest[:min(len(rest), pieces)])
			if err != nil {
				asked <- err
				return
			}
			rest = rest[n:]
			pause()
		}
		asked <- client.CloseWrite()
	}()
	type bytesRead struct {
		b   []byte
		err error
	}
	answered := make(chan bytesRead, 1)
	go func() {
		b, err := io.ReadAll(struct{ io.Reader }{client})
		answered <- bytesRead{b, err}
	}()

	// The relay. It goes from one service to the next.
	var head []byte
	for range refusals {
		relay, service := sessions(t, pair, mux.Config{Backlog: 1})
		switch rnd.IntN(6) {
		case 0:
			service.RefuseStreams()
		case 1:
			if _, err := relay.Open(nil); err != nil {
				t.Fatal(err)
			}
		default:
			pause, enough := dither(), rnd.IntN(1+len(question))
			go func() {
				app, err := service.Accept()
				if err != nil {
					return // the test is over
				}
				for range 50 { // or whenever
					if pause(); app.Unread() >= enough {
						break
					}
				}
				app.Refuse()
			}()
		}
		st, err := relay.Open(nil)
		if err != nil {
			t.Fatal(err)
		}
		st.Keep(1 << 20)
		if _, err := st.Write(head); err != nil { // and the rest of head is still here
			if _, ok := st.Kept(); !ok {
				t.Fatalf("writing the head: %v", err)
			}
			st.Close()
		} else {
			err := wait(t, goJoin(c, st))
			refused, ok := errors.AsType[*Refused](err)
			if !ok {
				t.Fatalf("Join: %v", err)
			}
			head = refused.Head
			if !bytes.HasPrefix(question, head) {
				t.Fatalf("the head of %d bytes is not what the client sent", len(head))
			}
		}
		relay.Close()
		service.Close()
	}
	relay, service := sessions(t, pair, mux.Config{})
	defer service.Close()
	defer relay.Close()
	first := rnd.IntN(2) == 0 // the service speaks first
	came := make(chan bytesRead, 1)
	go func() {
		app, err := service.Accept()
		if err != nil {
			came <- bytesRead{nil, err}
			return
		}
		if first {
			go func() { app.Write(answer); app.CloseWrite() }()
		}
		b, err := io.ReadAll(struct{ io.Reader }{app})
		if !first {
			app.Write(answer)
			app.CloseWrite()
		}
		came <- bytesRead{b, err}
	}()
	st, err := relay.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write(head); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, goJoin(c, st)); err != nil {
		t.Errorf("Join: %v", err)
	}
	if got := <-came; !bytes.Equal(got.b, question) || got.err != nil {
		t.Errorf("the service read %d bytes, or other ones, want %d: %v", len(got.b), len(question), got.err)
	}
	if got := <-answered; !bytes.Equal(got.b, answer) || got.err != nil {
		t.Errorf("the client read %d bytes, or other ones, want %d: %v", len(got.b), len(answer), got.err)
	}
	if err := <-asked; err != nil {
		t.Errorf("the client writes: %v", err)
	}
}

// fakeConn is a client's connection whose Read waits for a read deadline and then says
// what a test wants.
type fakeConn struct {
	Conn
	says  error // of Read
	sets  error // of SetReadDeadline
	ended chan struct{}
	once  sync.Once
}

func (c *fakeConn) Read([]byte) (int, error) {
	<-c.ended
	return 0, c.says
}

func (c *fakeConn) SetReadDeadline(t time.Time) error {
	if !t.IsZero() {
		c.end()
	}
	return c.sets
}

func (c *fakeConn) Close() error {
	c.end()
	return c.Conn.Close()
}

func (c *fakeConn) end() { c.once.Do(func() { close(c.ended) }) }

// refusedStream returns a stream that was refused with bytes kept.
func refusedStream(t *testing.T) *mux.Stream {
	t.Helper()
	relay, service := sessions(t, pairs["pipe"], mux.Config{})
	st, err := relay.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	st.Keep(1000)
	if _, err := st.Write([]byte("head")); err != nil {
		t.Fatal(err)
	}
	app, err := service.Accept()
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "bytes", func() bool { return app.Unread() == 4 })
	app.Refuse()
	waitFor(t, "refusal", func() bool { ended, _ := st.Ended(); return ended })
	return st
}

// lateStream is a refused stream whose ReadFrom reads although it knows better, as if
// the refusal had come right behind its start.
type lateStream struct {
	*mux.Stream
	kept func() ([]byte, bool)
}

func (st *lateStream) ReadFrom(r io.Reader) (int64, error) {
	_, err := r.Read(make([]byte, 1))
	if err == io.EOF {
		err = nil
	}
	return 0, err
}

func (st *lateStream) Kept() ([]byte, bool) {
	if st.kept != nil {
		return st.kept()
	}
	return st.Stream.Kept()
}

// TestClientErrorAtRefusal has the client's connection fail in the moment of the
// refusal. That would not show again, and so it counts.
func TestClientErrorAtRefusal(t *testing.T) {
	unsupported := errors.New("no deadlines")
	for _, test := range []struct {
		name       string
		says, sets error
		want       error // nil: a *Refused
	}{
		{"deadline", &net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, nil, nil},
		{"EOF", io.EOF, nil, nil},
		{"reset", &net.OpError{Op: "read", Err: syscall.ECONNRESET}, nil, syscall.ECONNRESET},
		{"timeout of its own", &net.OpError{Op: "read", Err: syscall.ETIMEDOUT}, nil, syscall.ETIMEDOUT},
		{"closed", &net.OpError{Op: "read", Err: net.ErrClosed}, nil, net.ErrClosed},
		{"no deadlines", os.ErrDeadlineExceeded, unsupported, &mux.StreamError{Code: mux.StreamRefused, Remote: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			client, accepted := tcptest.Pair(t)
			client.SetDeadline(time.Now().Add(patience))
			c := &fakeConn{Conn: accepted, says: test.says, sets: test.sets, ended: make(chan struct{})}
			err := wait(t, goJoin(c, &lateStream{Stream: refusedStream(t)}))
			refused, ok := errors.AsType[*Refused](err)
			if test.want == nil {
				if !ok || string(refused.Head) != "head" {
					t.Fatalf("Join: %v", err)
				}
				go accepted.Write([]byte("x")) // it is open
				if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
					t.Errorf("the client reads: %v", err)
				}
				return
			}
			if want, isStream := test.want.(*mux.StreamError); ok || isStream && !isStreamError(err, *want) || !isStream && !errors.Is(err, test.want) {
				t.Errorf("Join: %v, want %v", err, test.want)
			}
			readReset(t, client)
		})
	}
}

// TestRefusedAndClosed has somebody else close the stream, and so drop what it kept,
// when it was refused. Without that the client cannot go on.
func TestRefusedAndClosed(t *testing.T) {
	for last := range int32(5) { // that the copy is asked for and still there
		client, accepted := tcptest.Pair(t)
		client.SetDeadline(time.Now().Add(patience))
		c := &fakeConn{Conn: accepted, says: os.ErrDeadlineExceeded, ended: make(chan struct{})}
		st := &lateStream{Stream: refusedStream(t)}
		var asked atomic.Int32
		st.kept = func() ([]byte, bool) {
			if asked.Add(1) > last {
				st.Stream.Close()
			}
			return st.Stream.Kept()
		}
		err := wait(t, goJoin(c, st))
		if refused, ok := errors.AsType[*Refused](err); ok {
			if asked.Load() > last || string(refused.Head) != "head" {
				t.Errorf("Join: %v, with the head %q", err, refused.Head)
			}
			continue
		}
		if err == nil {
			t.Error("Join: no error")
		}
		readReset(t, client)
	}
}

// lateEnd is a stream that tells of its end when Join is over.
type lateEnd struct {
	*mux.Stream
	ended func(error)
}

func (st *lateEnd) OnEnd(f func(error)) { st.ended = f }

// TestLateEnd tells a Join that is over of the stream's end. It leaves the client
// alone, who may be in another Join.
func TestLateEnd(t *testing.T) {
	client, c := tcptest.Pair(t)
	client.SetDeadline(time.Now().Add(patience))
	st := &lateEnd{Stream: refusedStream(t)}
	err := Join(c, st)
	if _, ok := errors.AsType[*Refused](err); !ok {
		t.Fatalf("Join: %v", err)
	}
	st.ended(errors.New("late"))
	client.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Errorf("the connection reads: %v", err)
	}
	c.Write([]byte("x"))
	if _, err := client.Read(make([]byte, 1)); err != nil {
		t.Errorf("the client reads: %v", err)
	}
}
