package relay_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

// expectClosed checks an error of a listener's after its Close.
func expectClosed(t testing.TB, what string, err error) {
	t.Helper()
	if op, ok := err.(*net.OpError); !ok || !errors.Is(err, net.ErrClosed) || op.Net != "tcp" {
		t.Errorf("%s: %#v", what, err)
	}
}

// Close ends every Accept that waits, and those that come later, and all that the
// listener has at the relay.
func TestListenerClose(t *testing.T) {
	srv, addr, log := startLogged(t)
	check := nothingLeft(t)
	l := register(t, addr)
	accepted := make(chan error, 3)
	for range 3 {
		go func() {
			_, err := l.Accept()
			accepted <- err
		}()
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		expectClosed(t, "Accept that waited", within(t, "Accept's return", accepted))
	}
	_, err := l.Accept()
	expectClosed(t, "Accept", err)
	expectClosed(t, "Close again", l.Close())
	log.wait(t, "session ended", 1)
	eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
	if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
		c.Close()
		t.Error("the public listener is open")
	}
	_, err = l.Accept() // the session is over by now, or will be; it is still closed
	expectClosed(t, "Accept", err)
	check()
}

// After Close the accepted conns live on, and those that waited are reset. The
// service at the relay ends with the last conn.
func TestListenerCloseKeepsConns(t *testing.T) {
	srv, addr, log := startLogged(t)
	check := nothingLeft(t)
	l := register(t, addr)
	client, app := dial(t, l), accept(t, l)
	client2, app2 := dial(t, l), accept(t, l)
	var waiting []*net.TCPConn
	for range 5 {
		c := dial(t, l)
		c.Write([]byte("hello?"))
		waiting = append(waiting, c)
	}
	eventually(t, "all at the app", func() bool { return srv.Services()[0].BytesIn == 5*6 })
	// Those bytes have left the relay. What the app has of them it has in order, so
	// when this comes back they are there.
	sendAndExpect(t, client, app)

	l.Close()
	for _, c := range waiting {
		expectReset(t, c)
		c.Close()
	}
	sendAndExpect(t, client, app)
	sendAndExpect(t, client2, app2)
	eventually(t, "all refused", func() bool { return srv.Services()[0].Refused == int64(len(waiting)) })
	eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })
	s := srv.Services()
	if len(s) != 1 || len(s[0].Clients) != 2 || s[0].Accepted != 2+5 || !maps.Equal(s[0].Refusals, map[string]int64{"no_app": 5}) {
		t.Errorf("services %+v", s)
	}
	if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
		c.Close()
		t.Error("the public listener is open")
	}
	if got := l.Stats(); got.Accepted != 2 || got.Live != 2 || got.Refused != 5 {
		t.Errorf("stats %+v", got)
	}
	// What the last conn wrote arrives, although the session is over then.
	app2.Close()
	want := randomBytes(200_000)
	if _, err := app.Write(want); err != nil {
		t.Fatal(err)
	}
	app.Close()
	if got, err := io.ReadAll(client); err != nil || string(got) != string(want) {
		t.Errorf("the client reads %d bytes, %v", len(got), err)
	}
	if got, err := io.ReadAll(client2); err != nil || len(got) != 0 {
		t.Errorf("the other client reads %q, %v", got, err)
	}
	log.wait(t, "session ended", 1)
	eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
	if got := l.Stats(); got.Live != 0 || got.Accepted != 2 {
		t.Errorf("stats %+v", got)
	}
	client.Close()
	client2.Close()
	check()
}

// A client that comes while the listener is closed is accepted, reset or not
// connected, and none is left waiting.
func TestListenerCloseRacesClients(t *testing.T) {
	good := wire.AppendProxy(nil,
		net.TCPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.1:1")),
		net.TCPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.2:2")))
	addr, sessions := fakeRelay(t, goodReply)
	for range 200 {
		l := register(t, addr)
		sess := within(t, "a session", sessions)
		var streams []*mux.Stream
		opened := make(chan struct{})
		go func() {
			defer close(opened)
			for range 50 {
				st, err := sess.Open(good)
				if err != nil {
					return
				}
				streams = append(streams, st)
			}
		}()
		app := accept(t, l) // which keeps the session
		l.Close()
		<-opened
		live := 0
		for _, st := range streams {
			st.SetReadDeadline(time.Now().Add(patience))
			if live == 0 && st == streams[0] {
				live++
				continue
			}
			if _, err := st.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Fatalf("a client of %d that was not accepted reads %v", len(streams), err)
			}
		}
		app.Close()
		sess.Close()
	}
}

