package peers

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

// patience bounds every wait of these tests, so that what never happens fails
// with a line number and not with the test binary's timeout. Nothing is asserted
// about how long things take.
const patience = time.Minute

// TestMain fails the run if goroutines are left when all tests are over: every
// session, listener and conn that a test closed has to take its goroutines along.
func TestMain(m *testing.M) {
	before := make(map[string]bool)
	for _, g := range goroutines() {
		before[goroutineName(g)] = true
	}
	code := m.Run()
	if left := leakedGoroutines(before); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "%d goroutines left after all tests:\n\n%s\n", len(left), bytes.Join(left, []byte("\n\n")))
		code = max(code, 1)
	}
	os.Exit(code)
}

// leakedGoroutines returns the stacks of goroutines that are not in before, after
// giving those that are about to end the time to do so. Nobody is excused: the
// stock libraries leave none behind either, the way these tests use them.
func leakedGoroutines(before map[string]bool) [][]byte {
	for giveUp := time.Now().Add(patience / 4); ; time.Sleep(5 * time.Millisecond) {
		var left [][]byte
		for _, g := range goroutines() {
			if !before[goroutineName(g)] {
				left = append(left, g)
			}
		}
		if len(left) == 0 || time.Now().After(giveUp) {
			return left
		}
	}
}

// goroutines returns the stack of every goroutine.
func goroutines() [][]byte {
	for size := 1 << 20; ; size *= 2 {
		buf := make([]byte, size)
		if n := runtime.Stack(buf, true); n < size {
			return bytes.Split(bytes.TrimSpace(buf[:n]), []byte("\n\n"))
		}
	}
}

// goroutineName returns the "goroutine 12" that starts a stack. It is unique for
// the life of the process, unlike the state that follows.
func goroutineName(stack []byte) string {
	name, _, _ := bytes.Cut(stack, []byte(" ["))
	return string(name)
}

// listenTCP returns a plain TCP listener on a free loopback port.
func listenTCP(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// startRelayServer runs a relay until the test ends and returns the address that
// services register at.
func startRelayServer(t *testing.T, opts ...relay.ServerOption) string {
	t.Helper()
	srv, err := relay.NewServer(opts...)
	if err != nil {
		t.Fatal(err)
	}
	ln := listenTCP(t)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-served; err != relay.ErrServerClosed {
			t.Errorf("relay's Serve returned %v, want ErrServerClosed", err)
		}
	})
	return ln.Addr().String()
}

// listenRelay returns a listener whose public address is on a relay of its own.
func listenRelay(t *testing.T) net.Listener { return listenOver(t) }

// listenDedicated is listenRelay for clients with connections of their own.
func listenDedicated(t *testing.T) net.Listener { return listenOver(t, relay.WithDedicated(2)) }

func listenOver(t *testing.T, opts ...relay.RegisterOption) net.Listener {
	t.Helper()
	ln, err := relay.Register(t.Context(), startRelayServer(t), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// dialTCP connects to addr. The conn has a deadline for everything, and is
// closed when the test ends.
func dialTCP(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// tcpPair returns the two ends of a TCP connection over loopback.
func tcpPair() (dialled, accepted net.Conn, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	if dialled, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		return nil, nil, err
	}
	if accepted, err = ln.Accept(); err != nil {
		dialled.Close()
		return nil, nil, err
	}
	return dialled, accepted, nil
}

// tlsConfigs returns the configs of a server on 127.0.0.1 with a certificate made
// for this run, and of a client that trusts only that certificate.
var tlsConfigs = sync.OnceValues(func() (server, client *tls.Config) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "relay test"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: roots, ServerName: "127.0.0.1"}
})

// testData returns n bytes that look random and depend on seed alone.
func testData(seed uint64, n int64) io.Reader {
	return io.LimitReader(mathrand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}), n)
}

func testBytes(seed uint64, n int64) []byte {
	b := make([]byte, n)
	io.ReadFull(testData(seed, n), b)
	return b
}

// digest reads r to its end and returns the SHA-256 and the number of its bytes.
func digest(r io.Reader) (string, int64, error) {
	h := sha256.New()
	n, err := io.Copy(h, r)
	return hex.EncodeToString(h.Sum(nil)), n, err
}

// testDigest is the digest of testData.
func testDigest(seed uint64, n int64) string {
	sum, _, _ := digest(testData(seed, n))
	return sum
}

// await returns what comes from ch, and fails the test if nothing comes.
func await[T any](t *testing.T, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("waited in vain for %s", what)
		panic("unreachable")
	}
}

// wantExchange writes text to w and reads it from r.
func wantExchange(t *testing.T, w io.Writer, r io.Reader, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(r, got); err != nil || string(got) != text {
		t.Fatalf("read %q, %v, want %q", got, err, text)
	}
}

// wantRefused waits until nobody listens at addr. A relay hears of a closed
// listener a moment later than the app.
func wantRefused(t *testing.T, addr string) {
	t.Helper()
	for giveUp := time.Now().Add(patience); ; {
		c, err := net.DialTimeout("tcp", addr, patience)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
		if err == nil {
			c.Close()
		}
		if time.Now().After(giveUp) {
			t.Fatalf("dialling a closed listener gave %v", err)
		}
	}
}
