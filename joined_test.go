package relay_test

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/tcptest"
)

// A pair is a client of an app that joins it to a local connection, and the far end of
// that one.
type pair struct {
	l             *relay.Listener
	client, local *net.TCPConn
	done          chan error
}

// joined returns one whose local connection wrap has changed.
func joined(t *testing.T, wrap func(net.Conn) net.Conn) *pair {
	t.Helper()
	_, addr := startRelay(t)
	l := register(t, addr)
	p := &pair{l: l, client: dial(t, l), done: make(chan error, 1)}
	c := accept(t, l).(*relay.Conn)
	var near *net.TCPConn
	near, p.local = tcptest.Pair(t)
	c.Join(wrap(near), func(err error) { p.done <- err })
	sendAndExpect(t, p.client, p.local)
	return p
}

func asItIs(c net.Conn) net.Conn { return c }

// ended waits for the end, after which nothing of the pair is left at the app.
func (p *pair) ended(t *testing.T) error {
	t.Helper()
	err := within(t, "the end of Join", p.done)
	if s := p.l.Stats(); s.Live != 0 || s.BytesIn == 0 || s.BytesOut == 0 {
		t.Errorf("%+v", s)
	}
	return err
}

// Either end may half-close first, and has all that the other still sends.
func TestJoin(t *testing.T) {
	type plain struct{ net.Conn } // has no half-close and no reset of its own
	for _, wrap := range []func(net.Conn) net.Conn{asItIs, func(c net.Conn) net.Conn { return plain{c} }} {
		for _, clientFirst := range []bool{true, false} {
			p := joined(t, wrap)
			first, second := p.local, p.client
			if clientFirst {
				first, second = second, first
			}
			data := randomBytes(3 << 20)
			if _, isPlain := wrap(nil).(plain); isPlain && clientFirst {
				// It cannot be told of a half-close, and sees the end of both.
				second.Write(data[:100])
				second.CloseWrite()
				expectAll(t, first, data[:100])
				first.CloseWrite()
				expectAll(t, second, nil)
			} else {
				first.CloseWrite()
				expectAll(t, second, nil)
				go func() {
					second.Write(data)
					second.CloseWrite()
				}()
				expectAll(t, first, data)
			}
			if err := p.ended(t); err != nil {
				t.Errorf("Join: %v", err)
			}
		}
	}
}

func expectAll(t *testing.T, c net.Conn, want []byte) {
	t.Helper()
	got, err := io.ReadAll(onlyReader{c})
	if err != nil || string(got) != string(want) {
		t.Fatalf("read %d bytes, %v; want %d", len(got), err, len(want))
	}
}

// A reset of either end reaches the other, while nothing else happens.
func TestJoinReset(t *testing.T) {
	for _, clientFirst := range []bool{true, false} {
		p := joined(t, asItIs)
		first, second := p.local, p.client
		if clientFirst {
			first, second = second, first
		}
		first.SetLinger(0)
		first.Close()
		expectReset(t, second)
		if err := p.ended(t); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Join: %v", err)
		}
	}
}

// A client that closes takes nothing more, which ends the local end too, although that
// has not ended its own direction.
func TestJoinClose(t *testing.T) {
	p := joined(t, asItIs)
	p.client.Close()
	expectAll(t, p.local, nil)
	for {
		if _, err := p.local.Write([]byte("x")); err != nil {
			break
		}
	}
	p.ended(t)
}

// The session's end is that of the pair.
func TestJoinSessionLost(t *testing.T) {
	srv, addr := startRelay(t)
	l := register(t, addr)
	client := dial(t, l)
	near, local := tcptest.Pair(t)
	done := make(chan error, 1)
	accept(t, l).(*relay.Conn).Join(near, func(err error) { done <- err })
	sendAndExpect(t, client, local)
	srv.Close()
	expectReset(t, local)
	if err := within(t, "the end of Join", done); err == nil || errors.Is(err, net.ErrClosed) {
		t.Errorf("Join: %v", err)
	}
}
