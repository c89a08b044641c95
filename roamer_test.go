package relay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

// inMemory runs f with a network in memory, on a fake clock. When all is closed that f
// opened, nothing may be left on the network; that no goroutine is left the bubble sees
// to.
func inMemory(t *testing.T, f func(t *testing.T, n *memnet.Network)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := memnet.New()
		t.Cleanup(func() {
			time.Sleep(time.Minute) // until an app has noticed that its relay is gone
			synctest.Wait()
			if conns, lns := n.Conns(), n.Listeners(); len(conns) > 0 || lns > 0 {
				t.Errorf("%d connections and %d listeners are left", len(conns), lns)
			}
		})
		f(t, n)
	})
}

// A diary keeps the events of one side.
type diary struct {
	mu     sync.Mutex
	events []relay.Event
}

func (d *diary) note(ev relay.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events = append(d.events, ev)
}

// of returns the events of some kinds, in order.
func (d *diary) of(kinds ...relay.EventKind) (found []relay.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, ev := range d.events {
		if slices.Contains(kinds, ev.Kind) {
			found = append(found, ev)
		}
	}
	return found
}

// sessions returns the events but for those of clients; of several refusals in a row
// only the last.
func (d *diary) sessions() (found []relay.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, ev := range d.events {
		switch ev.Kind {
		case relay.EventClient, relay.EventClientLeft, relay.EventClientRefused:
			continue
		case relay.EventRefused:
			if n := len(found); n > 0 && found[n-1].Kind == relay.EventRefused {
				found = found[:n-1]
			}
		}
		found = append(found, ev)
	}
	return found
}

// expect fails the test unless the events of sessions have these kinds, and returns
// them. All have to tell the service, and its address.
func (d *diary) expect(t testing.TB, name, addr string, want ...relay.EventKind) []relay.Event {
	t.Helper()
	events := d.sessions()
	var got []relay.EventKind
	var last time.Time
	for _, ev := range events {
		got = append(got, ev.Kind)
		if ev.Service != name || ev.Addr != addr || ev.Remote == "" && ev.Kind != relay.EventEnded {
			t.Errorf("event %+v, want service %q at %s", ev, name, addr)
		}
		if ev.Time.Before(last) {
			t.Errorf("event %+v is before the one before", ev)
		}
		last = ev.Time
	}
	if !slices.Equal(got, want) {
		t.Fatalf("events %q, want %q:\n%+v", got, want, events)
	}
	return events
}

// one returns the only event of a kind.
func (d *diary) one(t testing.TB, kind relay.EventKind) relay.Event {
	t.Helper()
	found := d.of(kind)
	if len(found) != 1 {
		t.Fatalf("%d events of kind %q: %+v", len(found), kind, found)
	}
	return found[0]
}

func hostOf(addr string) string {
	host, _, _ := net.SplitHostPort(addr)
	return host
}

// A memRelay is a relay on a network in memory.
type memRelay struct {
	*relay.Server
	diary
	addr string
}

const relayAddr = "10.0.0.1:7000"

