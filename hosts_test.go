package relay_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// hostsAddr is where clients of hosts come to on a network in memory.
const hostsAddr = "10.0.0.1:443"

// serveHosts has srv serve hosts until the test ends, at an address of this machine.
func serveHosts(t testing.TB, srv *relay.Server) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveHostsOn(t, srv, ln)
	return ln.Addr().String()
}

func serveHostsOn(t testing.TB, srv *relay.Server, ln net.Listener) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- srv.ServeHosts(ln) }()
	t.Cleanup(func() {
		srv.Close()
		if err := within(t, "ServeHosts' return", done); err != relay.ErrServerClosed {
			t.Errorf("ServeHosts: %v", err)
		}
	})
	eventually(t, "a listener for hosts", func() bool { return relay.ServesHosts(srv) })
}

// requestFor returns a request for a host, of HTTP in clear.
func requestFor(host string) string {
	return fmt.Sprintf("GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
}

// get makes a request at addr for a host, and returns the status and the body.
func get(t testing.TB, addr, host string) (status int, body string) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	io.WriteString(c, requestFor(host))
	return answered(t, c)
}

func answered(t testing.TB, c net.Conn) (status int, body string) {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// serveName answers every request with a name, and the host that was asked for.
func serveName(ln net.Listener, name string) {
	http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, name+" "+r.Host)
	}))
}

// Services of one port: by their own names, by a wildcard, in clear and by TLS that ends
// in the app, which sees the client's address and all that it said.
func TestHosts(t *testing.T) {
	srv, addr := startRelay(t)
	public := serveHosts(t, srv)
	_, port, _ := net.SplitHostPort(public)
	plain := register(t, addr, relay.WithHostname("plain.example.com"))
	wild := register(t, addr, relay.WithHostname("*.wild.example.com"), relay.WithName("wild"))
	secure := register(t, addr, relay.WithHostname("relay.example"))
	go serveName(plain, "plain")
	go serveName(wild, "wild")
	go serveName(tls.NewListener(secure, relayTLS()), "secure")

	if got, want := plain.Addr().String(), "plain.example.com:"+port; got != want {
		t.Errorf("Addr is %s, want %s", got, want)
	}
	if got, want := wild.Addr().String(), "*.wild.example.com:"+port; got != want {
		t.Errorf("Addr is %s, want %s", got, want)
	}
	var names []string
	for _, s := range srv.Services() {
		names = append(names, s.Name+" "+s.Hostname+" "+s.Address)
	}
	if want := []string{
		"plain.example.com plain.example.com plain.example.com:" + port,
		"relay.example relay.example relay.example:" + port,
		"wild *.wild.example.com *.wild.example.com:" + port,
	}; !slices.Equal(names, want) {
		t.Errorf("services %q, want %q", names, want)
	}

	for host, want := range map[string]string{
		"plain.example.com":         "200 plain plain.example.com",
		"PLAIN.example.com:" + port: "200 plain PLAIN.example.com:" + port,
		"a.wild.example.com":        "200 wild a.wild.example.com",
		"wild.example.com":          "404 ",
		"a.b.wild.example.com":      "404 ",
		"example.com":               "404 ",
		"127.0.0.1":                 "404 ",
	} {
		status, body := get(t, public, host)
		if got := fmt.Sprint(status, " ", body); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, want %q", host, got, want)
		}
	}
	config := clientTLS()
	config.ServerName = "relay.example"
	c, err := tls.Dial("tcp", public, config)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, requestFor("relay.example"))
	if status, body := answered(t, c); status != 200 || body != "secure relay.example" {
		t.Errorf("by TLS: %d %s", status, body)
	}
	unknown := clientTLS()
	unknown.ServerName = "unknown.example.com"
	if _, err := tls.Dial("tcp", public, unknown); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
		t.Errorf("of an unknown name: %v", err)
	}
	if n := srv.Refusals(); n["unknown_host"] != 5 || len(n) != 1 {
		t.Errorf("refusals %v", n)
	}
}

// A client's connection is one as any other: addresses, half-close, reset, and every byte.
func TestHostsConn(t *testing.T) {
	srv, addr := startRelay(t)
	public := serveHosts(t, srv)
	l := register(t, addr, relay.WithHostname("a.example"))
	connect := func() (*net.TCPConn, conn) {
		t.Helper()
		c, err := net.Dial("tcp", public)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, requestFor("a.example"))
		app := accept(t, l)
		got := make([]byte, len(requestFor("a.example")))
		if _, err := io.ReadFull(app, got); err != nil || string(got) != requestFor("a.example") {
			t.Fatalf("the app reads %q, %v", got, err)
		}
		return c.(*net.TCPConn), app
	}
	c, app := connect()
	if app.RemoteAddr().String() != c.LocalAddr().String() || app.LocalAddr().String() != public {
		t.Errorf("the app sees %v at %v", app.RemoteAddr(), app.LocalAddr())
	}
	sent := randomBytes(1 << 20)
	go func() {
		c.Write(sent)
		c.CloseWrite()
	}()
	if got, err := io.ReadAll(onlyReader{app}); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes of %d, %v", len(got), len(sent), err)
	}
	go func() {
		app.Write(sent)
		app.Close()
	}()
	if got, err := io.ReadAll(onlyReader{c}); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes of %d, %v", len(got), len(sent), err)
	}
	if s := l.Stats(); s.BytesIn != int64(len(sent)+len(requestFor("a.example"))) || s.BytesOut != int64(len(sent)) {
		t.Errorf("%+v", s)
	}
	c, app = connect()
	c.SetLinger(0)
	c.Close()
	expectReset(t, app)
	c, app = connect()
	app.SetLinger(0)
	app.Close()
	expectReset(t, c)
}

