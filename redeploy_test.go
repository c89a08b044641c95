package relay_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// A ledger notes how often each request was served, by whichever app. Its zero value
// is ready.
type ledger struct {
	mu    sync.Mutex
	times map[int64]int
}

func (b *ledger) note(id int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.times == nil {
		b.times = make(map[int64]int)
	}
	b.times[id]++
}

// expectOnce fails the test unless the requests from 1 to n, and no others, were each
// served once.
func (b *ledger) expectOnce(t testing.TB, n int64) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if int64(len(b.times)) != n {
		t.Errorf("%d requests were served, of %d", len(b.times), n)
	}
	for id, times := range b.times {
		if times != 1 || id < 1 || id > n {
			t.Errorf("request %d was served %d times", id, times)
		}
	}
}

// answerTo is what a web app answers: it depends on the whole of the request, and is of
// many sizes.
func answerTo(id int64, body []byte) []byte {
	sum := sha256.Sum256(body)
	return bytes.Repeat(fmt.Appendf(nil, "%d %x\n", id, sum), 1+int(id%700))
}

// A webApp is an http.Server behind a registration of its own.
type webApp struct {
	*http.Server
	ln     *relay.Listener
	served chan error
}

// newWeb registers an app that answers the requests of a load, and notes them.
func newWeb(t testing.TB, addr string, b *ledger, opts ...relay.RegisterOption) *webApp {
	t.Helper()
	return &webApp{
		ln:     register(t, addr, opts...),
		served: make(chan error, 1),
		Server: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			id, err := strconv.ParseInt(strings.TrimPrefix(r.URL.Path, "/"), 10, 64)
			body, readErr := io.ReadAll(r.Body)
			if err = errors.Join(err, readErr); err != nil {
				t.Errorf("the app reads a request: %v", err)
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			b.note(id)
			w.Write(answerTo(id, body))
		})},
	}
}

func (a *webApp) start() {
	go func() { a.served <- a.Serve(a.ln) }()
}

func startWeb(t testing.TB, addr string, b *ledger, opts ...relay.RegisterOption) *webApp {
	t.Helper()
	a := newWeb(t, addr, b, opts...)
	a.start()
	return a
}

// shutdown ends the app as a program would that wants to lose no request, and returns
// when it could exit.
func (a *webApp) shutdown(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := a.ln.Drain(ctx); err != nil {
		t.Fatalf("Drain: %v", err)
	}
	a.shutdownOnly(t)
}

// shutdownOnly does not drain the listener.
func (a *webApp) shutdownOnly(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := a.Shutdown(ctx); err != nil {
		t.Fatalf("http.Server.Shutdown: %v", err)
	}
	if err := within(t, "the return of http.Server.Serve", a.served); err != http.ErrServerClosed {
		t.Fatalf("http.Server.Serve: %v", err)
	}
	within(t, "Done", a.ln.Done())
}

// A load is clients who make one request after the other, each with a number of its
// own, until the load is ended. None may fail.
type load struct {
	t        testing.TB
	ids      atomic.Int64
	answered atomic.Int64
	over     chan struct{}
	clients  sync.WaitGroup
}

// startLoad starts so many clients that use request, which a goroutine of the
// client's calls for one request after the other.
func startLoad(t testing.TB, clients int, client func(i int) (request func(id int64) error)) *load {
	l := &load{t: t, over: make(chan struct{})}
	t.Cleanup(l.end)
	for i := range clients {
		request := client(i)
		l.clients.Go(func() {
			for {
				select {
				case <-l.over:
					return
				default:
				}
				id := l.ids.Add(1)
				if err := request(id); err != nil {
					t.Errorf("client %d, request %d: %v", i, id, err)
					return
				}
				l.answered.Add(1)
			}
		})
	}
	return l
}

// startWebLoad starts clients of an app of startWeb's. Half of them keep their
// connection for the next request, and make only such as http.Transport makes again
// when the app has closed the connection meanwhile. The others have a new one for each
// request, and http.Transport makes none of theirs again.
func startWebLoad(t testing.TB, public string) *load { return startWebLoadAt(t, public, public) }

// startWebLoadAt is startWebLoad for clients that find the public address at another.
func startWebLoadAt(t testing.TB, public, at string) *load {
	return startLoad(t, 8, func(i int) func(int64) error {
		fresh := i%2 == 0
		transport := &http.Transport{
			DisableKeepAlives: fresh,
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, at)
			},
		}
		t.Cleanup(transport.CloseIdleConnections)
		return webRequest(transport, public, fresh)
	})
}

