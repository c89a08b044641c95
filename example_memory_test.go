package relay_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"sync"
	"syscall"

	"github.com/tcprelay/relay"
)

// A quietNetwork is one of pipes, for tests: no sockets, no ports of the machine, and no
// waiting, so that it goes well with testing/synctest.
type quietNetwork struct {
	mu        sync.Mutex
	listeners map[string]*quietListener
	port      int // the last that was given out
}

// Listen is for relay.WithListen, and for the relay itself.
func (m *quietNetwork) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if port == "0" {
		m.port++
		address = net.JoinHostPort(host, strconv.Itoa(10_000+m.port))
	}
	if m.listeners[address] != nil {
		return nil, syscall.EADDRINUSE
	}
	l := &quietListener{m: m, addr: quietAddr(address), conns: make(chan net.Conn), closed: make(chan struct{})}
	m.listeners[address] = l
	return l, nil
}

// Dial is for relay.WithDialer, and for clients.
func (m *quietNetwork) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	m.mu.Lock()
	l := m.listeners[address]
	m.mu.Unlock()
	if l == nil {
		return nil, syscall.ECONNREFUSED
	}
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-l.closed:
		return nil, syscall.ECONNREFUSED
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

type quietListener struct {
	m      *quietNetwork
	addr   quietAddr
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *quietListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *quietListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.m.mu.Lock()
		delete(l.m.listeners, string(l.addr))
		l.m.mu.Unlock()
	})
	return nil
}

func (l *quietListener) Addr() net.Addr { return l.addr }

type quietAddr string

func (quietAddr) Network() string  { return "tcp" }
func (a quietAddr) String() string { return string(a) }

// A program that embeds this library is tested without a network: relay, app and clients
// are connected by pipes. (A pipe has no half-close and no reset, so what an app does
// about those is for a test over loopback.)
func Example_inMemory() {
	network := &quietNetwork{listeners: make(map[string]*quietListener)}
	srv, err := relay.NewServer(relay.WithListen(network.Listen))
	if err != nil {
		log.Fatal(err)
	}
	registration, err := network.Listen(context.Background(), "tcp", "relay.test:7000")
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(registration)
	defer srv.Close()

	// The program, which is told where the relay is and how to get there.
	ln, err := relay.Register(context.Background(), "relay.test:7000", relay.WithDialer(network.Dial))
	if err != nil {
		log.Fatal(err)
	}
	app := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "nothing left this process")
	})}
	go app.Serve(ln)
	defer app.Close()

	client := &http.Client{Transport: &http.Transport{DialContext: network.Dial}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://" + ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	fmt.Print(string(body), err)

	// Output:
	// nothing left this process
	// <nil>
}