// When the backlog is full the next client is reset and counted. The others, and
// those that come later, go on.
func TestBacklog(t *testing.T) {
	srv, addr := startRelay(t)
	l := register(t, addr, relay.WithBacklog(2))
	live, liveApp := dial(t, l), accept(t, l)
	first, second := dial(t, l), dial(t, l)
	first.Write([]byte("1"))
	second.Write([]byte("2"))
	eventually(t, "both at the app", func() bool { return srv.Services()[0].BytesIn == 2 })
	sendAndExpect(t, live, liveApp) // so they are
	const over = 10
	for range over {
		c, err := net.Dial("tcp", l.Addr().String())
		if errors.Is(err, syscall.ECONNRESET) {
			continue // so soon
		}
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		expectReset(t, c)
		c.Close()
	}
	// The last of them knows before the app has counted it, over a connection of its own.
	eventually(t, "all of them counted", func() bool { return l.Stats().Refused >= over })
	if got := l.Stats(); got.Refused != over || got.Accepted != 1 {
		t.Errorf("stats %+v", got)
	}
	sendAndExpect(t, live, liveApp)
	seen := make(map[string]bool)
	for _, want := range []string{"1", "2"} {
		app := accept(t, l)
		b := make([]byte, 1)
		if _, err := io.ReadFull(app, b); err != nil {
			t.Fatalf("client %s: %v", want, err)
		}
		seen[string(b)] = true
	}
	if !seen["1"] || !seen["2"] {
		t.Errorf("accepted %v", seen)
	}
	// There is room again.
	c := dial(t, l)
	sendAndExpect(t, c, accept(t, l))
}

// A client that has left before it is accepted is accepted all the same, with what
// it sent, and its addresses.
func TestClientLeavesBeforeAccept(t *testing.T) {
	_, addr, log := startLogged(t)
	l := register(t, addr)
	gone := dial(t, l)
	gone.Write([]byte("bye"))
	gone.CloseWrite()
	cut := dial(t, l)
	cut.Write([]byte("x"))
	cut.SetLinger(0)
	cut.Close()
	log.wait(t, "client left", 1) // the second

	byAddr := map[string]conn{}
	for range 2 {
		app := accept(t, l)
		byAddr[app.RemoteAddr().String()] = app
	}
	app := byAddr[gone.LocalAddr().String()]
	if app == nil || byAddr[cut.LocalAddr().String()] == nil {
		t.Fatalf("accepted %v", byAddr)
	}
	if got, err := io.ReadAll(onlyReader{app}); err != nil || string(got) != "bye" {
		t.Errorf("the app reads %q, %v", got, err)
	}
	app.Write([]byte("and bye"))
	app.Close()
	if got, err := io.ReadAll(gone); err != nil || string(got) != "and bye" {
		t.Errorf("the client reads %q, %v", got, err)
	}
	expectReset(t, byAddr[cut.LocalAddr().String()])
}

// Several goroutines share a listener.
func TestAcceptConcurrently(t *testing.T) {
	_, addr := startRelay(t)
	l := register(t, addr)
	for range 4 {
		go serveEcho(l)
	}
	var clients sync.WaitGroup
	for range 40 {
		c := dial(t, l)
		clients.Go(func() { echoes(t, c) })
	}
	clients.Wait()
	if got := l.Stats(); got.Accepted != 40 {
		t.Errorf("stats %+v", got)
	}
}

// One relay, one app that is many: sessions do not mix.
func TestManyServices(t *testing.T) {
	srv, addr := startRelay(t)
	const n = 20
	for i := range n {
		name := fmt.Sprint("service ", i)
		l := register(t, addr, relay.WithName(name))
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, name)
				c.Close()
			}
		}()
		t.Cleanup(func() { l.Close() })
	}
	for _, s := range srv.Services() {
		c, err := net.Dial("tcp", s.Address)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		if got, err := io.ReadAll(c); err != nil || string(got) != s.Name {
			t.Errorf("%s answers %q, %v", s.Name, got, err)
		}
		c.Close()
	}
	if got := len(srv.Services()); got != n {
		t.Errorf("%d services", got)
	}
}

const goodReply = `{"version":1,"address":"127.0.0.1:9"}` + "\n"

// A fakeSession is a session of a fake relay's, past the reply.
type fakeSession struct {
	*mux.Session
	control *mux.Stream
	lines   *bufio.Reader // of control, behind the hello
}