// webRequest makes GET requests, and POST requests too if they may be made but once.
func webRequest(transport http.RoundTripper, public string, posts bool) func(id int64) error {
	client := &http.Client{Transport: transport, Timeout: patience}
	return func(id int64) error {
		method, body := http.MethodGet, io.Reader(nil)
		var sent []byte
		if posts && rand.IntN(2) == 0 {
			sent = randomBytes(rand.IntN(40_000))
			method, body = http.MethodPost, bytes.NewReader(sent)
		}
		req, err := http.NewRequest(method, fmt.Sprintf("http://%s/%d", public, id), body)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if err == nil && (resp.StatusCode != http.StatusOK || !bytes.Equal(got, answerTo(id, sent))) {
			err = fmt.Errorf("%s: %s, and an answer of %d bytes that is not the right one", method, resp.Status, len(got))
		}
		return err
	}
}

// more returns when so many more requests were answered.
func (l *load) more(n int64) {
	l.t.Helper()
	until := l.answered.Load() + n
	eventually(l.t, "more answers", func() bool { return l.answered.Load() >= until || l.t.Failed() })
	if l.t.Failed() {
		l.t.FailNow()
	}
}

// end ends the load, and returns when the last request was answered.
func (l *load) end() {
	select {
	case <-l.over:
	default:
		close(l.over)
	}
	l.clients.Wait()
}

// expectNoneRefused fails the test if the relay has refused, or cut off, a client.
func expectNoneRefused(t testing.TB, srv *relay.Server) {
	t.Helper()
	if n := srv.Refusals(); len(n) > 0 {
		t.Errorf("refusals %v", n)
	}
}

// An app is redeployed again and again, and no request fails, nor is one served twice.
func TestRedeploy(t *testing.T) {
	srv, addr := startRelay(t)
	check := nothingLeft(t)
	var served ledger
	opts := []relay.RegisterOption{relay.WithName("web"), relay.WithShared()}
	app := startWeb(t, addr, &served, opts...)
	public := app.ln.Addr().String()
	load := startWebLoad(t, public)
	for i := range 10 {
		load.more(50)
		next := startWeb(t, addr, &served, opts...)
		if got := next.ln.Addr().String(); got != public {
			t.Fatalf("deployment %d is at %s, and those before at %s", i, got, public)
		}
		if i%2 == 0 {
			load.more(50) // of both
		}
		app.shutdown(t)
		app = next
	}
	load.more(50)
	load.end()
	served.expectOnce(t, load.ids.Load())
	expectNoneRefused(t, srv)
	app.shutdown(t)
	eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
	check()
}

// sessions returns the sessions of the only service, in the order of their arrival.
func sessions(t testing.TB, srv *relay.Server) []relay.SessionInfo {
	t.Helper()
	infos := srv.Services()
	if len(infos) != 1 {
		t.Fatalf("services %+v", infos)
	}
	return infos[0].Sessions
}

// registerShared registers two apps of one name.
func registerShared(t testing.TB, addr string, opts ...relay.RegisterOption) (a, b *relay.Listener) {
	t.Helper()
	opts = append(opts, relay.WithName("two"), relay.WithShared())
	a = register(t, addr, opts...)
	b = register(t, addr, opts...)
	if a.Addr().String() != b.Addr().String() {
		t.Fatalf("one app is at %v and the other at %v", a.Addr(), b.Addr())
	}
	return a, b
}

// Each client goes to the app that has the fewest. The clock is a fake one, for an app that
// said nothing for a second is not the first choice.
func TestSharedSpread(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		a := s.registerEcho("", relay.WithName("two"), relay.WithShared())
		b := s.registerEcho("", relay.WithName("two"), relay.WithShared())
		expectLive := func(want ...int) {
			t.Helper()
			eventually(t, fmt.Sprint("clients of the apps ", want), func() bool {
				of := sessions(t, s.srv)
				return len(of) == 2 && of[0].Clients == want[0] && of[1].Clients == want[1] &&
					a.Stats().Live == want[0] && b.Stats().Live == want[1]
			})
		}
		var clients [2][]net.Conn // of each
		connect := func() {
			t.Helper()
			before := a.Stats().Accepted
			c := s.client(a)
			s.mustServe(c)
			which := 1
			if a.Stats().Accepted > before {
				which = 0
			}
			clients[which] = append(clients[which], c)
		}
		const n = 20
		for range 2 * n {
			connect()
		}
		expectLive(n, n)
		for which, now := range [][]int{{n - 5, n}, {n, n - 5}} {
			for _, c := range clients[which][n-5:] {
				c.Close()
			}
			clients[which] = clients[which][:n-5]
			expectLive(now...)
			for range 5 { // all to the one that has fewer
				connect()
			}
			expectLive(n, n)
		}
	})
}

