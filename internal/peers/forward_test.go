package peers

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

// TestForwardProxyProtocol has forward tell HAProxy who its clients are, in both versions
// of the PROXY protocol, which HAProxy's log and what it passes on must agree with.
func TestForwardProxyProtocol(t *testing.T) {
	haproxy := findProgram(t, "haproxy", "haproxy")
	forward := filepath.Join(buildExamples(t, "forward"), "forward")
	for _, version := range []string{"v1", "v2"} {
		for _, carried := range []struct {
			name  string
			flags []string
		}{
			{"session", nil},
			{"dedicated", []string{"-dedicated", "2"}},
		} {
			// expose has forward carry clients to HAProxy.
			expose := func(t *testing.T, to string, opts ...relay.ServerOption) string {
				t.Helper()
				args := append([]string{"-relay", startRelayServer(t, opts...), "-to", to, "-proxy-protocol", version}, carried.flags...)
				return startExample(t, forward, args...).awaitLine(t, "the public address", public)
			}
			t.Run(version+"/"+carried.name+"/TCP", func(t *testing.T) { proxyProtocolTCP(t, haproxy, expose) })
			t.Run(version+"/"+carried.name+"/HTTP", func(t *testing.T) { proxyProtocolHTTP(t, haproxy, expose) })
			t.Run(version+"/"+carried.name+"/IPv6", func(t *testing.T) { proxyProtocolIPv6(t, haproxy, expose) })
			t.Run(version+"/"+carried.name+"/unknown", func(t *testing.T) { proxyProtocolUnknown(t, haproxy, expose) })
		}
	}
}

// An exposer makes an address public at a relay with options.
type exposer func(t *testing.T, to string, opts ...relay.ServerOption) string

// startHAProxy starts one that takes clients with a PROXY header, in a mode of its, and
// has them served at addr. More is behind its configuration.
func startHAProxy(t *testing.T, path, mode, addr, more string) (p *program, at string) {
	t.Helper()
	config := filepath.Join(t.TempDir(), "haproxy.cfg")
	// The port is free when it is chosen, and may be taken before HAProxy binds.
	for range 5 {
		ln := listenTCP(t)
		at = ln.Addr().String()
		ln.Close()
		text := fmt.Sprintf(`global
	log stdout format raw local0
	maxconn 100
defaults
	mode %[1]s
	log global
	option %[1]slog
	timeout connect 1m
	timeout client 1m
	timeout server 1m
listen in
	bind %[2]s accept-proxy
	server app %[3]s
%[4]s`, mode, at, addr, more)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		p = startProgram(t, path, "-db", "-f", config)
		ready := p.poll(func() bool {
			c, err := net.Dial("tcp", at)
			if err == nil {
				c.Close()
			}
			return err == nil
		})
		select {
		case <-p.exited: // whoever answered was not this one
			continue
		default:
		}
		if ready {
			return p, at
		}
	}
	t.Fatal("HAProxy does not start")
	panic("unreachable")
}

// wantLogged waits until HAProxy has logged the client, by its address and port.
func wantLogged(t *testing.T, p *program, client net.Addr) {
	t.Helper()
	p.awaitLine(t, "that "+client.String()+" came", func(line string) (string, bool) {
		return line, strings.HasPrefix(line, client.String()+" [")
	})
}

// dialFrom connects to addr from another address of this machine than everybody else's.
func dialFrom(t *testing.T, ip net.IP, addr string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: ip}, Timeout: patience}
	c, err := d.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// haproxyClients is how many clients come to each.
const haproxyClients = 10

func proxyProtocolTCP(t *testing.T, haproxy string, expose exposer) {
	ln := listenTCP(t)
	go serveEcho(ln)
	p, at := startHAProxy(t, haproxy, "tcp", ln.Addr().String(), "")
	public := expose(t, at)
	for i := range haproxyClients {
		c := dialFrom(t, net.IPv4(127, 0, 0, byte(2+i)), public)
		wantExchange(t, c, c, "hello")
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(c); len(rest) > 0 || err != nil {
			t.Errorf("at the end the client read %q, %v", rest, err)
		}
		wantLogged(t, p, c.LocalAddr())
	}
}

// proxyProtocolHTTP sees also what the application behind HAProxy is told.
func proxyProtocolHTTP(t *testing.T, haproxy string, expose exposer) {
	ln := listenTCP(t)
	site := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header.Get("X-Forwarded-For"), " ", r.Header.Get("X-Public"))
	})
	p, at := startHAProxy(t, haproxy, "http", site.addr, "\toption forwardfor\n\thttp-request set-header X-Public %[dst]:%[dst_port]\n")
	public := expose(t, at)
	for i := range haproxyClients {
		ip := net.IPv4(127, 0, 0, byte(2+i))
		c := dialFrom(t, ip, public)
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n")
		answer, err := io.ReadAll(c)
		_, body, _ := strings.Cut(string(answer), "\r\n\r\n")
		if want := ip.String() + " " + public; err != nil || !strings.Contains(body, want) {
			t.Errorf("the application was told %q, %v, want %q", body, err, want)
		}
		wantLogged(t, p, c.LocalAddr())
	}
}

// proxyProtocolIPv6 has clients and the public address be of IPv6.
func proxyProtocolIPv6(t *testing.T, haproxy string, expose exposer) {
	if ln, err := net.Listen("tcp", "[::1]:0"); err != nil {
		t.Skip("no IPv6 here: ", err)
	} else {
		ln.Close()
	}
	ln := listenTCP(t)
	site := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header.Get("X-Forwarded-For"), " ", r.Header.Get("X-Public"))
	})
	p, at := startHAProxy(t, haproxy, "http", site.addr, "\toption forwardfor\n\thttp-request set-header X-Public [%[dst]]:%[dst_port]\n")
	public := expose(t, at, relay.WithPublicHost("::1"))
	c := dialFrom(t, net.IPv6loopback, public)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n")
	answer, err := io.ReadAll(c)
	_, body, _ := strings.Cut(string(answer), "\r\n\r\n")
	if want := "::1 " + public; err != nil || !strings.Contains(body, want) {
		t.Errorf("the application was told %q, %v, want %q", body, err, want)
	}
	_, port, _ := net.SplitHostPort(c.LocalAddr().String())
	p.awaitLine(t, "that the client came", func(line string) (string, bool) {
		return line, strings.HasPrefix(line, "::1:"+port+" [")
	})
}

// proxyProtocolUnknown has clients come to the relay by a Unix socket, of whom there is
// nothing to tell: HAProxy takes them for clients of forward's own address.
func proxyProtocolUnknown(t *testing.T, haproxy string, expose exposer) {
	ln := listenTCP(t)
	go serveEcho(ln)
	p, at := startHAProxy(t, haproxy, "tcp", ln.Addr().String(), "")
	socket := filepath.Join(t.TempDir(), "s")
	expose(t, at, relay.WithListen(func(context.Context, string, string) (net.Listener, error) { return net.Listen("unix", socket) }))
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	wantExchange(t, c, c, "hello")
	c.(*net.UnixConn).CloseWrite()
	if rest, err := io.ReadAll(c); len(rest) > 0 || err != nil {
		t.Errorf("at the end the client read %q, %v", rest, err)
	}
	p.awaitLine(t, "that somebody came", func(line string) (string, bool) {
		return line, strings.HasPrefix(line, "127.0.0.1:") && strings.Contains(line, " [") && !strings.Contains(line, "<NOSRV>")
	})
}
