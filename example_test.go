package relay_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/tcprelay/relay"
)

// runRelay runs a relay on loopback for an example, and returns the address that
// services register at. Elsewhere it is a program of its own, such as
// examples/relayd.
func runRelay(opts ...relay.ServerOption) (srv *relay.Server, addr string) {
	srv, err := relay.NewServer(opts...)
	if err != nil {
		log.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(ln)
	return srv, ln.Addr().String()
}

// An http.Server that has no port of its own is reached through the relay's.
func Example() {
	// The relay, usually on another machine.
	srv, err := relay.NewServer()
	if err != nil {
		log.Fatal(err)
	}
	registration, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(registration)
	defer srv.Close()

	// The app.
	ln, err := relay.Register(context.Background(), registration.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	app := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "hello from", r.URL.Path)
	})}
	go app.Serve(ln)
	defer app.Close()

	// A client, which knows the public address only.
	resp, err := http.Get("http://" + ln.Addr().String() + "/nowhere")
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	fmt.Print(string(body), err)

	// Output:
	// hello from /nowhere
	// <nil>
}

// A service may have a name, by which the relay's operator knows it, and ask for a
// port. It may log what happens to it.
func ExampleRegister() {
	srv, addr := runRelay()
	defer srv.Close()

	// Registering may wait for a relay that does not answer; the context ends that.
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	ln, err := relay.Register(ctx, addr,
		relay.WithName("greeter"),
		relay.WithPort(0), // any
		relay.WithBacklog(64),
		relay.WithLogger(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))),
	)
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()

	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return // net.ErrClosed after Close, or why the relay refuses the app
			}
			fmt.Fprintln(conn, "good day")
			conn.Close()
		}
	}()

	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	greeting, err := io.ReadAll(client)
	fmt.Printf("%q %v\n", greeting, err)
	fmt.Println(srv.Services()[0].Name)

	// Output:
	// "good day\n" <nil>
	// greeter
}

// A refused registration tells why.
func ExampleRegisterError() {
	srv, addr := runRelay(relay.WithPorts(8081, 8180))
	defer srv.Close()

	_, err := relay.Register(context.Background(), addr, relay.WithPort(22))
	if refused, ok := errors.AsType[*relay.RegisterError](err); ok {
		fmt.Println(refused.Code)
		fmt.Println(refused.Message)
	}

	// Output:
	// port_unavailable
	// port 22 is not one of this relay's
}

// A relay gives out the ports that it is told to, and binds them where it is told to.
func ExampleNewServer() {
	srv, err := relay.NewServer(
		relay.WithPorts(20000, 29999),
		relay.WithPublicHost("127.0.0.1"),         // "" is all addresses
		relay.WithAdvertisedHost("relay.example"), // what clients find the host under
	)
	if err != nil {
		log.Fatal(err)
	}
	registration, err := net.Listen("tcp", "127.0.0.1:0") // or srv.ListenAndServe
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(registration)
	defer srv.Close()

	ln, err := relay.Register(context.Background(), registration.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	host, port, err := net.SplitHostPort(ln.Addr().String())
	fmt.Println(host, len(port), port[0] == '2', err)

	// Output:
	// relay.example 5 true <nil>
}

// Serve takes any listener, and several at once. Here services register over TCP,
// and those on the relay's own machine over a Unix socket.
func ExampleServer_Serve() {
	srv, err := relay.NewServer()
	if err != nil {
		log.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "relay")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "relay.sock")
	local, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatal(err)
	}
	remote, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	ended := make(chan error)
	for _, registration := range []net.Listener{local, remote} {
		go func() { ended <- srv.Serve(registration) }()
	}

	near, err := relay.Register(context.Background(), socket, relay.WithName("near"),
		relay.WithDialer(func(ctx context.Context, _, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", addr)
		}))
	if err != nil {
		log.Fatal(err)
	}
	defer near.Close()
	far, err := relay.Register(context.Background(), remote.Addr().String(), relay.WithName("far"))
	if err != nil {
		log.Fatal(err)
	}
	defer far.Close()
	for _, service := range srv.Services() {
		fmt.Println(service.Name)
	}

	srv.Close()
	fmt.Println(<-ended)
	fmt.Println(<-ended)

	// Output:
	// far
	// near
	// relay: server closed
	// relay: server closed
}

// Between app and relay goes TLS. What the clients of the public address speak is
// the app's affair: TLS too, if the app wraps its listener with tls.NewListener.
func ExampleWithTLSConfig() {
	certificate, roots := certificateFor("relay.example") // usually tls.LoadX509KeyPair
	srv, addr := runRelay(relay.WithTLSConfig(&tls.Config{
		Certificates: []tls.Certificate{certificate},
	}))
	defer srv.Close()

	// The relay must show a certificate for the name, which is that of the address
	// unless the config says otherwise.
	ln, err := relay.Register(context.Background(), addr, relay.WithTLSConfig(&tls.Config{
		RootCAs:    roots, // nil for the system's
		ServerName: "relay.example",
	}))
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	fmt.Println("registered over TLS")

	// An app that does not trust the relay does not register.
	_, err = relay.Register(context.Background(), addr, relay.WithTLSConfig(&tls.Config{
		RootCAs: x509.NewCertPool(),
	}))
	if failed, ok := errors.AsType[*relay.RegisterError](err); ok {
		fmt.Println(failed.Code)
	}

	// Output:
	// registered over TLS
	// tls
}