// startOn runs a relay at relayAddr until the test ends.
func startOn(t testing.TB, n *memnet.Network, opts ...relay.ServerOption) *memRelay {
	t.Helper()
	r := &memRelay{addr: relayAddr}
	var err error
	r.Server, err = relay.NewServer(append([]relay.ServerOption{
		relay.WithListen(n.Listen), relay.WithEvents(r.note), relay.WithLogger(testLogger(t)),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := n.Listen(t.Context(), "tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, r.Server, ln)
	return r
}

// service returns the only one.
func (r *memRelay) service(t testing.TB) relay.ServiceInfo {
	t.Helper()
	all := r.Services()
	if len(all) != 1 {
		t.Fatalf("%d services: %+v", len(all), all)
	}
	return all[0]
}

// A roamer is an app on a network in memory. The test can take it off the network, or
// to another place on it.
type roamer struct {
	*relay.Listener
	diary
	n    *memnet.Network
	over chan error // what Accept failed with, if it did

	mu    sync.Mutex // of what follows
	ip    string
	away  bool      // nobody can be dialled
	until time.Time // dialling takes until then
	dials []time.Time
	conns []*wiretap
}

var errAway = &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ENETUNREACH}

func newRoamer(n *memnet.Network) *roamer {
	return &roamer{n: n, ip: "10.1.0.1", over: make(chan error, 1)}
}

func (a *roamer) options(opts []relay.RegisterOption) []relay.RegisterOption {
	return append([]relay.RegisterOption{
		relay.WithDialer(a.dial), relay.WithEvents(a.note), relay.WithBackoff(100*time.Millisecond, time.Second),
	}, opts...)
}

// roam registers an app, which serves echo.
func roam(t testing.TB, n *memnet.Network, opts ...relay.RegisterOption) *roamer {
	t.Helper()
	a := newRoamer(n)
	a.Listener = register(t, relayAddr, a.options(append([]relay.RegisterOption{relay.WithLogger(testLogger(t))}, opts...))...)
	go a.serve()
	return a
}

func (a *roamer) serve() {
	for {
		c, err := a.Accept()
		if err != nil {
			a.over <- err
			return
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
		}()
	}
}

func (a *roamer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.dials = append(a.dials, time.Now())
	if d := time.Until(a.until); d > 0 {
		a.mu.Unlock()
		time.Sleep(d)
		a.mu.Lock()
		ctx = context.WithoutCancel(ctx)
	}
	if a.away {
		return nil, errAway
	}
	c, err := a.n.DialFrom(a.ip)(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	w := &wiretap{Conn: c.(*memnet.Conn), owner: a, dialed: a.dials[len(a.dials)-1]}
	a.conns = append(a.conns, w)
	return w, nil
}

// dedicated takes a connection out of the book that is not a session's.
func (a *roamer) dedicated(w *wiretap) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.conns = slices.DeleteFunc(a.conns, func(o *wiretap) bool { return o == w })
	if i := slices.Index(a.dials, w.dialed); i >= 0 {
		a.dials = slices.Delete(a.dials, i, i+1)
	}
}

// transport returns the connection of the newest session.
func (a *roamer) transport() *wiretap {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.conns[len(a.conns)-1]
}

// place has the app dial from an IP address from now on, or from none.
func (a *roamer) place(ip string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ip, a.away = ip, ip == ""
}

// slow has dialling take until a moment.
func (a *roamer) slow(until time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.until = until
}

// dialled returns when the app dialled.
func (a *roamer) dialled() []time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.dials)
}

// expectAccepting fails the test if Accept has returned an error.
func (a *roamer) expectAccepting(t testing.TB) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-a.over:
		t.Fatalf("Accept: %v", err)
	default:
	}
}

// expectRefused waits for Accept's error, which must be a refusal of this code, and for
// the end of the listener.
func (a *roamer) expectRefused(t testing.TB, want relay.Code) {
	t.Helper()
	err := within(t, "Accept's error", a.over)
	op, ok := err.(*net.OpError)
	if !ok || op.Op != "accept" || code(err) != want || errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %v, want code %q", err, want)
	}
	within(t, "Done", a.Done())
	synctest.Wait() // the app still has to hang up on its clients
	if s := a.Stats(); s.Connected || s.Live != 0 {
		t.Errorf("when it is over: %+v", s)
	}
}

// A wiretap keeps the first of what is read from a connection.
type wiretap struct {
	*memnet.Conn
	owner  *roamer
	dialed time.Time
	said   bool // something; only the first write asks

	mu    sync.Mutex
	heard []byte
}

func (w *wiretap) Write(b []byte) (int, error) {
	if !w.said {
		w.said = true
		if bytes.HasPrefix(b, []byte(preface)) {
			w.owner.dedicated(w)
		}
	}
	return w.Conn.Write(b)
}

