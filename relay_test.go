package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

// startRelay runs a relay on loopback until the test ends, and returns it and its
// registration address.
func startRelay(t testing.TB, opts ...relay.ServerOption) (*relay.Server, string) {
	t.Helper()
	srv, err := relay.NewServer(opts...)
	if err != nil {
		t.Fatal(err)
	}
	return srv, serve(t, srv, "127.0.0.1:0")
}

// newServer returns a server that is closed at the end of the test.
func newServer(t testing.TB, opts ...relay.ServerOption) *relay.Server {
	t.Helper()
	srv, err := relay.NewServer(opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	return srv
}

// shutdown begins a server's Shutdown, and returns where its end is told.
func shutdown(t testing.TB, srv *relay.Server) <-chan error {
	done := make(chan error, 1)
	go func() { done <- srv.Shutdown(t.Context()) }()
	return done
}

// serve has services register at the TCP address listen until the test ends, and
// returns the address that this has become.
func serve(t testing.TB, srv *relay.Server, listen string) string {
	t.Helper()
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, srv, ln)
	return ln.Addr().String()
}

func serveOn(t testing.TB, srv *relay.Server, ln net.Listener) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Close()
		if err := within(t, "Serve's return", done); err != relay.ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
	})
}

func register(t testing.TB, addr string, opts ...relay.RegisterOption) *relay.Listener {
	t.Helper()
	l, err := signUp(t.Context(), addr, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func testLogger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

// dial connects a client to a public address. What it waits for and does not come
// fails.
func dial(t testing.TB, ln net.Listener) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// accept returns the next client, with the same patience.
func accept(t testing.TB, ln net.Listener) conn {
	t.Helper()
	return accepted(t, startAccept(ln))
}

// An acceptance is what Accept returned.
type acceptance struct {
	net.Conn
	err error
}

// startAccept has a goroutine call Accept.
func startAccept(ln net.Listener) <-chan acceptance {
	out := make(chan acceptance, 1)
	go func() {
		c, err := ln.Accept()
		out <- acceptance{c, err}
	}()
	return out
}

// accepted returns the client of a call that startAccept has begun.
func accepted(t testing.TB, out <-chan acceptance) conn {
	t.Helper()
	a := within(t, "Accept's return", out)
	if a.err != nil {
		t.Fatal(a.err)
	}
	t.Cleanup(func() { a.Close() })
	a.SetDeadline(time.Now().Add(patience))
	return a.Conn.(conn)
}

// expectWaiting fails the test if a call that startAccept has begun has returned.
func expectWaiting(t testing.TB, out <-chan acceptance) {
	t.Helper()
	select {
	case a := <-out:
		t.Fatalf("Accept: %v, %v", a.Conn, a.err)
	default:
	}
}

// watch returns an option that has events of the given kinds, or all, sent to a channel
// that holds as many as a test brings about.
func watch(kinds ...relay.EventKind) (relay.Option, <-chan relay.Event) {
	events := make(chan relay.Event, 10_000)
	return relay.WithEvents(func(ev relay.Event) {
		if len(kinds) == 0 || slices.Contains(kinds, ev.Kind) {
			events <- ev
		}
	}), events
}

// next returns the next event, which must be of the given kind.
func next(t testing.TB, events <-chan relay.Event, kind relay.EventKind) relay.Event {
	t.Helper()
	ev := within(t, "event "+string(kind), events)
	if ev.Kind != kind {
		t.Fatalf("event %+v, want %q", ev, kind)
	}
	return ev
}

// expectLost waits for the loss of a listener's session, which is told with an error
// that is not taken for the listener's Close.
func expectLost(t testing.TB, events <-chan relay.Event) {
	t.Helper()
	if ev := next(t, events, relay.EventLost); ev.Err == nil || errors.Is(ev.Err, net.ErrClosed) {
		t.Errorf("event %+v", ev)
	}
}

// never is a backoff longer than any test, for listeners that are not to come back.
const never = 100 * time.Hour

// serveEcho echoes to every client until the listener ends.
func serveEcho(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
		}()
	}
}

// echoes fails the test unless what c sends comes back.
func echoes(t testing.TB, c net.Conn) {
	t.Helper()
	want := []byte("there and back")
	if _, err := c.Write(want); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("echo of %q: %q, %v", want, got, err)
	}
}

// expectByte waits for one byte.
func expectByte(t testing.TB, c net.Conn, want byte) {
	t.Helper()
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err != nil || b[0] != want {
		t.Fatalf("read %q, %v", b, err)
	}
}

