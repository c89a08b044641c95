package dedicated

import (
	"bytes"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/leak"
	"github.com/tcprelay/relay/internal/tcptest"
	"github.com/tcprelay/relay/internal/wire"
)

func TestMain(m *testing.M) { leak.Main(m) }

var header = wire.AppendProxy(nil, nil, nil)

// pair returns the two ends of a connection that has a client, over a socket.
func pair(t *testing.T, limit int) (relay, app *Conn) {
	t.Helper()
	a, b := tcptest.Pair(t)
	ended := make(chan struct{}, 2)
	over := func() { ended <- struct{}{} }
	app, relay = New(a, over), New(b, over)
	t.Cleanup(func() {
		relay.Fail(net.ErrClosed)
		app.Fail(net.ErrClosed)
		for range 2 {
			<-ended
		}
	})
	if app.Spent() || relay.Spent() {
		t.Error("a new connection is of no use")
	}
	if err := relay.Begin(header, limit); err != nil {
		t.Fatal(err)
	}
	if got, err := app.Await(); err != nil || !bytes.Equal(got, header) {
		t.Fatalf("header %q, %v", got, err)
	}
	return relay, app
}

func TestTaken(t *testing.T) {
	relay, app := pair(t, 100)
	io.WriteString(relay, "question")
	if _, ok := relay.Kept(); ok {
		t.Error("refused before it is")
	}
	app.Take()
	b := make([]byte, 8)
	if _, err := io.ReadFull(app, b); err != nil || string(b) != "question" {
		t.Fatalf("%q, %v", b, err)
	}
	io.WriteString(app, "answer")
	app.CloseWrite()
	var got bytes.Buffer
	if n, err := relay.WriteTo(&got); n != 6 || err != nil || got.String() != "answer" {
		t.Errorf("%q, %v", got.String(), err)
	}
	if _, ok := relay.Kept(); ok {
		t.Error("refused after it was taken")
	}
	if p := relay.Progress(); p.Sent != 8 || p.Received != 6 || !p.HalfClosed {
		t.Errorf("%+v", p)
	}
	if p := app.Progress(); p.Sent != 6 || p.Received != 8 || !p.HalfClosed {
		t.Errorf("%+v", p)
	}
}

func TestRefused(t *testing.T) {
	relay, app := pair(t, 100)
	io.WriteString(relay, "question")
	app.Refuse()
	if _, err := relay.WriteTo(io.Discard); err != ErrRefused {
		t.Errorf("WriteTo: %v", err)
	}
	if b, ok := relay.Kept(); !ok || string(b) != "question" {
		t.Errorf("kept %q, %t", b, ok)
	}
	for what, err := range map[string]error{"CloseWrite": relay.CloseWrite(), "Write": second(relay.Write([]byte("x")))} {
		if err != ErrRefused {
			t.Errorf("%s: %v", what, err)
		}
	}
	// More than may be kept is lost.
	relay, app = pair(t, 5)
	io.WriteString(relay, "question")
	app.Refuse()
	if _, err := relay.WriteTo(io.Discard); err != ErrRefused {
		t.Errorf("WriteTo: %v", err)
	}
	if b, ok := relay.Kept(); ok {
		t.Errorf("kept %q of what was too long", b)
	}
}

func second(_ int, err error) error { return err }

// Anything else than a verdict is none, and nobody else gets the client.
func TestNoVerdict(t *testing.T) {
	for what, say := range map[string]func(app *Conn){
		"another byte": func(app *Conn) { app.t.Write([]byte{7}) },
		"the end":      func(app *Conn) { app.CloseWrite() },
		"a reset":      func(app *Conn) { app.Fail(errors.New("lost")) },
	} {
		relay, app := pair(t, 100)
		say(app)
		if _, err := relay.WriteTo(io.Discard); err == nil || err == ErrRefused {
			t.Errorf("%s: %v", what, err)
		}
		if _, ok := relay.Kept(); ok {
			t.Errorf("%s counts as a refusal", what)
		}
	}
}

// A process that dies resets its connections, also those that it has half-closed.
func TestDeath(t *testing.T) {
	relay, app := pair(t, 0)
	app.Take()
	io.WriteString(app, "half of it")
	app.t.Close() // as the system does
	var got bytes.Buffer
	if _, err := relay.WriteTo(&got); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%q, %v", got.String(), err)
	}
}

// Close tells a peer that goes on that nobody reads it, after what was written.
func TestCloseTells(t *testing.T) {
	relay, app := pair(t, 0)
	app.Take()
	want := bytes.Repeat([]byte("x"), 1<<20)
	relay.Write([]byte("never read"))
	go func() {
		app.Write(want)
		app.Close()
	}()
	var got bytes.Buffer
	if _, err := relay.WriteTo(&got); err != nil || !bytes.Equal(got.Bytes(), want) {
		t.Fatalf("%d bytes of %d, %v", got.Len(), len(want), err)
	}
	relay.Watch() // which is over when the app's end is
	if ended, whole := relay.Ended(); !ended || !whole {
		t.Errorf("ended %t, whole %t", ended, whole)
	}
	if _, err := app.Read(make([]byte, 1)); err != net.ErrClosed {
		t.Errorf("Read after Close: %v", err)
	}
	if err := app.Close(); err != net.ErrClosed {
		t.Errorf("Close after Close: %v", err)
	}
}

// A call that waits ends with Close.
func TestCloseWakes(t *testing.T) {
	relay, app := pair(t, 0)
	app.Take()
	reads, writes := make(chan error, 1), make(chan error, 1)
	go func() { reads <- second(app.Read(make([]byte, 1))) }()
	go func() {
		for {
			if _, err := app.Write(make([]byte, 1<<20)); err != nil {
				writes <- err
				return
			}
		}
	}()
	for p := app.Progress(); p.Sent == 0; p = app.Progress() {
		time.Sleep(time.Millisecond)
	}
	app.Close()
	if err := <-reads; err != net.ErrClosed {
		t.Errorf("Read: %v", err)
	}
	if err := <-writes; err != net.ErrClosed {
		t.Errorf("Write: %v", err)
	}
	relay.Close()
}

func TestUnfit(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if New(a, nil) != nil {
		t.Error("a pipe has a half-close")
	}
}

// Close ends this end's direction at once, also while WriteTo is stuck.
func TestCloseBesideWriteTo(t *testing.T) {
	relay, app := pair(t, 0)
	app.Take()
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		app.WriteTo(w) // which nobody reads from
		close(done)
	}()
	relay.Write([]byte("x"))
	for app.Progress().Unread == 0 || app.in.InHand.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	app.Close()
	if n, err := relay.WriteTo(io.Discard); n != 0 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	r.Close()
	<-done
}