func (w *wiretap) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.heard) < 1000 {
		w.heard = append(w.heard, b[:n]...)
	}
	return n, err
}

var leaseInReply = regexp.MustCompile(`"lease":"([^"]+)"`)

// lease returns the secret that the relay told.
func (w *wiretap) lease(t testing.TB) string {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	found := leaseInReply.FindSubmatch(w.heard)
	if found == nil {
		t.Fatalf("the relay told no lease: %q", w.heard)
	}
	return string(found[1])
}

// A rawApp says what it is told to, and nothing by itself.
type rawApp struct {
	*mux.Session
	conn    *memnet.Conn
	control *mux.Stream
	lines   *wire.Reader
	reply   wire.Reply
}

// knock registers at the relay with any hello.
func knock(n *memnet.Network, ip string, hello wire.Hello) (*rawApp, error) {
	c, err := n.DialFrom(ip)(context.Background(), "tcp", relayAddr)
	if err != nil {
		return nil, err
	}
	hello.Version = wire.Version
	line, err := wire.Line(hello)
	if err != nil {
		return nil, err
	}
	r := &rawApp{Session: mux.Client(c, mux.Config{}), conn: c.(*memnet.Conn)}
	r.EnableStop()
	if r.control, err = r.Open(line); err == nil {
		r.lines = wire.NewReader(r.control)
		err = r.lines.Read(&r.reply)
	}
	if err != nil {
		r.Session.Close()
		return nil, err
	}
	return r, nil
}

// mustKnock has to be let in.
func mustKnock(t testing.TB, n *memnet.Network, hello wire.Hello) *rawApp {
	t.Helper()
	r, err := knock(n, "10.1.0.9", hello)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Session.Close() })
	if r.reply.Error != nil || r.reply.Address == "" {
		t.Fatalf("the relay says %+v, %+v", r.reply, r.reply.Error)
	}
	return r
}

// client connects a client, whose waits all end within an hour.
func client(t testing.TB, n *memnet.Network, addr net.Addr) *memnet.Conn {
	t.Helper()
	c, err := n.DialFrom("10.2.0.1")(t.Context(), "tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Hour))
	return c.(*memnet.Conn)
}

// visit connects a client, which wants all back that it sends.
func visit(n *memnet.Network, addr net.Addr) error {
	c, err := n.DialFrom("10.2.0.2")(context.Background(), "tcp", addr.String())
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Hour))
	want := randomBytes(200_000)
	go func() {
		if _, err := c.Write(want); err == nil {
			c.(*memnet.Conn).CloseWrite()
		}
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		return fmt.Errorf("after %d bytes: %w", len(got), err)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%d bytes came back, and not the %d sent", len(got), len(want))
	}
	return nil
}

// guard tries all the time to listen on a public address, which must not succeed before
// the function that it returns is called.
func guard(t testing.TB, n *memnet.Network, addr net.Addr) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	tries := 0
	go func() {
		defer close(ended)
		for {
			if err := listens(n, addr); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("listening on the public address, try %d: %v", tries, err)
				return
			}
			tries++
			select {
			case <-done:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	stop = sync.OnceFunc(func() {
		close(done)
		<-ended
		if tries < 100 {
			t.Errorf("tried only %d times", tries)
		}
	})
	t.Cleanup(stop)
	return stop
}

// listens tries to listen on an address.
func listens(n *memnet.Network, addr net.Addr) error {
	ln, err := n.Listen(context.Background(), "tcp", addr.String())
	if err == nil {
		ln.Close()
	}
	return err
}

// sleepUntil waits until so long after start, and until all is quiet then.
func sleepUntil(start time.Time, d time.Duration) {
	time.Sleep(time.Until(start.Add(d)))
	synctest.Wait()
}

// expectAt checks when something happened.
func expectAt(t testing.TB, what string, at, start time.Time, want time.Duration) {
	t.Helper()
	if got := at.Sub(start); got != want {
		t.Errorf("%s after %v, want %v", what, got, want)
	}
}
