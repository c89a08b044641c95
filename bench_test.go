package relay_test

import (
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/tcprelay/relay"
)

// A lane is a way for a client's bytes through this process: client, relay and an app that
// reads and writes, or joins its client to a local program. All of them allocate in it.
type lane struct {
	name   string
	joined bool
	opts   []relay.RegisterOption
}

var lanes = []lane{
	{"stream", false, nil},
	{"stream/joined", true, nil},
	{"dedicated", false, []relay.RegisterOption{relay.WithDedicated(0)}},
	{"dedicated/joined", true, []relay.RegisterOption{relay.WithDedicated(0)}},
}

// connect returns a client and the end that its bytes come to.
func (n lane) connect(t testing.TB) (client, app net.Conn) {
	t.Helper()
	_, addr := startRelay(t)
	l, err := relay.Register(t.Context(), addr, n.opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	c := dial(t, l)
	app = accept(t, l)
	t.Cleanup(func() { app.Close() })
	if !n.joined {
		return c, app
	}
	local, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	to := dial(t, local)
	end, err := local.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end.Close() })
	app.(*relay.Conn).Join(to, func(error) {})
	return c, end
}

// A mover has bytes go one way, in a goroutine that is there already.
type mover struct {
	to   net.Conn
	size chan int
}

func startMover(t testing.TB, to net.Conn, largest int) mover {
	m := mover{to, make(chan int)}
	t.Cleanup(func() { close(m.size) })
	go func() {
		b := make([]byte, largest)
		for n := range m.size {
			to.Write(b[:n])
		}
	}()
	return m
}

// each runs f for messages and for bulk, each way, with a step that moves so many bytes.
func (n lane) each(t testing.TB, f func(name string, size int, step func())) {
	client, app := n.connect(t)
	const largest = 256 << 10
	got := make([]byte, largest)
	for _, way := range []struct {
		name     string
		from, to net.Conn
	}{{"up", client, app}, {"down", app, client}} {
		m := startMover(t, way.from, largest)
		for _, size := range []int{64, largest} {
			f(fmt.Sprintf("%s/%s/%d", n.name, way.name, size), size, func() {
				m.size <- size
				if _, err := io.ReadFull(way.to, got[:size]); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// BenchmarkEstablished carries bytes over connections that are there: from a client to an
// app and back, through the relay, all of which are in this process.
func BenchmarkEstablished(b *testing.B) {
	for _, n := range lanes {
		n.each(b, func(name string, size int, step func()) {
			b.Run(name, func(b *testing.B) {
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					step()
				}
			})
		})
	}
}

// Nothing is allocated for bytes on their way, in the relay or in the app, however they
// come and whichever way they go.
func TestNoAllocations(t *testing.T) {
	if raceDetector() {
		t.Skip("sync.Pool forgets things at random under the race detector")
	}
	for _, n := range lanes {
		n.each(t, func(name string, size int, step func()) {
			for range 300 { // until windows, pools and stacks have grown
				step()
			}
			// The average is rounded down, so the garbage collector may empty a pool.
			if allocs := testing.AllocsPerRun(1000, step); allocs > 0 {
				t.Errorf("%s: %v allocations", name, allocs)
			}
		})
	}
}

// BenchmarkShort has a client come, get an answer and leave, by an app that joins it to a
// local program. Client and program are a part of what it costs.
func BenchmarkShort(b *testing.B) {
	for _, n := range lanes {
		if !n.joined {
			continue
		}
		b.Run(n.name, func(b *testing.B) {
			_, addr := startRelay(b)
			l, err := relay.Register(b.Context(), addr, n.opts...)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { l.Close() })
			local, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { local.Close() })
			go serveEcho(local)
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					go func() {
						to, err := net.Dial("tcp", local.Addr().String())
						if err != nil {
							c.Close()
							return
						}
						c.(*relay.Conn).Join(to, func(error) {})
					}()
				}
			}()
			b.ReportAllocs()
			b.SetParallelism(8)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					c, err := net.Dial("tcp", l.Addr().String())
					if err != nil {
						b.Error(err)
						return
					}
					if err := echoed(c, 1); err != nil {
						b.Error(err)
					}
					c.Close()
				}
			})
		})
	}
}