// fakeRelay answers every hello with reply, and gives the test the session.
func fakeRelay(t testing.TB, reply string) (addr string, sessions <-chan *fakeSession) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	out := make(chan *fakeSession, 1)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			sess := mux.Server(c, mux.Config{})
			t.Cleanup(func() { sess.Close() })
			sess.EnableStop()
			control, err := sess.Accept()
			if err != nil {
				continue
			}
			control.SetReadDeadline(time.Now().Add(patience))
			lines := bufio.NewReader(control)
			if _, err := lines.ReadBytes('\n'); err == nil {
				io.WriteString(control, reply)
				select {
				case out <- &fakeSession{sess, control, lines}:
				case <-stop: // a listener came back that nobody waits for
				}
			}
		}
	}()
	t.Cleanup(func() { close(stop); ln.Close(); <-done })
	return ln.Addr().String(), out
}

// next reads what the app says.
func (s *fakeSession) next(t testing.TB) (m wire.Control) {
	t.Helper()
	line, err := s.lines.ReadBytes('\n')
	if err != nil || json.Unmarshal(line, &m) != nil {
		t.Fatalf("the app says %q, %v", line, err)
	}
	return m
}

// A relay that does not say properly who the client is gets the client back, and
// the next client is not kept waiting.
func TestMalformedProxyHeader(t *testing.T) {
	src := net.TCPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.1:1111"))
	dst := net.TCPAddrFromAddrPort(netip.MustParseAddrPort("198.51.100.2:2222"))
	good := wire.AppendProxy(nil, src, dst)
	changed := func(at int, b ...byte) []byte {
		h := append([]byte(nil), good...)
		copy(h[at:], b)
		return h
	}
	addr, sessions := fakeRelay(t, goodReply)
	var log logbook
	l := register(t, addr, relay.WithLogger(log.logger()))
	sess := within(t, "a session", sessions)

	refused := int64(0)
	for name, opening := range map[string][]byte{
		"none":               nil,
		"the client's bytes": []byte("GET / HTTP/1.1\r\n\r\n"),
		"version 1":          []byte("PROXY TCP4 192.0.2.1 198.51.100.2 1111 2222\r\n"),
		"cut":                good[:len(good)-1],
		"cut to one byte":    good[:1],
		"another version":    changed(12, 0x31),
		"another command":    changed(12, 0x22),
		"UDP":                changed(13, 0x12),
		"longer than it is":  changed(14, 0xff, 0xff),
		"too short for IPv4": changed(14, 0, 8),
	} {
		bad, err := sess.Open(opening)
		if err != nil {
			t.Fatal(err)
		}
		st, err := sess.Open(append(good[:len(good):len(good)], "the client's"...))
		if err != nil {
			t.Fatal(err)
		}
		app := accept(t, l)
		if app.RemoteAddr().String() != src.String() || app.LocalAddr().String() != dst.String() {
			t.Errorf("%s: accepted %v at %v", name, app.RemoteAddr(), app.LocalAddr())
		}
		st.CloseWrite()
		if got, err := io.ReadAll(onlyReader{app}); err != nil || string(got) != "the client's" {
			t.Errorf("%s: the app reads %q, %v", name, got, err)
		}
		app.Close()
		bad.SetReadDeadline(time.Now().Add(patience))
		if _, err := bad.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: the relay reads %v", name, err)
		}
		refused++
		if got := l.Stats(); got.Refused != refused || got.Accepted != refused || got.BytesIn != 12*refused {
			t.Errorf("%s: %+v", name, got)
		}
		if e := log.wait(t, "client refused", int(refused)); len(e) != int(refused) || e[0].level != slog.LevelWarn {
			t.Errorf("%s: logged %+v", name, e)
		}
	}

	// A client whose address the relay does not know is a client.
	for name, opening := range map[string][]byte{
		"unknown": wire.AppendProxy(nil, nil, nil),
		"local":   changed(12, 0x20),
	} {
		if _, err := sess.Open(opening); err != nil {
			t.Fatal(err)
		}
		app := accept(t, l)
		if app.RemoteAddr() == nil || app.RemoteAddr().String() != "unknown" || app.LocalAddr().String() != l.Addr().String() {
			t.Errorf("%s: accepted %v at %v", name, app.RemoteAddr(), app.LocalAddr())
		}
	}
}

// An app that closes and is gone in the next moment has closed: nothing is kept for it.
func TestCloseAndGone(t *testing.T) {
	srv, addr := startRelay(t, relay.WithLease(time.Hour))
	for range 100 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		sess := mux.Client(c, mux.Config{})
		defer sess.Close()
		control, err := sess.Open([]byte(`{"version":1,"name":"gone"}` + "\n"))
		if err != nil {
			t.Fatal(err)
		}
		control.SetDeadline(time.Now().Add(patience))
		if line, err := bufio.NewReader(control).ReadString('\n'); err != nil || !strings.Contains(line, `"lease"`) {
			t.Fatalf("the relay says %q, %v", line, err)
		}
		io.WriteString(control, `{"type":"close"}`+"\n")
		sess.Close()
		eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
	}
}