// certificateFor makes a certificate that lasts as long as an example does.
func certificateFor(host string) (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     []string{host},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		log.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, roots
}

// The connection to the relay may be made of anything that carries bytes both ways.
// Here it is a pipe in memory.
func ExampleWithDialer() {
	srv, err := relay.NewServer()
	if err != nil {
		log.Fatal(err)
	}
	registration := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	go srv.Serve(registration)
	defer srv.Close()

	ln, err := relay.Register(context.Background(), "no address is needed", relay.WithDialer(
		func(ctx context.Context, network, addr string) (net.Conn, error) {
			return registration.Dial(ctx)
		}))
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	fmt.Println("registered from", srv.Services()[0].Sessions[0].Remote)

	// Output:
	// registered from pipe
}

// A pipeListener is a net.Listener in memory.
type pipeListener struct {
	conns  chan net.Conn
	close  sync.Once
	closed chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Dial(ctx context.Context) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipeListener) Close() error {
	l.close.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }

// Two services on one public port, told apart by the host that a client asks for.
func ExampleWithHostname() {
	srv, addr := runRelay()
	defer srv.Close()
	public, err := net.Listen("tcp", "127.0.0.1:0") // :443 and :80, elsewhere
	if err != nil {
		log.Fatal(err)
	}
	go srv.ServeHosts(public)

	for _, host := range []string{"one.example.com", "two.example.com"} {
		// WithWait, for the relay may not serve hosts yet.
		ln, err := relay.Register(context.Background(), addr, relay.WithHostname(host), relay.WithWait())
		if err != nil {
			log.Fatal(err)
		}
		app := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s here, for a client of %s\n", host, r.Host)
		})}
		go app.Serve(ln) // or app.ServeTLS: TLS ends here
		defer app.Close()
	}

	// Clients, whom DNS would lead to the relay.
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, public.Addr().String())
		},
	}}
	for _, host := range []string{"two.example.com", "one.example.com", "nobody.example.com"} {
		resp, err := client.Get("http://" + host)
		if err != nil {
			log.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		fmt.Print(resp.StatusCode, ": ", string(body))
		if err != nil {
			log.Fatal(err)
		}
	}

	// Output:
	// 200: two.example.com here, for a client of two.example.com
	// 200: one.example.com here, for a client of one.example.com
	// 404: There is no service of this name here.
}

// Clients are carried to a program that knows nothing of relays.
func ExampleConn_Join() {
	local, err := net.Listen("tcp", "127.0.0.1:0") // the program
	if err != nil {
		log.Fatal(err)
	}
	defer local.Close()
	go func() {
		for {
			c, err := local.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()

	srv, addr := runRelay()
	defer srv.Close()
	ln, err := relay.Register(context.Background(), addr)
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	joined := make(chan error, 1)
	go func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("tcp", local.Addr().String())
			if err != nil {
				client.Close()
				continue
			}
			client.(*relay.Conn).Join(to, func(err error) { joined <- err })
		}
	}()

	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "there and back")
	c.(*net.TCPConn).CloseWrite() // which the program is told of
	echo, err := io.ReadAll(c)
	fmt.Println(string(echo), err)
	fmt.Println(<-joined)

	// Output:
	// there and back <nil>
	// <nil>
}

// A client may say that it has sent everything and still wait for the answer, as
// many a command does that reads its input to the end. The app sees io.EOF, and has
// the other direction to itself.
func ExampleConn_CloseWrite() {
	srv, addr := runRelay()
	defer srv.Close()
	ln, err := relay.Register(context.Background(), addr)
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()

	go func() {
		accepted, err := ln.Accept()
		if err != nil {
			return
		}
		conn := accepted.(*relay.Conn) // as Accept's always are
		defer conn.Close()
		n, err := io.Copy(io.Discard, conn) // until the client's half-close
		fmt.Fprintf(conn, "%d bytes, %v", n, err)
		conn.CloseWrite() // which ends the answer, as Close would
	}()

	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	fmt.Fprint(client, "all that I have to say")
	client.(*net.TCPConn).CloseWrite()
	answer, err := io.ReadAll(client)
	fmt.Println(string(answer), err)

	// Output:
	// 22 bytes, <nil> <nil>
}

// Services is a snapshot for status pages and metrics.
func ExampleServer_Services() {
	srv, addr := runRelay()
	defer srv.Close()
	ln, err := relay.Register(context.Background(), addr, relay.WithName("echo"))
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	}()

	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	fmt.Fprint(client, "marco")
	if _, err := io.ReadFull(client, make([]byte, 5)); err != nil {
		log.Fatal(err)
	}

	for _, s := range srv.Services() {
		fmt.Printf("%s: %d client now, %d in all, %d bytes in\n", s.Name, len(s.Clients), s.Accepted, s.BytesIn)
		fmt.Println("address as the app knows it:", s.Address == ln.Addr().String())
		for _, c := range s.Clients {
			fmt.Println("client as it knows itself:", c.Remote == client.LocalAddr().String())
		}
	}

	// Output:
	// echo: 1 client now, 1 in all, 5 bytes in
	// address as the app knows it: true
	// client as it knows itself: true
}
