package peers

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/tcprelay/relay"
)

// hostCert returns a certificate of its own for a host, and a file that says to trust it.
func hostCert(t *testing.T, host string) (cert tls.Certificate, pool *x509.CertPool, file string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: host},
		DNSNames:              []string{host},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), host+".pem")
	b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(b)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool, file
}

// Two HTTPS services with certificates of their own and one of HTTP share a port: curl
// and WebSockets reach each of them, by the versions of HTTP that they like, beside a
// client that says slowly whom it wants.
func TestHosts(t *testing.T) {
	curl := findProgram(t, "curl", "curl")
	srv, err := relay.NewServer(relay.WithLimits(relay.Limits{HandshakeTime: 3 * time.Second, WaitTime: -1}))
	if err != nil {
		t.Fatal(err)
	}
	registration, public := listenTCP(t), listenTCP(t)
	served := make(chan error, 2)
	go func() { served <- srv.ServeHosts(public) }()
	go func() { served <- srv.Serve(registration) }()
	t.Cleanup(func() {
		srv.Close()
		for range 2 {
			if err := <-served; err != relay.ErrServerClosed {
				t.Errorf("Serve: %v", err)
			}
		}
	})
	_, port, _ := net.SplitHostPort(public.Addr().String())

	handler := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ws" {
			ws, err := websocket.Accept(w, r, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer ws.CloseNow()
			kind, message, err := ws.Read(r.Context())
			if err == nil {
				err = ws.Write(r.Context(), kind, message)
			}
			if err != nil {
				t.Errorf("WebSocket: %v", err)
			}
			ws.Close(websocket.StatusNormalClosure, "")
			return
		}
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "%s %s %d %v", r.Host, r.Proto, n, err)
	}
	// start registers a service, as soon as the relay serves hosts.
	start := func(host string, cert *tls.Certificate) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		ln, err := relay.Register(ctx, registration.Addr().String(), relay.WithHostname(host), relay.WithWait())
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: http.HandlerFunc(handler)}
		done := make(chan error, 1)
		go func() {
			if cert == nil {
				done <- s.Serve(ln)
				return
			}
			s.TLSConfig = &tls.Config{Certificates: []tls.Certificate{*cert}}
			done <- s.ServeTLS(ln, "", "")
		}()
		t.Cleanup(func() {
			s.Close()
			if err := <-done; err != http.ErrServerClosed {
				t.Errorf("%s: %v", host, err)
			}
		})
	}
	one, onePool, oneFile := hostCert(t, "one.example.com")
	two, _, twoFile := hostCert(t, "two.example.com")
	start("one.example.com", &one)
	start("two.example.com", &two)
	start("plain.example.com", nil)

	slow, err := net.Dial("tcp", public.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	cut := make(chan error, 1)
	go func() {
		for {
			if _, err := slow.Write([]byte("G")); err != nil {
				cut <- err
				return
			}
			time.Sleep(time.Second) // its pace
		}
	}()

	name, _ := bigFile(t, 54)
	options := func(host string, more ...string) []string {
		return append([]string{"--silent", "--show-error", "--fail-with-body", "--noproxy", "*",
			"--resolve", host + ":" + port + ":127.0.0.1", "--max-time", "60"}, more...)
	}
	for _, c := range []struct{ host, url, version, ca string }{
		{"one.example.com", "https://", "--http2", oneFile},
		{"one.example.com", "https://", "--http1.1", oneFile},
		{"two.example.com", "https://", "--http2", twoFile},
		{"plain.example.com", "http://", "--http1.1", oneFile},
		{"plain.example.com", "http://", "--http1.0", oneFile},
	} {
		got := runProgram(t, nil, curl, options(c.host, c.version, "--cacert", c.ca, "--upload-file", name, c.url+c.host+":"+port+"/up")...)
		proto := map[string]string{"--http2": "HTTP/2.0", "--http1.1": "HTTP/1.1", "--http1.0": "HTTP/1.0"}[c.version]
		if want := fmt.Sprintf("%s:%s %s 100000000 <nil>", c.host, port, proto); got != want {
			t.Errorf("%s %s says %q, want %q", c.url, c.version, got, want)
		}
	}

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: onePool},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, public.Addr().String())
		},
	}}
	defer client.CloseIdleConnections()
	for _, url := range []string{"wss://one.example.com/ws", "ws://plain.example.com/ws"} {
		ws, _, err := websocket.Dial(ctx, url, &websocket.DialOptions{HTTPClient: client})
		if err != nil {
			t.Fatalf("%s: %v", url, err)
		}
		if err := ws.Write(ctx, websocket.MessageText, []byte("there and back")); err != nil {
			t.Errorf("%s: %v", url, err)
		}
		if _, got, err := ws.Read(ctx); err != nil || string(got) != "there and back" {
			t.Errorf("%s: %q, %v", url, got, err)
		}
		ws.CloseNow()
	}

	// A service that nobody has.
	resp, err := client.Get("http://nobody.example.com/")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound || !strings.Contains(string(body), "no service") {
		t.Errorf("of a name that nobody has: %s, %q", resp.Status, body)
	}
	if _, err := client.Get("https://nobody.example.com/"); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
		t.Errorf("of a name that nobody has, by TLS: %v", err)
	}

	select {
	case <-cut:
	case <-time.After(patience):
		t.Error("the slow client was not cut off")
	}
	if _, err := io.ReadAll(slow); err != nil && !isGone(err) {
		t.Errorf("the slow client reads %v", err)
	}
}

// isGone reports whether a connection was ended by the other side.
func isGone(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && !op.Timeout()
}