// isReset reports whether an end that was broken off, or is gone, is told as one.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// expectReset reads to the end of c, which must be a reset and not look like a
// clean one.
func expectReset(t testing.TB, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, onlyReader{c}); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read to the end: %v, want a reset", err)
	}
}

// onlyReader and onlyWriter hide all else that a conn can do.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

// A logbook keeps what is logged to it, and lets tests wait for it. Its zero value
// is ready.
type logbook struct {
	mu      sync.Mutex
	records []entry
	changed chan struct{} // closed at the next record
}

type entry struct {
	level slog.Level
	msg   string
	attrs map[string]any
}

func (b *logbook) logger() *slog.Logger { return slog.New(&bookHandler{book: b}) }

// with returns the entries of a message, or all of them.
func (b *logbook) with(msg string) []entry {
	found, _ := b.look(msg)
	return found
}

func (b *logbook) look(msg string) (found []entry, changed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.changed == nil {
		b.changed = make(chan struct{})
	}
	for _, e := range b.records {
		if msg == "" || e.msg == msg {
			found = append(found, e)
		}
	}
	return found, b.changed
}

// wait waits until a message was logged n times, and returns its entries.
func (b *logbook) wait(t testing.TB, msg string, n int) []entry {
	t.Helper()
	giveUp := time.After(patience)
	for {
		found, changed := b.look(msg)
		if len(found) >= n {
			return found
		}
		select {
		case <-changed:
		case <-giveUp:
			t.Fatalf("logged %d times and not %d: %q; the log: %+v", len(found), n, msg, b.with(""))
		}
	}
}

// forget empties the book.
func (b *logbook) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.records = nil
}

type bookHandler struct {
	book  *logbook
	attrs []slog.Attr
}

func (h *bookHandler) Enabled(context.Context, slog.Level) bool { return true }
func (h *bookHandler) WithGroup(string) slog.Handler            { return h }

func (h *bookHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &bookHandler{h.book, append(slices.Clip(h.attrs), attrs...)}
}