// What is counted never becomes less, also if an app refuses a client that it was given.
func TestCountsOfRefused(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		share := []relay.RegisterOption{relay.WithName("two"), relay.WithShared()}
		a := s.register("", share...)
		c := s.client(a)
		io.WriteString(c, "hello")
		expect := func(accepted, bytes int64) {
			t.Helper()
			synctest.Wait()
			infos := s.srv.Services()
			if len(infos) != 1 || infos[0].Accepted != accepted || infos[0].BytesIn != bytes {
				t.Errorf("want %d clients and %d bytes: %+v", accepted, bytes, infos)
			}
		}
		expect(1, 5)
		b := s.registerEcho("", share...)
		b.leave() // which has the service stay
		a.Close() // without having accepted it
		expect(1, 5)
		b.comeBack(t)
		s.mustServe(s.client(b))
		expect(2, 6)
	})
}

// An app that takes no more clients gets none, and keeps those it has. The address
// lasts as long as one app does, and the name too.
func TestSharedDrains(t *testing.T) {
	srv, addr := startRelay(t)
	check := nothingLeft(t)
	opts := []relay.RegisterOption{relay.WithName("two"), relay.WithShared()}
	a := register(t, addr, opts...)
	client, app := dial(t, a), accept(t, a)
	sendAndExpect(t, client, app)
	b := register(t, addr, opts...)
	go serveEcho(b)
	a.Close()
	eventually(t, "one session draining", func() bool { return sessions(t, srv)[0].Draining })
	var clients []net.Conn
	for i := range 10 {
		c := dial(t, b)
		echoes(t, c)
		if got, want := b.Stats().Accepted, int64(i+1); got != want {
			t.Fatalf("accepted %d of %d", got, want)
		}
		clients = append(clients, c)
	}
	if s := srv.Services()[0]; s.Draining || len(s.Clients) != 11 || s.Sessions[0].Clients != 1 || s.Sessions[1].Draining {
		t.Errorf("service %+v", s)
	}
	sendAndExpect(t, client, app)
	app.Close()
	client.Close()
	within(t, "Done", a.Done())
	eventually(t, "one session", func() bool { return len(sessions(t, srv)) == 1 })
	c := dial(t, b)
	echoes(t, c)
	if _, err := signUp(t.Context(), addr, relay.WithName("two")); code(err) != relay.CodeNameTaken {
		t.Errorf("the name without a share: %v", err)
	}
	if _, err := signUp(t.Context(), addr, relay.WithPort(port(b))); code(err) != relay.CodePortUnavailable {
		t.Errorf("the port: %v", err)
	}

	b.Close()
	eventually(t, "a service that takes no more clients", func() bool { return srv.Services()[0].Draining })
	if c, err := net.Dial("tcp", b.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
		if err == nil {
			c.Close()
		}
		t.Errorf("a client after the last app's Close: %v", err)
	}
	echoes(t, c)
	next := register(t, addr, relay.WithName("two"), relay.WithPort(port(b)))
	next.Close()
	for _, c := range append(clients, c) {
		c.Close()
	}
	within(t, "Done", b.Done())
	check()
}

// An app that has missed its beat gets no client while another has not.
func TestSharedSilent(t *testing.T) {
	ofSessions(t)
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		startOn(t, n)
		var transport *memnet.Conn // of the app that registered last
		a, b := registerShared(t, relayAddr,
			relay.WithHeartbeat(10*time.Second, time.Hour),
			relay.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
				c, err := n.Dial(ctx, network, address)
				if err == nil {
					transport = c.(*memnet.Conn)
				}
				return c, err
			}))
		transport.Freeze()
		go serveEcho(a)
		go serveEcho(b)
		time.Sleep(15*time.Second + time.Nanosecond) // one beat and a half
		for range 10 {
			c, err := n.Dial(t.Context(), "tcp", b.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			start := time.Now()
			echoes(t, c)
			if waited := time.Since(start); waited > 0 {
				t.Errorf("a client waited %v", waited)
			}
		}
		if got := a.Stats().Accepted; got != 10 {
			t.Errorf("the live app accepted %d", got)
		}
		transport.Thaw()
		time.Sleep(10 * time.Second)
		c, err := n.Dial(t.Context(), "tcp", b.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		echoes(t, c)
		if got := b.Stats().Accepted; got != 1 {
			t.Errorf("the app that was silent accepted %d", got)
		}
	})
}

