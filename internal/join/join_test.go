package join

import (
	"bytes"
	"errors"
	"io"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/tcptest"
)

// patience bounds every wait, so that what never happens fails on a line of its own.
const patience = time.Minute

// A rig is a join and its two far ends: a client on a TCP connection, and an app
// behind a stream.
type rig struct {
	client *net.TCPConn
	app    Stream
	// near is the joined end of the app's stream.
	near Stream
	lose func() // ends the session of the stream
	done chan error
}

// rigs are a stream of this module's sessions, one whose peer is a stock muxado
// program as far as its Close goes, and a stream that tells nothing of its end, for
// which a TCP connection does.
var rigs = map[string]func(t *testing.T) *rig{
	"mux":   func(t *testing.T) *rig { return newMuxRig(t, true) },
	"stock": func(t *testing.T) *rig { return newMuxRig(t, false) },
	"TCP": func(t *testing.T) *rig {
		app, near := tcptest.Pair(t)
		return start(t, app, near, nil)
	},
}

func newMuxRig(t *testing.T, ours bool) *rig {
	t.Helper()
	dialled, accepted := tcptest.Pair(t)
	relay, service := mux.Server(accepted, mux.Config{}), mux.Client(dialled, mux.Config{})
	t.Cleanup(func() { relay.Close(); service.Close() })
	if ours {
		relay.EnableStop()
		service.EnableStop()
	}
	near, err := relay.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	app, err := service.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return start(t, app, near, func() { dialled.Close() })
}

func start(t *testing.T, app, near Stream, lose func()) *rig {
	t.Helper()
	client, c := tcptest.Pair(t)
	r := &rig{client: client, app: app, near: near, lose: lose, done: make(chan error, 1)}
	for _, c := range []net.Conn{client, app} {
		c.SetDeadline(time.Now().Add(patience))
	}
	go func() { r.done <- Join(c, near) }()
	t.Cleanup(func() { client.Close(); app.Close() })
	return r
}

// ended waits for Join to return, with an error or without, and checks that both
// ends that it was given are closed.
func (r *rig) ended(t *testing.T, broken bool) {
	t.Helper()
	select {
	case err := <-r.done:
		if (err != nil) != broken {
			t.Errorf("Join: %v", err)
		}
	case <-time.After(patience):
		buf := make([]byte, 1<<20)
		t.Fatalf("Join does not return\n\n%s", buf[:runtime.Stack(buf, true)])
	}
	if err := r.near.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the stream was left open: %v", err)
	}
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func readAll(t *testing.T, c net.Conn, want []byte) {
	t.Helper()
	got, err := io.ReadAll(struct{ io.Reader }{c})
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes of %d, %v", len(got), len(want), err)
	}
}

func readReset(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, struct{ io.Reader }{c}); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read to the end: %v, want a reset", err)
	}
}

// meet sends a byte each way.
func (r *rig) meet(t *testing.T) {
	t.Helper()
	for _, d := range [][2]net.Conn{{r.client, r.app}, {r.app, r.client}} {
		b := make([]byte, 1)
		d[0].Write([]byte("x"))
		if _, err := io.ReadFull(d[1], b); err != nil {
			t.Fatal(err)
		}
	}
}

func data(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * i >> 7)
	}
	return b
}