func (h *bookHandler) Handle(_ context.Context, r slog.Record) error {
	e := entry{r.Level, r.Message, make(map[string]any)}
	add := func(a slog.Attr) bool {
		e.attrs[a.Key] = a.Value.Any()
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	h.book.mu.Lock()
	defer h.book.mu.Unlock()
	h.book.records = append(h.book.records, e)
	if h.book.changed != nil {
		close(h.book.changed)
		h.book.changed = nil
	}
	return nil
}

func TestEcho(t *testing.T) {
	_, addr := startRelay(t, relay.WithLogger(testLogger(t)))
	l := register(t, addr, relay.WithLogger(testLogger(t)))
	go serveEcho(l)
	c := dial(t, l)
	want := bytes.Repeat([]byte("relay "), 1<<20)
	go func() {
		c.Write(want)
		c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d of %d bytes came back, %v", len(got), len(want), err)
	}
}

// Bytes are counted for each client and each service, on both sides, without the
// header that the relay puts in front of a client's.
func TestCounts(t *testing.T) {
	var log logbook
	told, events := watch(relay.EventClientLeft, relay.EventEnded)
	srv, addr := startRelay(t, relay.WithLogger(log.logger()), told)
	l := register(t, addr, relay.WithName("counted"))

	type count struct{ in, out int64 }
	want := make(map[string]count) // by the client's address
	var clients []*net.TCPConn
	var apps []conn
	for _, n := range []count{{3, 70_000}, {500_000, 1}} {
		c := dial(t, l)
		a := accept(t, l)
		go c.Write(make([]byte, n.in))
		if _, err := io.ReadFull(a, make([]byte, n.in)); err != nil {
			t.Fatal(err)
		}
		go a.Write(make([]byte, n.out))
		if _, err := io.ReadFull(c, make([]byte, n.out)); err != nil {
			t.Fatal(err)
		}
		want[c.LocalAddr().String()] = n
		clients, apps = append(clients, c), append(apps, a)
	}

	check := func(when string, live int) {
		t.Helper()
		infos := srv.Services()
		if len(infos) != 1 {
			t.Fatalf("%s: %d services", when, len(infos))
		}
		s := infos[0]
		if s.Name != "counted" || s.Address != l.Addr().String() || s.Since.IsZero() || s.Draining {
			t.Errorf("%s: service %+v", when, s)
		}
		if host, _, err := net.SplitHostPort(s.Sessions[0].Remote); err != nil || host != "127.0.0.1" {
			t.Errorf("%s: service came from %q", when, s.Sessions[0].Remote)
		}
		if s.Accepted != 2 || s.Refused != 0 || len(s.Clients) != live || s.BytesIn != 500_003 || s.BytesOut != 70_001 {
			t.Errorf("%s: service %+v", when, s)
		}
		for _, c := range s.Clients {
			if got := (count{c.BytesIn, c.BytesOut}); got != want[c.Remote] || c.Since.Before(s.Since) {
				t.Errorf("%s: client %+v, want %+v", when, c, want[c.Remote])
			}
		}
		if got := l.Stats(); got != (relay.Stats{Accepted: 2, Live: live, BytesIn: 500_003, BytesOut: 70_001, Connected: true}) {
			t.Errorf("%s: listener %+v", when, got)
		}
	}
	// A byte is counted when a socket has taken it, and whoever reads there may have it
	// before that is noted down.
	eventually(t, "all bytes counted", func() bool {
		s, stats := srv.Services(), l.Stats()
		return len(s) == 1 && s[0].BytesIn == 500_003 && s[0].BytesOut == 70_001 &&
			stats.BytesIn == 500_003 && stats.BytesOut == 70_001
	})
	check("both live", 2)
	if first := srv.Services()[0].Clients[0].Remote; first != clients[0].LocalAddr().String() {
		t.Errorf("first client %s, want %s", first, clients[0].LocalAddr())
	}

	apps[0].Close()
	log.wait(t, "client left", 1)
	check("one left", 1)
	apps[1].Close()
	left := log.wait(t, "client left", 2)
	check("both left", 0)

	got := make(map[string]count)
	for _, e := range left {
		in, _ := e.attrs["bytes_in"].(int64)
		out, _ := e.attrs["bytes_out"].(int64)
		client, _ := e.attrs["client"].(string)
		got[client] = count{in, out}
		if e.level != slog.LevelDebug || e.attrs["service"] != "counted" || e.attrs["addr"] != l.Addr().String() {
			t.Errorf("logged %+v", e)
		}
	}
	if !maps.Equal(got, want) {
		t.Errorf("logged %v, want %v", got, want)
	}
	clear(got)
	for range 2 {
		ev := next(t, events, relay.EventClientLeft)
		got[ev.Remote] = count{ev.BytesIn, ev.BytesOut}
		if ev.Service != "counted" || ev.Addr != l.Addr().String() || ev.Err != nil {
			t.Errorf("event %+v", ev)
		}
	}
	if !maps.Equal(got, want) {
		t.Errorf("told %v, want %v", got, want)
	}
	l.Close()
	if e := log.wait(t, "session ended", 1)[0]; e.level != slog.LevelInfo || e.attrs["service"] != "counted" || e.attrs["kept"] != false || e.attrs["err"] != nil {
		t.Errorf("logged %+v", e)
	}
	if ev := next(t, events, relay.EventEnded); ev.Service != "counted" || ev.Err != nil {
		t.Errorf("event %+v", ev)
	}
	if got := l.Stats(); got.BytesIn != 500_003 || got.BytesOut != 70_001 {
		t.Errorf("listener %+v", got)
	}
}

// Several listeners of one relay serve the same books.
func TestServeSeveral(t *testing.T) {
	srv, first := startRelay(t)
	second := serve(t, srv, "127.0.0.1:0")
	register(t, first, relay.WithName("a"))
	register(t, second, relay.WithName("b"))
	if got := serviceNames(srv); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("services %q", got)
	}
	var re *relay.RegisterError
	if _, err := signUp(t.Context(), second, relay.WithName("a")); !errors.As(err, &re) || re.Code != relay.CodeNameTaken {
		t.Errorf("a name that a service on the other listener has: %v", err)
	}
}

func serviceNames(srv *relay.Server) (names []string) {
	for _, s := range srv.Services() {
		names = append(names, s.Name)
	}
	return names
}

// A listener that is closed by someone else ends its Serve, and not the server.
func TestServeListenerClosed(t *testing.T) {
	srv, addr := startRelay(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	l := register(t, ln.Addr().String())
	go serveEcho(l)
	ln.Close()
	if err := within(t, "Serve's return", done); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
	echoes(t, dial(t, l)) // the service stays
	register(t, addr)
}

func TestListenAndServe(t *testing.T) {
	var log logbook
	srv, err := relay.NewServer(relay.WithLogger(log.logger()))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.ListenAndServe("127.0.0.1:0") }()
	addr, _ := log.wait(t, "listening", 1)[0].attrs["addr"].(string)
	l := register(t, addr)
	if err := srv.ListenAndServe(l.Addr().String()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("ListenAndServe on an address in use: %v", err)
	}
	srv.Close()
	if err := within(t, "ListenAndServe's return", done); err != relay.ErrServerClosed {
		t.Errorf("ListenAndServe: %v", err)
	}
}