// A protocol is one of those that raw clients and apps speak: a request of an 8-byte
// number, a 4-byte size, and so many bytes, and an answer of the number and the bytes'
// sum.
type protocol struct {
	name   string
	greets bool // the app speaks first, and the client waits for that
	size   int  // of the request's bytes, sent all at once
	ends   bool // the client half-closes behind the request
}

var protocols = []protocol{
	{name: "client first"},
	{name: "server first", greets: true},
	{name: "40 KB at once", size: 40_000},
	{name: "40 KB and the end", size: 40_000, ends: true},
	{name: "server first, then 40 KB", greets: true, size: 40_000},
}

const greeting = "220 ready\n"

// request is a client's part.
func (p protocol) request(addr string, id int64) error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if p.greets {
		got := make([]byte, len(greeting))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != greeting {
			return fmt.Errorf("greeted with %q, %w", got, err)
		}
	}
	body := randomBytes(p.size)
	req := binary.BigEndian.AppendUint64(nil, uint64(id))
	req = binary.BigEndian.AppendUint32(req, uint32(p.size))
	if _, err := c.Write(append(req, body...)); err != nil {
		return err
	}
	if p.ends {
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			return err
		}
	}
	sum := sha256.Sum256(body)
	want := append(binary.BigEndian.AppendUint64(nil, uint64(id)), sum[:]...)
	got, err := io.ReadAll(c)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("an answer of %d bytes that is not the right one", len(got))
	}
	return err
}

// serve is the app's part.
func (p protocol) serve(c conn, b *ledger) error {
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if p.greets {
		if _, err := io.WriteString(c, greeting); err != nil {
			return err
		}
	}
	var head [12]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return err
	}
	body := make([]byte, binary.BigEndian.Uint32(head[8:]))
	if _, err := io.ReadFull(c, body); err != nil {
		return err
	}
	if p.ends {
		if n, err := io.Copy(io.Discard, c); err != nil || n > 0 {
			return fmt.Errorf("%d bytes behind the request, %w", n, err)
		}
	}
	b.note(int64(binary.BigEndian.Uint64(head[:])))
	sum := sha256.Sum256(body)
	_, err := c.Write(append(head[:8:8], sum[:]...))
	return err
}

// A rawPeer is an app that speaks a protocol to whom it accepts.
type rawPeer struct {
	ln      *relay.Listener
	p       protocol
	served  *ledger
	enough  chan struct{}
	clients sync.WaitGroup // and who accepts them
}

func startRaw(t testing.TB, addr string, p protocol, b *ledger, opts ...relay.RegisterOption) *rawPeer {
	t.Helper()
	opts = append(opts, relay.WithName("raw"), relay.WithShared())
	return &rawPeer{ln: register(t, addr, opts...), p: p, served: b, enough: make(chan struct{})}
}

// accept accepts until enough is closed, and perhaps one more.
func (a *rawPeer) accept(t testing.TB) {
	a.clients.Go(func() {
		for {
			select {
			case <-a.enough:
				return
			default:
			}
			c, err := a.ln.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Errorf("Accept: %v", err)
				}
				return
			}
			a.clients.Go(func() {
				if err := a.p.serve(c.(conn), a.served); err != nil {
					t.Errorf("the app: %v", err)
				}
			})
		}
	})
}

// close closes the listener, and returns when the app could exit.
func (a *rawPeer) close(t testing.TB) {
	t.Helper()
	a.ln.Close()
	a.clients.Wait()
	within(t, "Done", a.ln.Done())
}

