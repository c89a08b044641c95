package relay_test

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"testing"

	"github.com/tcprelay/relay"
)

// startRelay runs a relay on loopback until the test ends, and returns it and its
// registration address.
func startRelay(t testing.TB, opts ...relay.ServerOption) (*relay.Server, string) {
	t.Helper()
	srv, err := relay.NewServer(opts...)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-done; err != relay.ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
	})
	return srv, ln.Addr().String()
}

func register(t testing.TB, addr string, opts ...relay.RegisterOption) *relay.Listener {
	t.Helper()
	l, err := relay.Register(t.Context(), addr, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func testLogger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

func dial(t testing.TB, ln net.Listener) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func TestEcho(t *testing.T) {
	_, addr := startRelay(t, relay.WithLogger(testLogger(t)))
	l := register(t, addr)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	c := dial(t, l)
	want := bytes.Repeat([]byte("relay "), 1<<20)
	go func() {
		c.Write(want)
		c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d of %d bytes came back, %v", len(got), len(want), err)
	}
}
