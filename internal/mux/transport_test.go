package mux

import (
	"bytes"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/tcptest"
)

func tcpPair(t testing.TB) (net.Conn, net.Conn) { return tcptest.Pair(t) }

// transports are what sessions of ours talk over in tests that are about both ends.
var transports = []struct {
	name string
	pair func(testing.TB) (net.Conn, net.Conn)
}{
	{"pipe", func(testing.TB) (net.Conn, net.Conn) { return net.Pipe() }},
	{"tcp", tcpPair},
	{"tls", tlsPair},
	{"line", func(testing.TB) (net.Conn, net.Conn) { return newLine(lineConfig{piece: 1000}) }},
}

// sessionPair starts a client and a server on the two ends of a transport. Both are
// gone when the test is over.
func sessionPair(t testing.TB, c1, c2 net.Conn, cfg Config) (client, server *Session) {
	client, server = Client(c1, cfg), Server(c2, cfg)
	t.Cleanup(func() {
		client.Close()
		server.Close()
	})
	return client, server
}

// streamPair returns both ends of a stream that client opened.
func streamPair(t testing.TB, client, server *Session) (opened, accepted *Stream) {
	t.Helper()
	opened, err := client.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	return opened, accept(t, server)
}

// pipeStreams returns both ends of a stream over a net.Pipe.
func pipeStreams(t testing.TB, cfg Config) (opened, accepted *Stream) {
	t.Helper()
	c1, c2 := net.Pipe()
	client, server := sessionPair(t, c1, c2, cfg)
	return streamPair(t, client, server)
}

// lineConfig describes an in-memory transport. Time passes on it only as far as it
// says so, which makes it fit for a synctest bubble.
type lineConfig struct {
	delay time.Duration // from one end to the other
	rate  int           // bytes in a second; 0: no limit
	room  int           // bytes under way before Write waits; 0: 1 MiB
	piece int           // most bytes that one Read returns; 0: no limit
}

// newLine returns the two ends of a transport. Unlike net.Pipe's, its Write does
// not wait for a Read.
func newLine(cfg lineConfig) (net.Conn, net.Conn) {
	if cfg.room == 0 {
		cfg.room = 1 << 20
	}
	ab, ba := newLineHalf(cfg), newLineHalf(cfg)
	return &lineConn{in: ba, out: ab}, &lineConn{in: ab, out: ba}
}

type lineConn struct{ in, out *lineHalf }

func (c *lineConn) Read(p []byte) (int, error)  { return c.in.read(p) }
func (c *lineConn) Write(p []byte) (int, error) { return c.out.write(p) }

func (c *lineConn) Close() error {
	c.out.close(&c.out.writerGone)
	c.in.close(&c.in.readerGone)
	return nil
}

func (c *lineConn) CloseWrite() error {
	c.out.close(&c.out.writerGone)
	return nil
}

func (c *lineConn) LocalAddr() net.Addr              { return lineAddr{} }
func (c *lineConn) RemoteAddr() net.Addr             { return lineAddr{} }
func (c *lineConn) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (c *lineConn) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (c *lineConn) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

type lineAddr struct{}

func (lineAddr) Network() string { return "line" }
func (lineAddr) String() string  { return "line" }

// A lineHalf is one direction of a line.
type lineHalf struct {
	lineConfig

	mu         sync.Mutex
	changed    sync.Cond
	packets    []packet
	under      int       // bytes in packets
	free       time.Time // when the line can take the next byte
	writerGone bool
	readerGone bool
}

type packet struct {
	arrives time.Time
	b       []byte
}

func newLineHalf(cfg lineConfig) *lineHalf {
	h := &lineHalf{lineConfig: cfg}
	h.changed.L = &h.mu
	return h
}

func (h *lineHalf) close(gone *bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	*gone = true
	h.changed.Broadcast()
}

func (h *lineHalf) write(p []byte) (n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.writerGone:
			return n, net.ErrClosed
		case h.readerGone:
			return n, io.ErrClosedPipe
		case n == len(p):
			return n, nil
		case h.under >= h.room:
			h.changed.Wait()
			continue
		}
		m := min(len(p)-n, h.room-h.under, chunkSize)
		if now := time.Now(); h.free.Before(now) {
			h.free = now
		}
		if h.rate > 0 {
			h.free = h.free.Add(time.Duration(m) * time.Second / time.Duration(h.rate))
		}
		h.packets = append(h.packets, packet{h.free.Add(h.delay), append([]byte(nil), p[n:n+m]...)})
		h.under += m
		n += m
		h.changed.Broadcast()
	}
}

func (h *lineHalf) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.readerGone:
			return 0, net.ErrClosed
		case len(h.packets) == 0 && h.writerGone:
			return 0, io.EOF
		case len(h.packets) == 0:
			h.changed.Wait()
			continue
		}
		first := &h.packets[0]
		if left := time.Until(first.arrives); left > 0 {
			timer := time.AfterFunc(left, func() {
				h.mu.Lock()
				defer h.mu.Unlock()
				h.changed.Broadcast()
			})
			h.changed.Wait()
			timer.Stop()
			continue
		}
		if h.piece > 0 {
			p = p[:min(len(p), h.piece)]
		}
		n := copy(p, first.b)
		if first.b = first.b[n:]; len(first.b) == 0 {
			h.packets = h.packets[1:]
		}
		h.under -= n
		h.changed.Broadcast()
		return n, nil
	}
}

// A transport that embeds a socket has all that is sent pass its own Write and Read.
func TestEmbeddedSocket(t *testing.T) {
	a, b := tcpPair(t)
	masked := func(c net.Conn) net.Conn { return &mask{TCPConn: c.(*net.TCPConn)} }
	client, server := sessionPair(t, masked(a), masked(b), Config{})
	st, err := client.Open([]byte("opening"))
	if err != nil {
		t.Fatal(err)
	}
	far, err := server.Accept()
	if err != nil {
		t.Fatal(err)
	}
	want := append([]byte("opening"), bytes.Repeat([]byte("0123456789"), 100_000)...)
	go func() {
		st.Write(want[len("opening"):])
		st.CloseWrite()
	}()
	got, err := io.ReadAll(far)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes of %d, %v", len(got), len(want), err)
	}
	if client.conn.(*mask).wrote.Load() < int64(len(want)) {
		t.Errorf("only %d bytes of %d were written by the transport's own Write", client.conn.(*mask).wrote.Load(), len(want))
	}
}

// A mask flips all bits.
type mask struct {
	*net.TCPConn
	wrote atomic.Int64
}

func (m *mask) Write(p []byte) (int, error) {
	m.wrote.Add(int64(len(p)))
	return m.TCPConn.Write(flipped(p))
}

func (m *mask) Read(p []byte) (int, error) {
	n, err := m.TCPConn.Read(p)
	copy(p, flipped(p[:n]))
	return n, err
}

func flipped(p []byte) []byte {
	q := bytes.Clone(p)
	for i := range q {
		q[i] ^= 0xff
	}
	return q
}