// Clients whom an app has not accepted when it closes its listener are given to
// another, with all that they have sent.
func TestCloseGivesClientsAway(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			srv, addr := startRelay(t)
			check := nothingLeft(t)
			var served ledger
			old := startRaw(t, addr, p, &served)
			const n = 20
			var clients sync.WaitGroup
			for i := range n {
				clients.Go(func() {
					if err := p.request(old.ln.Addr().String(), int64(i+1)); err != nil {
						t.Errorf("client %d: %v", i+1, err)
					}
				})
			}
			var sent int64
			if !p.greets {
				sent = n * int64(12+p.size)
			}
			eventually(t, "all at the old app", func() bool {
				s := srv.Services()[0]
				return s.Sessions[0].Clients == n && s.BytesIn == sent
			})
			next := startRaw(t, addr, p, &served)
			next.accept(t)
			old.close(t)
			clients.Wait()
			served.expectOnce(t, n)
			expectNoneRefused(t, srv)
			if o, n_ := old.ln.Stats(), next.ln.Stats(); o.Accepted != 0 || o.Refused != n || n_.Accepted != n || n_.Refused != 0 {
				t.Errorf("the old app %+v, the next %+v", o, n_)
			}
			eventually(t, "the clients' leaving", func() bool { return len(srv.Services()[0].Clients) == 0 })
			if s := srv.Services()[0]; s.Accepted != n || s.Refused != 0 || s.BytesIn != n*int64(12+p.size) || s.BytesOut != next.ln.Stats().BytesOut {
				t.Errorf("service %+v", s)
			}
			next.close(t)
			check()
		})
	}
}

// The same while clients come and go, and apps do, too. An app that is to go is slow,
// so that each leaves some clients unaccepted.
func TestRedeployRaw(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			srv, addr := startRelay(t)
			check := nothingLeft(t)
			var served ledger
			app := startRaw(t, addr, p, &served)
			app.accept(t)
			public := app.ln.Addr().String()
			load := startLoad(t, 8, func(int) func(int64) error {
				return func(id int64) error { return p.request(public, id) }
			})
			moved := int64(0)
			for range 10 {
				load.more(20)
				next := startRaw(t, addr, p, &served)
				next.accept(t)
				close(app.enough)
				eventually(t, "clients that the app has not accepted", func() bool {
					s := slices.DeleteFunc(sessions(t, srv), func(s relay.SessionInfo) bool { return s.Draining })
					return len(s) == 2 && app.ln.Stats().Live == 0 && s[0].Clients > 1 || t.Failed()
				})
				app.close(t)
				moved += app.ln.Stats().Refused
				app = next
			}
			load.more(20)
			load.end()
			served.expectOnce(t, load.ids.Load())
			expectNoneRefused(t, srv)
			if moved == 0 {
				t.Error("every client was accepted by the app that it was first given to")
			}
			app.close(t)
			check()
		})
	}
}

// A client for whom an app has no room goes to another app.
func TestSharedBacklog(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			srv, addr := startRelay(t)
			var served ledger
			roomy := startRaw(t, addr, p, &served)
			for range 5 { // so that the other one has fewer, whatever comes
				dial(t, roomy.ln)
				accept(t, roomy.ln)
			}
			narrow := startRaw(t, addr, p, &served, relay.WithBacklog(1))
			public := roomy.ln.Addr().String()
			roomy.accept(t)
			stuck := make(chan error, 1)
			id := int64(0)
			for there := false; !there; { // it gets clients soon after Register's return
				id++
				request := func(id int64) { stuck <- p.request(public, id) }
				go request(id)
				eventually(t, "the client served, or in the backlog", func() bool {
					s := srv.Services()[0]
					there = len(s.Clients) == 6 && s.Sessions[0].Clients == 5 && s.Sessions[1].Clients == 1
					return there || len(stuck) > 0
				})
				if !there {
					if err := <-stuck; err != nil {
						t.Fatalf("client %d: %v", id, err)
					}
				}
			}
			const n = 10
			for range n {
				id++
				if err := p.request(public, id); err != nil {
					t.Fatalf("client %d: %v", id, err)
				}
			}
			if r, n_ := roomy.ln.Stats(), narrow.ln.Stats(); r.Accepted != 5+id-1 || n_.Refused != n || n_.Accepted != 0 {
				t.Errorf("with room %+v, without %+v", r, n_)
			}
			narrow.accept(t)
			if err := within(t, "the client in the backlog's answer", stuck); err != nil {
				t.Errorf("the client in the backlog: %v", err)
			}
			served.expectOnce(t, id)
			expectNoneRefused(t, srv)
		})
	}
}

