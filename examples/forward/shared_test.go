package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

// twoPorts returns the first of two ports, of which one follows the other, that were free.
// They are below those that systems give to who asks for any, half of which are the local
// ones of connections.
func twoPorts(t *testing.T) int {
	t.Helper()
	for range 1000 {
		port := 10_000 + rand.IntN(20_000)
		one, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
		if err != nil {
			continue
		}
		two, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port+1))
		one.Close()
		if err == nil {
			two.Close()
			return port
		}
	}
	t.Fatal("no two ports are free")
	panic("unreachable")
}

// A target that names a port gets it, also if another one, which takes any, comes first.
func TestPortsInOrder(t *testing.T) {
	for range 20 {
		port := twoPorts(t)
		at, end := startRelay(t, "127.0.0.1:0", relay.WithPorts(port, port+1))
		r := start(t, "-relay", at, "-to", "1", "-to", fmt.Sprint("2,port=", port))
		addrs := r.addrs(t, 2)
		if one, two := addrs["localhost:1"], addrs["localhost:2"]; one != fmt.Sprint("127.0.0.1:", port+1) || two != fmt.Sprint("127.0.0.1:", port) {
			t.Fatalf("%q", addrs)
		}
		r.stop()
		r.ended(t)
		end()
	}
}

// Those that share a name have the port that one of them names.
func TestSharedPort(t *testing.T) {
	for range 20 {
		port := twoPorts(t)
		at, end := startRelay(t, "127.0.0.1:0", relay.WithPorts(port, port+1))
		r := start(t, "-relay", at, "-shared", "-name", "web", "-to", "1", "-to", fmt.Sprint("2,port=", port+1), "-to", "3")
		for target, addr := range r.addrs(t, 3) {
			if addr != fmt.Sprint("127.0.0.1:", port+1) {
				t.Fatalf("%s is at %s, not %d", target, addr, port+1)
			}
		}
		r.stop()
		r.ended(t)
		end()
	}
}

func listenUnix(t *testing.T, path string) net.Listener {
	t.Helper()
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Skip("no Unix sockets here: ", err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// visit returns what a client reads that says nothing; one that is reset may be so as soon
// as it has connected.
func visit(addr string) string {
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return ""
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	c.(*net.TCPConn).CloseWrite()
	got, _ := io.ReadAll(c)
	return string(got)
}

// Of those that share a name, one whose target is away takes a client with it and no more,
// until the target is back.
func TestSharedAway(t *testing.T) {
	for _, proxy := range []string{"off", "v1", "v2"} {
		t.Run(proxy, func(t *testing.T) {
			at, _ := startRelay(t, "127.0.0.1:0")
			good := listen(t)
			go serve(good, "good ")
			socket := filepath.Join(t.TempDir(), "s") // where nobody else is going to listen
			bad := listenUnix(t, socket)
			r := start(t, "-relay", at, "-shared", "-name", "web", "-proxy-protocol", proxy, "-drain", "1h",
				"-to", good.Addr().String(), "-to", "unix:"+socket)
			addr := r.addrs(t, 2)[good.Addr().String()]
			m := r.mappings[1]

			// Somebody stays with either of them.
			served := make(chan net.Conn, 1)
			go func() { c, _ := bad.Accept(); served <- c }()
			var stays []*net.TCPConn
			for r.mappings[0].stats().Live == 0 || m.stats().Live == 0 { // the relay may not give it clients yet when it has said the address
				stays = append(stays, dial(t, addr))
				eventually(t, "the client is with one of them", func() bool {
					return r.mappings[0].stats().Live+m.stats().Live == len(stays)
				})
			}
			local := <-served
			defer local.Close()
			bad.Close()

			reset := 0
			for range 40 {
				if !strings.HasPrefix(visit(addr), "good ") {
					reset++
				}
			}
			if reset > 1 {
				t.Errorf("%d of 40 were reset", reset)
			}
			eventually(t, "it is away", func() bool { // for none of them may have come to it
				if m.row().state == away {
					return true
				}
				visit(addr)
				return false
			})
			if got, stats := m.row(), m.stats(); stats.Live != 1 || stats.Accepted < 2 || got.why == "" {
				t.Errorf("away: %+v, %+v", got, stats)
			}
			if got := strings.Count(r.log.String(), "target is away"); got != 1 {
				t.Errorf("it was said %d times", got)
			}

			go serve(listenUnix(t, socket), "again ")
			eventually(t, "it has clients again", func() bool { return strings.Contains(visit(addr), "again ") })
			if got := m.row(); got.state != connected || got.addr != addr || got.missed != 1 {
				t.Errorf("%+v", got)
			}
			if got := len(r.out.lines()); got != 2 {
				t.Errorf("%d addresses were printed", got)
			}

			// Who came before it went is there yet, and counts until the end.
			io.WriteString(local, "still here?")
			local.Close()
			said := ""
			for _, c := range stays {
				c.CloseWrite()
				b, _ := io.ReadAll(c)
				said += string(b)
			}
			if !strings.Contains(said, "still here?") {
				t.Errorf("those who stayed read %q", said)
			}
			eventually(t, "they are counted", func() bool { s := m.stats(); return s.Live == 0 && s.Accepted > 2 })
			r.stop()
			r.ended(t)
			if len(r.failed) > 0 || r.cut {
				t.Errorf("ended with %v, cut off: %v", r.failed, r.cut)
			}
		})
	}
}

// When all targets of a name are away nobody is at its address, and when one is back it is
// the same.
func TestSharedAllAway(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	socket := filepath.Join(t.TempDir(), "s")
	r := start(t, "-relay", at, "-shared", "-name", "web", "-to", "unix:"+socket)
	addr := r.addrs(t, 1)[""]
	wantReset(t, addr)
	wantRefused(t, addr)
	go serve(listenUnix(t, socket), "")
	eventually(t, "it is reached again", func() bool { return r.mappings[0].row().state == connected })
	wantExchange(t, dial(t, addr), "hello")
	if got := r.out.lines(); len(got) != 1 {
		t.Errorf("printed %q", got)
	}
}

// A stop while a target is away is an end in order.
func TestStopAway(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	r := start(t, "-relay", at, "-shared", "-name", "web", "-to", nobody(t))
	wantReset(t, r.addrs(t, 1)[""])
	eventually(t, "it is away", func() bool { return r.mappings[0].row().state == away })
	r.stop()
	r.ended(t)
	if len(r.failed) > 0 || r.cut || r.mappings[0].row().state != ended {
		t.Errorf("ended with %v, cut off: %v", r.failed, r.cut)
	}
}