func TestJoin(t *testing.T) {
	big := data(3<<20 + 1)
	for name, run := range map[string]func(t *testing.T, r *rig){
		"client done first": func(t *testing.T, r *rig) {
			go func() { r.client.Write(big); r.client.CloseWrite() }()
			readAll(t, r.app, big)
			go func() { r.app.Write(big); r.app.CloseWrite() }()
			readAll(t, r.client, big)
			r.ended(t, false)
		},
		"app done first": func(t *testing.T, r *rig) {
			go func() { r.app.Write(big); r.app.CloseWrite() }()
			readAll(t, r.client, big)
			r.meetOneWay(t)
			go func() { r.client.Write(big); r.client.CloseWrite() }()
			readAll(t, r.app, big)
			r.ended(t, false)
		},
		"both at once": func(t *testing.T, r *rig) {
			go func() { r.client.Write(big); r.client.CloseWrite() }()
			go func() { r.app.Write(big); r.app.CloseWrite() }()
			read := make(chan struct{})
			go func() { defer close(read); readAll(t, r.app, big) }()
			readAll(t, r.client, big)
			<-read
			r.ended(t, false)
		},
		"no bytes": func(t *testing.T, r *rig) {
			r.client.CloseWrite()
			readAll(t, r.app, nil)
			r.app.Close()
			readAll(t, r.client, nil)
			r.ended(t, false)
		},
		"client resets": func(t *testing.T, r *rig) {
			r.meet(t)
			r.client.SetLinger(0)
			r.client.Close()
			readReset(t, r.app)
			r.ended(t, true)
		},
		"client resets behind its half-close": func(t *testing.T, r *rig) {
			r.client.CloseWrite()
			readAll(t, r.app, nil)
			r.client.SetLinger(0)
			r.client.Close()
			// It shows when something is written to it.
			var err error
			for err == nil {
				_, err = r.app.Write(big)
			}
			if !isReset(err) {
				t.Errorf("the app writes: %v", err)
			}
			r.ended(t, true)
		},
		"client closes amid a download": func(t *testing.T, r *rig) {
			wrote := make(chan error, 1)
			go func() {
				var err error
				for err == nil {
					_, err = r.app.Write(big)
				}
				wrote <- err
			}()
			if _, err := io.CopyN(io.Discard, r.client, 1<<20); err != nil {
				t.Fatal(err)
			}
			r.client.Close()
			if err := <-wrote; !isReset(err) {
				t.Errorf("the app writes: %v", err)
			}
			r.ended(t, true)
		},
		"app resets": func(t *testing.T, r *rig) {
			r.meet(t)
			r.app.SetLinger(0)
			r.app.Close()
			readReset(t, r.client)
			r.ended(t, true)
		},
		"app resets amid an upload": func(t *testing.T, r *rig) {
			wrote := make(chan error, 1)
			go func() {
				var err error
				for err == nil {
					_, err = r.client.Write(big)
				}
				wrote <- err
			}()
			if _, err := io.CopyN(io.Discard, r.app, 1<<20); err != nil {
				t.Fatal(err)
			}
			r.app.SetLinger(0)
			r.app.Close()
			if err := <-wrote; !isReset(err) {
				t.Errorf("the client writes: %v", err)
			}
			r.ended(t, true)
		},
		"app resets a client that has stopped reading": func(t *testing.T, r *rig) {
			fill(t, r.app)
			r.app.SetLinger(0)
			r.app.Close()
			if r.lose == nil {
				r.client.Close() // nothing else ends a TCP connection that is full
				r.ended(t, true)
				return
			}
			r.ended(t, true)
			readReset(t, r.client)
		},
	} {
		for kind, rig := range rigs {
			t.Run(name+"/"+kind, func(t *testing.T) { run(t, rig(t)) })
		}
	}
}

// meetOneWay sends a byte to the app.
func (r *rig) meetOneWay(t *testing.T) {
	t.Helper()
	r.client.Write([]byte("x"))
	if _, err := io.ReadFull(r.app, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
}

// fill writes until nothing more is taken.
func fill(t *testing.T, c net.Conn) (sent int) {
	t.Helper()
	c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	for {
		n, err := c.Write(data(1 << 20))
		sent += n
		if err != nil {
			if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
				t.Fatal(err)
			}
			c.SetWriteDeadline(time.Now().Add(patience))
			return sent
		}
		if sent > 256<<20 {
			t.Fatal("takes everything")
		}
	}
}

// An app that closes has its bytes delivered, and then its client's connection is
// closed without waiting for the client: a TCP peer that has closed takes nothing
// either.
func TestAppCloses(t *testing.T) {
	big := data(1 << 20)
	t.Run("idle client", func(t *testing.T) {
		r := rigs["mux"](t)
		go func() { r.app.Write(big); r.app.Close() }()
		readAll(t, r.client, big)
		r.ended(t, false)
		waitReset(t, r.client)
	})
	t.Run("sending client", func(t *testing.T) {
		r := rigs["mux"](t)
		wrote := make(chan error, 1)
		go func() {
			var err error
			for err == nil {
				_, err = r.client.Write(big)
			}
			wrote <- err
		}()
		if _, err := io.CopyN(io.Discard, r.app, 1<<20); err != nil {
			t.Fatal(err)
		}
		r.app.Close()
		if err := <-wrote; !isReset(err) {
			t.Errorf("the client writes: %v", err)
		}
		select {
		case <-r.done: // with what the client had not got rid of, or without
		case <-time.After(patience):
			t.Fatal("Join does not return")
		}
	})
	t.Run("stopped client", func(t *testing.T) {
		r := rigs["mux"](t)
		sent := fill(t, r.app)
		r.app.Close()
		select {
		case err := <-r.done:
			t.Fatalf("Join did not wait: %v", err)
		default:
		}
		if n, err := io.Copy(io.Discard, r.client); err != nil || n != int64(sent) {
			t.Errorf("the client reads %d bytes of %d, %v", n, sent, err)
		}
		r.ended(t, false)
	})
	t.Run("stopped client that leaves", func(t *testing.T) {
		r := rigs["mux"](t)
		fill(t, r.app)
		r.app.Close()
		r.client.Close()
		r.ended(t, true)
	})
	t.Run("stock, idle client", func(t *testing.T) {
		// It is not told that nothing more is read until it sends.
		r := rigs["stock"](t)
		go func() { r.app.Write(big); r.app.Close() }()
		readAll(t, r.client, big)
		waitReset(t, r.client)
		select {
		case <-r.done:
		case <-time.After(patience):
			t.Fatal("Join does not return")
		}
	})
}

// waitReset writes to c until that fails.
func waitReset(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(patience))
	for {
		if _, err := c.Write([]byte("x")); err != nil {
			if !isReset(err) {
				t.Errorf("write: %v", err)
			}
			return
		}
		runtime.Gosched()
	}
}