// A client that an app was given, and refused, has left if there is no other app.
func TestRefusedByAll(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		a := s.register("a", relay.WithBacklog(1))
		s.client(a)
		synctest.Wait() // it fills the backlog
		c := s.client(a)
		expectReset(t, c)
		came, left := s.await(relay.EventClient), s.await(relay.EventClientLeft)
		if came = s.await(relay.EventClient); came.Remote != c.LocalAddr().String() || left.Remote != came.Remote || left.Err == nil {
			t.Errorf("came: %+v; left: %+v", came, left)
		}
		s.expectRefusals(map[string]int64{"no_app": 1})
		if n := len(s.events[relay.EventClientRefused]); n != 0 {
			t.Errorf("%d events of clients that no app had", n)
		}
	})
}

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

// http.Server.Shutdown drops the requests of connections that it has accepted and not
// read yet, over TCP as over a relay; see Listener.Drain. Without that no other request
// fails: what was dropped is known to the server as a connection that it closed before
// its handler was called.
func TestRedeployWithoutDrain(t *testing.T) {
	srv, addr := startRelay(t)
	check := nothingLeft(t)
	var served ledger
	var mu sync.Mutex
	dropped := make(map[string]chan struct{}) // by the client's address; closed when the server did
	drop := func(client string) chan struct{} {
		mu.Lock()
		defer mu.Unlock()
		if dropped[client] == nil {
			dropped[client] = make(chan struct{})
		}
		return dropped[client]
	}
	start := func() *webApp {
		a := newWeb(t, addr, &served, relay.WithName("web"), relay.WithShared())
		handler := a.Handler
		var handled sync.Map // clients' addresses
		a.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			handled.Store(r.RemoteAddr, true)
			handler.ServeHTTP(w, r)
		})
		a.ConnState = func(c net.Conn, state http.ConnState) {
			if _, ok := handled.Load(c.RemoteAddr().String()); !ok && state == http.StateClosed {
				close(drop(c.RemoteAddr().String()))
			}
		}
		a.start()
		return a
	}
	app := start()
	public := app.ln.Addr().String()
	load := startLoad(t, 8, func(int) func(int64) error {
		var local string // of the last connection
		transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			if err == nil {
				local = c.LocalAddr().String()
			}
			return c, err
		}}
		request := webRequest(transport, public, true)
		return func(id int64) error {
			for {
				err := request(id)
				if !errors.Is(err, io.EOF) {
					return err
				}
				select {
				case <-drop(local): // and so nobody has served it
				case <-time.After(patience):
					return fmt.Errorf("nobody dropped it: %w", err)
				}
			}
		}
	})
	for range 10 {
		load.more(50)
		next := start()
		app.shutdownOnly(t)
		app = next
	}
	load.more(50)
	load.end()
	served.expectOnce(t, load.ids.Load())
	expectNoneRefused(t, srv)
	app.shutdownOnly(t)
	eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
	check()
}

// http.Server.Shutdown of the only app lets requests under way complete. Clients that
// come later are refused.
func TestWebShutdown(t *testing.T) {
	srv, addr := startRelay(t)
	check := nothingLeft(t)
	begun := make(chan struct{}, 3)
	goOn := make(chan struct{})
	big := randomBytes(1 << 20)
	mux := http.NewServeMux()
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		begun <- struct{}{}
		<-goOn
		w.Write(big)
	})
	mux.HandleFunc("/download", func(w http.ResponseWriter, r *http.Request) {
		w.Write(big[:len(big)/2])
		w.(http.Flusher).Flush()
		begun <- struct{}{}
		<-goOn
		w.Write(big[len(big)/2:])
	})
	mux.HandleFunc("/upload", func(w http.ResponseWriter, r *http.Request) {
		begun <- struct{}{}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Errorf("the app reads a body: %v", err)
		}
		w.Write(body)
	})
	a := newWeb(t, addr, nil)
	a.Handler = mux
	a.start()

	transport := new(http.Transport)
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 2 * patience}
	body, upload := io.Pipe()
	var clients sync.WaitGroup
	for path, body := range map[string]io.Reader{"/slow": nil, "/download": nil, "/upload": body} {
		clients.Go(func() {
			req, err := http.NewRequest(http.MethodPost, "http://"+a.ln.Addr().String()+path, body)
			if err != nil {
				t.Error(err)
				return
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Errorf("%s: %v", path, err)
				return
			}
			defer resp.Body.Close()
			if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, big) {
				t.Errorf("%s: %d bytes, %v", path, len(got), err)
			}
		})
	}
	if _, err := upload.Write(big[:len(big)/2]); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		within(t, "the requests at the app", begun)
	}

	down := make(chan struct{})
	go func() {
		defer close(down)
		a.shutdownOnly(t)
	}()
	eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })
	for range 10 {
		c, err := net.Dial("tcp", a.ln.Addr().String())
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a client that comes later: %v", err)
		}
	}
	select {
	case <-down:
		t.Error("Shutdown and Done did not wait")
	default:
	}
	close(goOn)
	upload.Write(big[len(big)/2:])
	upload.Close()
	clients.Wait()
	within(t, "the end of Shutdown, and Done", down)
	eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
	expectNoneRefused(t, srv)
	transport.CloseIdleConnections()
	check()
}