func TestServeAfterClose(t *testing.T) {
	for name, end := range map[string]func(*relay.Server) error{
		"Close":    (*relay.Server).Close,
		"Shutdown": func(s *relay.Server) error { return s.Shutdown(t.Context()) },
	} {
		srv, addr, _ := startLogged(t) // so that Serve has begun
		if err := end(srv); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			t.Errorf("%s left the registration listener open", name)
		}
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if err := srv.Serve(ln); err != relay.ErrServerClosed {
			t.Errorf("Serve after %s: %v", name, err)
		}
		if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve after %s left the listener open: %v", name, err)
		}
		if err := srv.ListenAndServe("127.0.0.1:0"); err != relay.ErrServerClosed {
			t.Errorf("ListenAndServe after %s: %v", name, err)
		}
		// Again, either way.
		if err := srv.Close(); err != nil {
			t.Errorf("Close after %s: %v", name, err)
		}
		if err := srv.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown after %s: %v", name, err)
		}
	}
}

// Close resets every client, those still to be accepted too, and every conn of the
// app's. Its Accept goes on waiting, for a relay at the same address.
func TestServerClose(t *testing.T) {
	var log logbook
	srv, addr := startRelay(t, relay.WithLogger(log.logger()))
	told, events := watch(relay.EventLost, relay.EventResumed)
	l := register(t, addr, told)
	public := l.Addr().String()
	client := dial(t, l)
	app := accept(t, l)
	sendAndExpect(t, client, app)
	waiting := startAccept(l)

	srv.Close()
	expectLost(t, events)
	if n := len(srv.Services()); n != 0 {
		t.Errorf("%d services after Close", n)
	}
	expectReset(t, client)
	if _, err := app.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("the app reads %v", err)
	}
	if _, err := app.Write([]byte("x")); err == nil {
		t.Error("the app could write")
	}
	if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
		c.Close()
		t.Error("the public listener is open")
	}
	if ended := log.with("session ended"); len(ended) != 1 || ended[0].attrs["kept"] != false || ended[0].attrs["err"] == nil {
		t.Errorf("logged %+v", ended)
	}
	if _, err := signUp(t.Context(), addr); code(err) != relay.CodeUnreachable {
		t.Errorf("Register after Close: %v", err)
	}
	expectWaiting(t, waiting)

	srv, err := relay.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	serve(t, srv, addr)
	next(t, events, relay.EventResumed)
	if l.Addr().String() != public {
		t.Errorf("back at %v, and not at %s", l.Addr(), public)
	}
	client = dial(t, l)
	sendAndExpect(t, client, accepted(t, waiting))
}

// sendAndExpect sends a byte each way, after which both ends are known to be joined.
func sendAndExpect(t testing.TB, client, app net.Conn) {
	t.Helper()
	client.Write([]byte("c"))
	expectByte(t, app, 'c')
	app.Write([]byte("a"))
	expectByte(t, client, 'a')
}

// A client that comes while the relay is being closed is reset or not connected: it
// never sees an end that looks clean.
func TestServerCloseRacesClients(t *testing.T) {
	for range 30 {
		srv, addr := startRelay(t)
		l := register(t, addr)
		var clients sync.WaitGroup
		start := make(chan struct{})
		for range 8 {
			clients.Go(func() {
				<-start
				for {
					c, err := net.Dial("tcp", l.Addr().String())
					if errors.Is(err, syscall.ECONNRESET) {
						continue
					}
					if err != nil {
						return // it is closed
					}
					c.SetDeadline(time.Now().Add(patience))
					if n, err := c.Read(make([]byte, 1)); !isReset(err) {
						t.Errorf("a client read %d bytes, %v", n, err)
					}
					c.Close()
				}
			})
		}
		close(start)
		accept(t, l)
		srv.Close()
		clients.Wait()
		l.Close()
	}
}