// Who may have a hostname, and who has it already.
func TestHostsRefused(t *testing.T) {
	srv, addr := startRelay(t, relay.WithAuthorizer(func(_ context.Context, r relay.Registration) (relay.Grant, error) {
		g := relay.Grant{Identity: r.Token, FirstPort: 1, LastPort: 2} // of which none can be had
		if r.Token == "few" {
			g.Hostnames = []string{"a.example", "*.few.example", "?.one.example"}
		}
		return g, nil
	}))
	asks := func(token string, opts ...relay.RegisterOption) (*relay.Listener, relay.Code) {
		t.Helper()
		l, err := signUp(t.Context(), addr, append(opts, relay.WithToken(token))...)
		if err != nil {
			return nil, code(err)
		}
		t.Cleanup(func() { l.Close() })
		return l, ""
	}
	if _, code := asks("all", relay.WithHostname("b.example")); code != relay.CodeHostUnavailable {
		t.Errorf("without a listener for hosts: %q", code)
	}
	serveHosts(t, srv)
	for _, ask := range []struct {
		token, host string
		code        relay.Code
		opts        []relay.RegisterOption
	}{
		{"few", "b.example", relay.CodeUnauthorized, nil},
		{"few", "a.example", "", nil},
		{"few", "*.x.example", relay.CodeUnauthorized, nil},
		{"few", "x.few.example", "", nil},
		{"few", "*.few.example", "", nil},
		{"few", "x.one.example", "", nil},
		{"few", "*.one.example", relay.CodeUnauthorized, nil},
		{"all", "*.one.example", "", nil},
		{"all", "a.example", relay.CodeNameTaken, nil},
		{"few", "a.example", relay.CodeNameTaken, nil},
		{"few", "a.example", relay.CodeNameTaken, []relay.RegisterOption{relay.WithName("other")}},
		{"few", "y.few.example", "", []relay.RegisterOption{relay.WithName("a.example")}}, // which is nobody's name
		{"all", "z.example", relay.CodeNameTaken, []relay.RegisterOption{relay.WithName("a.example")}},
		{"all", "s.example", "", []relay.RegisterOption{relay.WithShared()}},
		{"all", "s.example", "", []relay.RegisterOption{relay.WithShared()}},
		{"few", "s.example", relay.CodeUnauthorized, []relay.RegisterOption{relay.WithShared()}},
		{"other", "s.example", relay.CodeNameTaken, []relay.RegisterOption{relay.WithShared()}},
	} {
		if _, code := asks(ask.token, append(ask.opts, relay.WithHostname(ask.host))...); code != ask.code {
			t.Errorf("%s asks for %s: %q, want %q", ask.token, ask.host, code, ask.code)
		}
	}
	for _, bad := range []string{"*", "*.", "*.example", "A.example", "a..example", "a.example.", "-a.example", "a b", "ä.example",
		"a*.example", "*.*.example", "a.example:80", strings.Repeat("a", 64) + ".example", strings.Repeat("a.", 127)} {
		if _, err := relay.Register(t.Context(), addr, relay.WithHostname(bad)); err == nil || !strings.Contains(err.Error(), "hostname") {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := relay.Register(t.Context(), addr, relay.WithHostname("a.example"), relay.WithPort(80)); err == nil {
		t.Error("a hostname and a port")
	}
}

// What is no greeting, is too long or takes too long ends with an answer, and nobody else
// notices.
func TestHostsBadGreetings(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		srv := startOn(t, n, relay.WithLimits(relay.Limits{HandshakeTime: 5 * time.Second, HelloSize: 4 << 10, ClientsPerIP: 3}))
		ln, err := n.Listen(t.Context(), "tcp", hostsAddr)
		if err != nil {
			t.Fatal(err)
		}
		serveHostsOn(t, srv.Server, ln)
		l := register(t, relayAddr, relay.WithDialer(n.DialFrom("10.1.0.1")), relay.WithHostname("a.example"))
		go serveName(l, "a")
		from := func(ip string) net.Conn {
			t.Helper()
			c, err := n.DialFrom(ip)(t.Context(), "tcp", hostsAddr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			return c
		}
		slow := from("10.2.0.2")
		go func() {
			for _, b := range []byte(requestFor("a.example")) {
				if _, err := slow.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}()
		start := time.Now()
		for range 3 {
			c := from("10.2.0.3")
			io.WriteString(c, requestFor("a.example"))
			if status, body := answered(t, c); status != 200 || time.Since(start) > 0 {
				t.Errorf("beside a slow one: %d %s after %v", status, body, time.Since(start))
			}
			c.Close()
			synctest.Wait()
		}
		if status, _ := answered(t, slow); status != 408 || time.Since(start) != 5*time.Second {
			t.Errorf("the slow one: %d after %v", status, time.Since(start))
		}
		for said, want := range map[string]int{
			"GET /" + strings.Repeat("a", 8<<10):        431,
			"GET / HTTP/1.1\r\nnonsense\r\n\r\n":        400,
			"SSH-2.0-OpenSSH\r\n":                       400,
			"GET / HTTP/1.1\r\nHost: b.example\r\n\r\n": 404,
		} {
			c := from("10.2.0.4")
			go io.WriteString(c, said)
			if status, _ := answered(t, c); status != want {
				t.Errorf("%.20q: %d, want %d", said, status, want)
			}
			c.Close()
		}
		for _, said := range []string{"\x00\x00\x00\x08\x04\xd2\x16\x2f", ""} {
			c := from("10.2.0.5")
			io.WriteString(c, said)
			c.(interface{ CloseWrite() error }).CloseWrite()
			if b, err := io.ReadAll(c); len(b) > 0 || err == nil {
				t.Errorf("%q: %q, %v", said, b, err)
			}
		}
		// One address has three at a time, whatever they have said.
		start = time.Now()
		for range 3 {
			from("10.2.0.6")
		}
		synctest.Wait()
		c := from("10.2.0.6")
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) || time.Since(start) > 0 {
			t.Errorf("the fourth of one address: %v after %v", err, time.Since(start))
		}
		if n := srv.Refusals(); n["greeting"] != 6 || n["unknown_host"] != 1 || n["clients_per_ip"] != 1 {
			t.Errorf("refusals %v", n)
		}
	})
}

// The app of a host that is away gets its clients when it comes back in time, and else
// they are told; and so are those over a limit.
func TestHostsAway(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		srv := startOn(t, n, relay.WithLimits(relay.Limits{WaitTime: 20 * time.Second, ClientsPerService: 2}),
			relay.WithAuthorizer(func(context.Context, relay.Registration) (relay.Grant, error) {
				// A hostname is no name, also when the app comes back.
				return relay.Grant{Names: []string{"foo-*"}, Hostnames: []string{"*.example"}}, nil
			}))
		ln, err := n.Listen(t.Context(), "tcp", hostsAddr)
		if err != nil {
			t.Fatal(err)
		}
		serveHostsOn(t, srv.Server, ln)
		r := newRoamer(n)
		r.Listener = register(t, relayAddr, r.options([]relay.RegisterOption{relay.WithHostname("a.example")})...)
		go serveName(r, "a")
		away := func() {
			synctest.Wait()
			r.place("")
			r.transport().Cut()
			synctest.Wait()
		}
		back := func() { r.place("10.1.0.1") }
		ask := func() net.Conn {
			t.Helper()
			c, err := n.DialFrom("10.2.0.1")(t.Context(), "tcp", hostsAddr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			io.WriteString(c, requestFor("a.example"))
			synctest.Wait()
			return c
		}
		first := ask()
		if status, _ := answered(t, first); status != 200 {
			t.Errorf("while it is there: %d", status)
		}
		first.Close()
		synctest.Wait()
		away()
		waiting := []net.Conn{ask(), ask()}
		over := ask()
		if status, _ := answered(t, over); status != 503 {
			t.Errorf("over a limit: %d", status)
		}
		over.Close()
		back()
		for _, c := range waiting {
			if status, body := answered(t, c); status != 200 || body != "a a.example" {
				t.Errorf("who waited: %d %s", status, body)
			}
			c.Close()
		}
		synctest.Wait()
		away()
		start := time.Now()
		c := ask()
		if status, _ := answered(t, c); status != 503 || time.Since(start) != 20*time.Second {
			t.Errorf("who waited in vain: %d after %v", status, time.Since(start))
		}
		c.Close()
		back()
	})
}

// A certification authority that asks by TLS-ALPN (RFC 8737), as autocert has it, is
// answered by the app: the relay passes its hello on as any other.
func TestHostsALPN(t *testing.T) {
	srv, addr := startRelay(t)
	public := serveHosts(t, srv)
	l := register(t, addr, relay.WithHostname("relay.example"))
	config := relayTLS()
	config.NextProtos = []string{"h2", "acme-tls/1"}
	go func() {
		ln := tls.NewListener(l, config)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(io.Discard, c)
			}()
		}
	}()
	asks := clientTLS()
	asks.ServerName, asks.NextProtos = "relay.example", []string{"acme-tls/1"}
	c, err := tls.Dial("tcp", public, asks)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := c.ConnectionState().NegotiatedProtocol; got != "acme-tls/1" {
		t.Errorf("the app speaks %q", got)
	}
}
