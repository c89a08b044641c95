package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay/internal/wire"
)

func tcpAddr(s string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(s)) }

// The headers are written out by hand from the specification.
func TestHeader(t *testing.T) {
	const signature = "\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a"
	unknown, unknown2 := "PROXY UNKNOWN\r\n", signature+"\x20\x00\x00\x00"
	four, four2 := "PROXY TCP4 192.0.2.1 198.51.100.2 51324 443\r\n",
		signature+"\x21\x11\x00\x0c"+"\xc0\x00\x02\x01"+"\xc6\x33\x64\x02"+"\xc8\x7c"+"\x01\xbb"
	for _, tt := range []struct {
		name           string
		client, public net.Addr
		v1, v2         string
	}{
		{"IPv4", tcpAddr("192.0.2.1:51324"), tcpAddr("198.51.100.2:443"), four, four2},
		{"IPv4 in IPv6", tcpAddr("[::ffff:192.0.2.1]:51324"), tcpAddr("198.51.100.2:443"), four, four2},
		{"IPv6", tcpAddr("[2001:db8::1]:51324"), tcpAddr("[2001:db8:0:1::2]:443"),
			"PROXY TCP6 2001:db8::1 2001:db8:0:1::2 51324 443\r\n",
			signature + "\x21\x21\x00\x24" + "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" +
				"\x20\x01\x0d\xb8\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02" + "\xc8\x7c" + "\x01\xbb"},
		{"with a zone", tcpAddr("[fe80::1%eth0]:1"), tcpAddr("[fe80::2%eth0]:2"),
			"PROXY TCP6 fe80::1 fe80::2 1 2\r\n",
			signature + "\x21\x21\x00\x24" + "\xfe\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" +
				"\xfe\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02" + "\x00\x01" + "\x00\x02"},
		{"mixed", tcpAddr("192.0.2.1:51324"), tcpAddr("[2001:db8::2]:443"), unknown, unknown2},
		{"not of TCP", &net.UnixAddr{Name: "x", Net: "unix"}, tcpAddr("198.51.100.2:443"), unknown, unknown2},
		{"public one unknown", tcpAddr("192.0.2.1:51324"), &net.UnixAddr{Name: "x", Net: "unix"}, unknown, unknown2},
		{"none", nil, nil, unknown, unknown2},
	} {
		if got := string(proxyV1.appendHeader([]byte("x"), tt.client, tt.public)); got != "x"+tt.v1 {
			t.Errorf("%s, version 1: %q, want %q", tt.name, got, tt.v1)
		}
		if got := string(proxyV2.appendHeader([]byte("x"), tt.client, tt.public)); got != "x"+tt.v2 {
			t.Errorf("%s, version 2: %q, want %q", tt.name, got, tt.v2)
		}
	}
}

// header reads one from a connection, of either version, and returns its addresses.
func header(r *bufio.Reader) (client, public string, err error) {
	if b, err := r.Peek(1); err != nil || b[0] == 'P' {
		var family string
		var c, p netip.Addr
		var cp, pp uint16
		line, err := r.ReadString('\n')
		if err == nil {
			f := strings.Fields(line)
			if len(f) != 6 || f[0] != "PROXY" || !strings.HasSuffix(line, "\r\n") {
				return "", "", fmt.Errorf("header %q", line)
			}
			family = f[1]
			_, err = fmt.Sscan(f[4]+" "+f[5], &cp, &pp)
			c, p = netip.MustParseAddr(f[2]), netip.MustParseAddr(f[3])
		}
		if err == nil && (family == "TCP4") != c.Is4() {
			err = fmt.Errorf("%s of %s", family, c)
		}
		return netip.AddrPortFrom(c, cp).String(), netip.AddrPortFrom(p, pp).String(), err
	}
	b, err := r.Peek(16)
	if err != nil {
		return "", "", err
	}
	if b, err = r.Peek(16 + int(b[15])); err != nil {
		return "", "", err
	}
	n, src, dst, err := wire.ParseProxy(b)
	if err != nil {
		return "", "", err
	}
	r.Discard(n)
	return src.String(), dst.String(), nil
}

// Targets are told who the client is before anything that it says, also if that is said
// and done with at once.
func TestProxyProtocol(t *testing.T) {
	type visit struct {
		client, public, said string
		err                  error
	}
	for _, version := range []string{"v1", "v2"} {
		for _, dedicated := range []string{"-1", "1"} {
			for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
				t.Run(version+" "+dedicated+" "+at, func(t *testing.T) {
					if ln, err := net.Listen("tcp", at); err != nil {
						t.Skip("not on this machine: ", err)
					} else {
						ln.Close()
					}
					at, _ := startRelay(t, at)
					ln := listen(t)
					visits := make(chan visit)
					go func() {
						for {
							c, err := ln.Accept()
							if err != nil {
								return
							}
							go func() {
								var v visit
								r := bufio.NewReader(c)
								v.client, v.public, v.err = header(r)
								if v.err == nil {
									var rest []byte
									rest, v.err = io.ReadAll(r)
									v.said = string(rest)
								}
								c.Close()
								visits <- v
							}()
						}
					}()
					r := start(t, "-relay", at, "-dedicated", dedicated, "-proxy-protocol", version, "-to", ln.Addr().String())
					addr := r.addrs(t, 1)[""]
					said := make(map[string]string) // by client
					const clients = 20
					for i := range clients {
						c := dial(t, addr)
						text := fmt.Sprintf("client %d", i)
						io.WriteString(c, text)
						c.CloseWrite()
						said[c.LocalAddr().String()] = text
					}
					for range clients {
						select {
						case v := <-visits:
							if text, ok := said[v.client]; !ok || v.said != text || v.public != addr || v.err != nil {
								t.Errorf("%+v, want %q for %s", v, text, addr)
							}
						case <-time.After(patience):
							t.Fatal("a client did not come")
						}
					}
				})
			}
		}
	}
}

// A target that speaks first is not kept waiting by the header.
func TestProxyProtocolServerFirst(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	ln := listen(t)
	go serve(ln, "hello ") // and says back what it is told, the header too
	r := start(t, "-relay", at, "-proxy-protocol", "v1", "-to", ln.Addr().String())
	c := dial(t, r.addrs(t, 1)[""])
	wantRead(t, c, "hello "+string(proxyV1.appendHeader(nil, c.LocalAddr(), c.RemoteAddr())))
}

// A target that takes no header does not hold a client for ever, and one that does gets
// a connection without a deadline.
func TestHeaderDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		defer here.Close()
		defer there.Close()
		client := tcpAddr("192.0.2.1:1")
		begun := time.Now()
		if err := introduce(here, begun.Add(localTime), proxyV1, client, client); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("nobody reads: %v", err)
		}
		if d := time.Since(begun); d != localTime {
			t.Errorf("it took %v", d)
		}
		go io.Copy(io.Discard, there)
		if err := introduce(here, time.Now().Add(localTime), proxyV1, client, client); err != nil {
			t.Errorf("somebody reads: %v", err)
		}
		time.Sleep(2 * localTime)
		if _, err := here.Write([]byte("x")); err != nil {
			t.Errorf("a deadline is left: %v", err)
		}
	})
}