// Shutdown takes no more services and clients, tells the apps, waits for the clients
// that are there, and then ends the session.
func TestShutdown(t *testing.T) {
	var log logbook
	srv, addr := startRelay(t, relay.WithLogger(log.logger()))
	toldIdle, idleEvents := watch(relay.EventDraining, relay.EventLost, relay.EventEnded)
	idle := register(t, addr, toldIdle)
	told, events := watch(relay.EventDraining, relay.EventLost, relay.EventEnded)
	l := register(t, addr, relay.WithName("busy"), told)
	client := dial(t, l)
	app := accept(t, l)
	sendAndExpect(t, client, app)

	done := make(chan error, 1)
	go func() { done <- srv.Shutdown(context.Background()) }()
	// The service without clients goes at once.
	if e := log.wait(t, "session ended", 1)[0]; e.attrs["addr"] != idle.Addr().String() || e.attrs["kept"] != false || e.attrs["err"] != relay.ErrServerClosed.Error() {
		t.Errorf("ended first: %+v", e)
	}
	next(t, idleEvents, relay.EventDraining)
	next(t, events, relay.EventDraining)
	waiting := startAccept(idle)
	eventually(t, "the other service draining", func() bool {
		s := srv.Services()
		return len(s) == 1 && s[0].Draining
	})
	for _, a := range []string{addr, l.Addr().String()} {
		if c, err := net.Dial("tcp", a); err == nil {
			c.Close()
			t.Errorf("%s is still listened on", a)
		}
	}
	sendAndExpect(t, client, app)
	select {
	case err := <-done:
		t.Fatalf("Shutdown did not wait: %v", err)
	default:
	}
	client.CloseWrite()
	if b, err := io.ReadAll(app); err != nil || len(b) > 0 {
		t.Errorf("the app reads %q, %v", b, err)
	}
	app.Write([]byte("bye"))
	app.Close()
	if b, err := io.ReadAll(client); err != nil || string(b) != "bye" {
		t.Errorf("the client reads %q, %v", b, err)
	}
	if err := within(t, "Shutdown's return", done); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if n := len(srv.Services()); n != 0 {
		t.Errorf("%d services after Shutdown", n)
	}
	// The apps wait for another relay, until they are closed.
	expectWaiting(t, waiting)
	idle.Close()
	expectClosed(t, "Accept", within(t, "Accept's return", waiting).err)
	l.Close()
	within(t, "Done of the idle service", idle.Done())
	within(t, "Done", l.Done())
	if len(idleEvents)+len(events) > 0 {
		t.Error("more events after a shutdown was told")
	}
}

// When its context ends, Shutdown cuts the clients off that still live.
func TestShutdownCutsOff(t *testing.T) {
	srv, addr := startRelay(t)
	l := register(t, addr)
	client := dial(t, l)
	app := accept(t, l)
	sendAndExpect(t, client, app)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Shutdown(ctx) }()
	eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })
	cancel()
	if err := within(t, "Shutdown's return", done); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v", err)
	}
	expectReset(t, client)
	if _, err := app.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("the app reads %v", err)
	}
}

// expectDisconnected checks that Accept says that the relay's operator ended the service.
func expectDisconnected(t testing.TB, l *relay.Listener) {
	t.Helper()
	err := within(t, "Accept's return", startAccept(l)).err
	op, ok := err.(*net.OpError)
	if !ok || op.Op != "accept" || code(err) != relay.CodeDisconnected || errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %#v", err)
	}
	within(t, "Done", l.Done())
}

// Disconnect ends one service, resets its clients, and leaves its name and port to
// be had again at once.
func TestDisconnect(t *testing.T) {
	first := freePorts(t, 2)
	srv, addr := startRelay(t, relay.WithPorts(first, first+1))
	l := register(t, addr, relay.WithName("gone"), relay.WithPort(first))
	other := register(t, addr, relay.WithName("other"))
	go serveEcho(other)
	client, otherClient := dial(t, l), dial(t, other)
	app := accept(t, l)
	sendAndExpect(t, client, app)

	if err := srv.Disconnect("nobody"); err != relay.ErrNoService {
		t.Errorf("Disconnect of a name that nobody has: %v", err)
	}
	if err := srv.Disconnect("gone"); err != nil {
		t.Fatal(err)
	}
	again := register(t, addr, relay.WithName("gone"), relay.WithPort(first))
	expectReset(t, client)
	expectDisconnected(t, l)
	echoes(t, otherClient)
	// Those that are draining too.
	live, liveApp := dial(t, again), accept(t, again)
	sendAndExpect(t, live, liveApp)
	again.Close()
	eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })
	register(t, addr, relay.WithName("gone"))
	sendAndExpect(t, live, liveApp)
	if err := srv.Disconnect("gone"); err != nil {
		t.Error(err)
	}
	if got := serviceNames(srv); !slices.Equal(got, []string{"other"}) {
		t.Errorf("services %q", got)
	}
	expectReset(t, live)
	if err := srv.Disconnect("gone"); err != relay.ErrNoService {
		t.Errorf("Disconnect a second time: %v", err)
	}
}