// When the stream's session is lost the client is reset, unless it has all that the
// app had to say.
func TestSessionLost(t *testing.T) {
	for _, kind := range []string{"mux", "stock"} {
		t.Run(kind+", idle", func(t *testing.T) {
			r := rigs[kind](t)
			r.meet(t)
			r.lose()
			readReset(t, r.client)
			r.ended(t, true)
		})
		t.Run(kind+", client done", func(t *testing.T) {
			r := rigs[kind](t)
			r.client.CloseWrite()
			readAll(t, r.app, nil)
			r.lose()
			readReset(t, r.client)
			r.ended(t, true)
		})
		t.Run(kind+", stopped client", func(t *testing.T) {
			r := rigs[kind](t)
			fill(t, r.app)
			r.lose()
			r.ended(t, true)
			readReset(t, r.client)
		})
		t.Run(kind+", app done", func(t *testing.T) {
			r := rigs[kind](t)
			r.app.Write([]byte("all"))
			r.app.CloseWrite()
			readAll(t, r.client, []byte("all"))
			r.lose()
			r.ended(t, false)
		})
		t.Run(kind+", both done", func(t *testing.T) {
			r := rigs[kind](t)
			r.client.CloseWrite()
			readAll(t, r.app, nil)
			r.app.Write([]byte("all"))
			r.app.Close()
			readAll(t, r.client, []byte("all"))
			r.lose()
			r.ended(t, false)
		})
	}
}

// A stream whose end came before the join is joined to no purpose, and not for long.
func TestEndedBefore(t *testing.T) {
	for name, end := range map[string]func(app, near *mux.Stream){
		"reset":  func(app, _ *mux.Stream) { app.SetLinger(0); app.Close() },
		"closed": func(_, near *mux.Stream) { near.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			dialled, accepted := tcptest.Pair(t)
			relay, service := mux.Server(accepted, mux.Config{}), mux.Client(dialled, mux.Config{})
			defer relay.Close()
			defer service.Close()
			near, err := relay.Open(nil)
			if err != nil {
				t.Fatal(err)
			}
			app, err := service.Accept()
			if err != nil {
				t.Fatal(err)
			}
			end(app, near)
			near.SetDeadline(time.Now().Add(patience))
			near.Read(make([]byte, 1)) // until the end is here
			r := start(t, app, near, nil)
			r.ended(t, true)
			readReset(t, r.client)
		})
	}
}

// A pair that is idle has one goroutine, whichever of the two has half-closed.
func TestOneGoroutine(t *testing.T) {
	for _, half := range []string{"", "client", "app"} {
		t.Run(half, func(t *testing.T) {
			r := rigs["mux"](t)
			r.meet(t)
			from, to := Conn(r.client), Conn(r.app)
			switch half {
			case "app":
				from, to = to, from
				fallthrough
			case "client":
				from.CloseWrite()
				readAll(t, to, nil)
			}
			carriers := 0
			for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
				buf := make([]byte, 1<<20)
				all := buf[:runtime.Stack(buf, true)]
				carriers = bytes.Count(all, []byte("(*joint).run("))
				others := bytes.Count(all, []byte("(*joint).")) - carriers - bytes.Count(all, []byte("(*joint).connToStream("))
				if carriers == 1 && others == 0 && !bytes.Contains(all, []byte("(*Stream).runSink(")) {
					break
				}
				carriers = 0
			}
			if carriers != 1 {
				t.Error("it has others too, or none")
			}
			r.client.Close()
			r.app.Close()
			<-r.done
		})
	}
}

// A connection that was told to linger does not hold up the session that its stream is one
// of many in, when the app has closed it and the client reads nothing.
func TestLinger(t *testing.T) {
	dialled, accepted := tcptest.Pair(t)
	relay, service := mux.Server(accepted, mux.Config{}), mux.Client(dialled, mux.Config{})
	t.Cleanup(func() { relay.Close(); service.Close() })
	relay.EnableStop()
	service.EnableStop()
	open := func() (near, app *mux.Stream) {
		t.Helper()
		near, err := relay.Open(nil)
		if err != nil {
			t.Fatal(err)
		}
		if app, err = service.Accept(); err != nil {
			t.Fatal(err)
		}
		return near, app
	}
	near, app := open()
	client, c := tcptest.Pair(t)
	client.SetReadBuffer(4 << 10)
	c.SetWriteBuffer(1 << 20) // takes all, and cannot send it
	c.SetLinger(int(2 * patience / time.Second))
	done := make(chan error, 1)
	Start(c, near, func(err error) { done <- err })
	if _, err := app.Write(make([]byte, mux.Window)); err != nil {
		t.Fatal(err)
	}
	app.Close()
	near2, app2 := open()
	near2.SetReadDeadline(time.Now().Add(patience))
	app2.Write([]byte("x"))
	if n, err := near2.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("another stream reads %d bytes, %v", n, err)
	}
	client.Close()
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("the pair does not end")
	}
}