// arrivals notes when connections come to a listener.
type arrivals struct {
	net.Listener
	mu    sync.Mutex
	times []time.Time
}

func (a *arrivals) Accept() (net.Conn, error) {
	c, err := a.Listener.Accept()
	if err == nil {
		a.mu.Lock()
		a.times = append(a.times, time.Now())
		a.mu.Unlock()
	}
	return c, err
}

func (a *arrivals) all() []time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.times)
}

// raceDetector reports whether this program was built with it.
func raceDetector() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

func manyApps() int {
	n := figure(1000, 200, 50)
	if raceDetector() {
		n = min(n, 700) // it ends a program of more than 8128 goroutines
	}
	return n
}

// A relay that is started anew has all its apps come back to it, each with the port it
// had. They do not try all the time, and while they do, and most are refused because too
// many are registering, the relay does its work.
func TestReconnectingApps(t *testing.T) {
	n := manyApps()
	const minWait, maxWait = time.Second, 2 * time.Second
	check := nothingLeft(t)
	ports := freePorts(t, n)
	opts := []relay.ServerOption{relay.WithPorts(ports, ports+n-1), relay.WithLease(time.Hour)}
	srv, addr := startRelay(t, opts...)
	apps := make([]*relay.Listener, n)
	addrs := make([]string, n)
	for i := range apps {
		apps[i] = register(t, addr, relay.WithBackoff(minWait, maxWait))
		addrs[i] = apps[i].Addr().String()
	}
	begin := time.Now()
	srv.Close()

	const perIP = 16 // the default
	next, err := relay.NewServer(relay.WithLimits(relay.Limits{PendingPerIP: perIP}))
	if err != nil {
		t.Fatal(err)
	}
	unix, err := net.Listen("unix", filepath.Join(t.TempDir(), "relay"))
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, next, unix)
	bystander := register(t, "unix", relay.WithName("bystander"), relay.WithDialer(func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", unix.Addr().String())
	}))
	go serveEcho(bystander)
	client := dial(t, bystander)
	works := func() { // for who is there, and for who comes
		t.Helper()
		echoes(t, client)
		c := dial(t, bystander)
		echoes(t, c)
		c.Close()
	}

	// All that may be registering from this address are there already, and silent.
	before := serve(t, next, "127.0.0.1:0")
	var silent []net.Conn
	for range perIP + 1 {
		c, err := net.Dial("tcp", before)
		if errors.Is(err, syscall.ECONNRESET) {
			break // so soon
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	eventually(t, "one refusal", func() bool { return next.Refusals()["pending_per_ip"] == 1 })

	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	came := &arrivals{Listener: ln}
	serveOn(t, next, came)
	eventually(t, "as many refusals as there are apps", func() bool {
		works()
		return next.Refusals()["pending_per_ip"] > int64(n)
	})
	if s := next.Services(); len(s) != 1 {
		t.Fatalf("%d services", len(s))
	}
	for _, c := range silent {
		c.Close()
	}
	eventually(t, "all back", func() bool {
		works()
		return len(next.Services()) == n+1
	})
	took := time.Since(begin)
	attempts := len(came.all())
	t.Logf("%d apps came back in %v and %d attempts", n, took, attempts)
	if limit := n * int(1+took/(minWait/10)); attempts > limit {
		t.Errorf("%d attempts in %v, where none waits less than %v", attempts, took, minWait/10)
	}

	for i, l := range apps {
		eventually(t, "the app's knowing", func() bool { return l.Stats().Reconnects == 1 })
		if got := l.Addr().String(); got != addrs[i] {
			t.Fatalf("app %d is at %s and was at %s", i, got, addrs[i])
		}
		c, err := net.Dial("tcp", addrs[i])
		if err != nil {
			t.Fatalf("app %d: %v", i, err)
		}
		a := accept(t, l)
		sendAndExpect(t, c, a)
		a.Close()
		c.Close()
	}
	client.Close()
	for _, l := range append(apps, bystander) {
		l.Close()
	}
	for _, l := range append(apps, bystander) {
		within(t, "Done", l.Done())
	}
	next.Close()
	check()
}

// Apps that lost their relay together do not come back together: they are spread over
// the longest wait, when the relay was away for long.
func TestReconnectingAppsSpread(t *testing.T) {
	ofSessions(t)
	synctest.Test(t, func(t *testing.T) {
		n := manyApps()
		const minWait, maxWait = time.Second, time.Minute
		network := memnet.New()
		listen := func(address string) net.Listener {
			ln, err := network.Listen(t.Context(), "tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			return ln
		}
		start := func(ln net.Listener) *relay.Server {
			srv, err := relay.NewServer(relay.WithListen(network.Listen))
			if err != nil {
				t.Fatal(err)
			}
			serveOn(t, srv, ln)
			return srv
		}
		ln := listen("10.0.0.1:0")
		srv := start(ln)
		apps := make([]*relay.Listener, n)
		addrs := make([]string, n)
		for i := range apps {
			apps[i] = register(t, ln.Addr().String(), relay.WithBackoff(minWait, maxWait), relay.WithDialer(network.Dial))
			addrs[i] = apps[i].Addr().String()
		}
		srv.Close()
		time.Sleep(10 * maxWait)
		back := time.Now()
		came := &arrivals{Listener: listen(ln.Addr().String())}
		start(came)
		time.Sleep(maxWait)
		synctest.Wait()
		for i, l := range apps {
			if s := l.Stats(); !s.Connected || s.Reconnects != 1 || l.Addr().String() != addrs[i] {
				t.Errorf("app %d, of %s, is at %v: %+v", i, addrs[i], l.Addr(), s)
			}
		}
		times := came.all()
		if len(times) != n {
			t.Errorf("%d attempts of %d apps", len(times), n)
		}
		quarters := make([]int, 4)
		for _, at := range times {
			quarters[min(3, 4*at.Sub(back)/maxWait)]++
		}
		if slices.Max(quarters) > n*3/4 || quarters[2]+quarters[3] < n/20 {
			t.Errorf("in the quarters of the longest wait came %d", quarters)
		}
	})
}

// An app whose transport takes nothing, so that no more streams can be opened to it, costs
// no client: those that it was to have go to another one of the name.
func TestSharedCongested(t *testing.T) {
	ofSessions(t)
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		// The longer the addresses, the fewer clients it takes.
		const from, public = "fd00:aaaa:bbbb:cccc:dddd:eeee:ffff:1111", "fd00:aaaa:bbbb:cccc:dddd:eeee:ffff:2222"
		r := startOn(t, n, relay.WithLogger(nil), relay.WithPublicHost(public),
			relay.WithLimits(relay.Limits{Clients: -1, ClientsPerService: -1}))
		start := time.Now()
		a := roam(t, n, relay.WithName("two"), relay.WithShared())
		come := func() *memnet.Conn {
			t.Helper()
			c, err := n.DialFrom(from)(t.Context(), "tcp", a.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			return c.(*memnet.Conn)
		}
		a.transport().Freeze()
		const most = 100_000
		came := 0
		for ; r.service(t).Refused == 0; synctest.Wait() {
			if came > most {
				t.Fatalf("%d clients were not too many", came)
			}
			for range 100 { // each of whom the app is told, and of his end
				c := come()
				c.SetLinger(0)
				c.Close()
				came++
			}
		}

		b := roam(t, n, relay.WithName("two"), relay.WithShared())
		// The first may be b's by chance. Then b has one, and a none.
		for i := range 3 {
			c := come()
			defer c.Close()
			c.SetDeadline(time.Now().Add(time.Hour))
			c.Write([]byte("x"))
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatalf("client %d after %d of the other app's: %v; refusals %v", i, came, err, r.Refusals())
			}
		}
		expectAt(t, "all that", time.Now(), start, 0) // or a would be silent, and asked first
		if s := b.Stats(); s.Accepted != 3 {
			t.Errorf("the figures of the one that had room: %+v", s)
		}
		a.place("")
		a.transport().Cut()
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
