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
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay"
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
