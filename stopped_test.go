package relay_test

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

// heap returns the bytes of live memory, without what waits in pools.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// fill writes to c until it takes no more, which a reader that has stopped brings
// about, and reports how much it took. It fails the test if it takes all.
func fill(t testing.TB, c net.Conn, all int64) (sent int64) {
	t.Helper()
	p := make([]byte, 256<<10)
	for {
		// Long enough for a Write to get through if it can. If it is not, on a busy
		// machine, there is less in the buffers, and the test sees less.
		c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		n, err := c.Write(p)
		sent += int64(n)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			c.SetWriteDeadline(time.Now().Add(patience))
			return sent
		}
		if err != nil {
			t.Fatal(err)
		}
		if sent >= all {
			t.Fatalf("took all %d bytes, of which nobody reads any", sent)
		}
	}
}

// A reader that has stopped, be it a client or the app, costs no more memory than
// its window and holds up nobody: other conns, deadlines, Close, nor the relay.
func TestStoppedReader(t *testing.T) {
	for _, tt := range []struct {
		name string
		// ends returns who stops, and who writes to it.
		ends func(client *net.TCPConn, app conn) (stopped, writer conn)
		// The stopped one reads this many bytes first, so that its window has grown.
		reads int64
		conns int
		limit int64 // of memory, for each; a window is 256 KiB and grows to 16 MiB
	}{
		// In front of a client there are the buffers of its connection to the relay,
		// which read like it until they are full: its window may have grown.
		{"clients", func(c *net.TCPConn, a conn) (conn, conn) { return c, a }, 0, 4, 42 << 20},
		{"app", func(c *net.TCPConn, a conn) (conn, conn) { return a, c }, 0, 8, 512 << 10},
		{"client after a while", func(c *net.TCPConn, a conn) (conn, conn) { return c, a }, 128 << 20, 1, 42 << 20},
		{"app after a while", func(c *net.TCPConn, a conn) (conn, conn) { return a, c }, 128 << 20, 1, 42 << 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv, addr := startRelay(t)
			l := register(t, addr)
			other, otherApp := dial(t, l), accept(t, l)
			sendAndExpect(t, other, otherApp)
			before := heap()

			type end struct {
				stopped, writer conn
				sent            int64
			}
			var ends []*end
			for range tt.conns {
				client, app := dial(t, l), accept(t, l)
				e := new(end)
				e.stopped, e.writer = tt.ends(client, app)
				if tt.reads > 0 {
					done := make(chan error, 1)
					go func() {
						_, err := io.CopyN(io.Discard, e.stopped, tt.reads)
						done <- err
					}()
					for sent := int64(0); sent < tt.reads; sent += 1 << 20 {
						if _, err := e.writer.Write(make([]byte, 1<<20)); err != nil {
							t.Fatal(err)
						}
					}
					if err := <-done; err != nil {
						t.Fatal(err)
					}
				}
				e.sent = fill(t, e.writer, 256<<20)
				ends = append(ends, e)
			}
			if grew := heap() - before; grew > int64(tt.conns)*tt.limit+1<<20 {
				t.Errorf("%d bytes of memory for %d stopped readers", grew, tt.conns)
			}

			sendAndExpect(t, other, otherApp)
			next, nextApp := dial(t, l), accept(t, l)
			sendAndExpect(t, next, nextApp)
			// More than a window fits through beside them.
			go func() {
				otherApp.Write(make([]byte, 4<<20))
				otherApp.CloseWrite()
			}()
			if n, err := io.Copy(io.Discard, other); err != nil || n != 4<<20 {
				t.Errorf("beside them: %d bytes, %v", n, err)
			}

			// The deadline of a Write that waits, and the Close of one.
			for i, e := range ends {
				wrote := make(chan error, 1)
				go func() {
					var err error
					for err == nil {
						var n int
						n, err = e.writer.Write(make([]byte, 1<<20))
						e.sent += int64(n)
					}
					wrote <- err
				}()
				if i%2 == 0 {
					e.writer.SetWriteDeadline(time.Unix(1, 0))
					expectTimeout(t, "Write", within(t, "Write's return", wrote))
					continue
				}
				e.writer.Close()
				if err := within(t, "Write's return", wrote); !errors.Is(err, net.ErrClosed) {
					t.Errorf("Write: %v", err)
				}
			}
			// One that reads again gets all that was said to be sent.
			first := ends[0]
			first.writer.Close()
			if n, err := io.Copy(io.Discard, onlyReader{first.stopped}); err != nil || n != first.sent {
				t.Errorf("%d bytes arrived of %d, %v", n, first.sent, err)
			}
			// The others are still stopped when the relay is closed.
			srv.Close()
		})
	}
}

// Nor do stopped readers hold up the ends of things: a listener's Close, a client
// that leaves, an app that aborts.
func TestStoppedReaderEnds(t *testing.T) {
	// So that the relay looks every second for what nothing tells it over dedicated
	// connections.
	_, addr, log := startLogged(t, relay.WithLimits(relay.Limits{LingerTime: 8 * time.Second}))
	check := nothingLeft(t)
	l := register(t, addr)

	client, app := dial(t, l), accept(t, l)
	fill(t, app, 64<<20)
	client.Close() // with bytes unread: a reset
	log.wait(t, "client left", 1)
	eventually(t, "a failing Write", func() bool {
		_, err := app.Write([]byte("x"))
		return isReset(err)
	})
	app.Close()

	client, app = dial(t, l), accept(t, l)
	fill(t, app, 64<<20)
	app.SetLinger(0)
	app.Close()
	log.wait(t, "client left", 2)
	expectReset(t, client)
	client.Close()

	client, app = dial(t, l), accept(t, l)
	fill(t, client, 64<<20)
	app.Close() // with bytes unread: nothing has to arrive
	log.wait(t, "client left", 3)
	client.Close()

	client, app = dial(t, l), accept(t, l)
	fill(t, app, 64<<20)
	l.Close()
	app.Close()
	client.SetLinger(0)
	client.Close()
	log.wait(t, "session ended", 1)
	check()
}