// What a relay may say, and what it may not.
func TestControl(t *testing.T) {
	addr, sessions := fakeRelay(t, goodReply)
	l := register(t, addr)
	sess := within(t, "a session", sessions)
	if m := sess.next(t); m.Type != wire.Ping {
		t.Errorf("the app says %+v", m)
	}
	io.WriteString(sess.control, `{"type":"from the future"}`+"\n"+`{"type":"ping","id":42}`+"\n")
	if m := sess.next(t); !reflect.DeepEqual(m, wire.Control{Type: wire.Pong, ID: 42}) {
		t.Errorf("the app says %+v", m)
	}
	l.Close()
	if m := sess.next(t); m.Type != wire.Close {
		t.Errorf("the app says %+v", m)
	}
	// The relay has the last word, and the session is its to end.
	io.WriteString(sess.control, `{"type":"closed"}`+"\n"+`{"type":"ping","id":43}`+"\n")
	if m := sess.next(t); !reflect.DeepEqual(m, wire.Control{Type: wire.Pong, ID: 43}) {
		t.Errorf("the app says %+v", m)
	}
	sess.Close()
	within(t, "Done", l.Done())

	for name, bad := range map[string]string{"not JSON": "hello\n", "too long": string(make([]byte, 17<<10)), "cut": `{"type":`} {
		told, events := watch(relay.EventLost)
		l := register(t, addr, told, relay.WithBackoff(never, never))
		sess := within(t, "a session", sessions)
		io.WriteString(sess.control, bad)
		sess.control.CloseWrite()
		if ev := next(t, events, relay.EventLost); ev.Err == nil || errors.Is(ev.Err, net.ErrClosed) {
			t.Errorf("%s: event %+v", name, ev)
		}
		within(t, "the session's end", sess.Done())
		l.Close()
	}

	// A relay that says no more may go on carrying clients.
	l = register(t, addr)
	sess = within(t, "a session", sessions)
	sess.control.CloseWrite()
	if _, err := sess.Open(wire.AppendProxy(nil, nil, nil)); err != nil {
		t.Fatal(err)
	}
	accept(t, l).Close()
}

// A lost session is no error of Accept's: that waits until the listener is back. Close
// is as usual.
func TestAcceptAfterSessionLost(t *testing.T) {
	srv, addr := startRelay(t)
	for _, waiting := range []int{0, 1} { // clients in the backlog
		var log logbook
		check := nothingLeft(t)
		told, events := watch(relay.EventLost, relay.EventResumed)
		l, transport := registerTapped(t, addr, relay.WithLogger(log.logger()), told)
		client, app := dial(t, l), accept(t, l)
		var backlog []net.Conn
		for range waiting {
			backlog = append(backlog, dial(t, l))
		}
		eventually(t, "all given to the app", func() bool {
			all := srv.Services() // in the second round those of the first are ending
			return len(all) == 1 && all[0].Accepted == int64(1+waiting)
		})
		sendAndExpect(t, client, app) // so it has them
		transport.Close()
		expectLost(t, events)
		if e := log.wait(t, "lost the relay", 1)[0]; e.level != slog.LevelWarn || e.attrs["err"] == nil {
			t.Errorf("logged %+v", e)
		}
		next(t, events, relay.EventResumed)
		log.wait(t, "back at the relay", 1)
		// Clients that had come went with their session, but for one whose own connection
		// the app refused before the relay knew: it is given to the next session.
		after := dial(t, l)
		afterApp := accept(t, l)
		again := int64(0)
		if overDedicated && waiting > 0 && afterApp.RemoteAddr().String() == backlog[0].LocalAddr().String() {
			again = 1
			sendAndExpect(t, backlog[0], afterApp)
			backlog[0].Close()
			afterApp.Close()
			afterApp = accept(t, l)
		}
		expectAddrs(t, after, afterApp)
		sendAndExpect(t, after, afterApp)
		if got := l.Stats(); got.Accepted != 2+again || got.Reconnects != 1 || got.Refused != int64(waiting) {
			t.Errorf("stats %+v", got)
		}
		select {
		case <-l.Done():
			t.Error("Done is closed")
		default:
		}

		last := startAccept(l)
		if err := l.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		expectClosed(t, "Accept that waited", within(t, "Accept's return", last).err)
		_, err := l.Accept()
		expectClosed(t, "Accept", err)
		expectClosed(t, "Close again", l.Close())
		afterApp.Close()
		within(t, "Done", l.Done()) // the other conn's session is no more
		app.Close()
		client.Close()
		after.Close()
		if waiting == 0 { // the others are closed at the test's end
			check()
		}
	}
}
