package peers

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/tcprelay/relay"
)

// TestReload has relayd read its certificate and its tokens anew, again and again, while
// it is in use: no request fails, whoever registers next meets the new ones, and a service
// whose token is gone is told and cut off.
func TestReload(t *testing.T) {
	relayd := filepath.Join(buildExamples(t, "relayd"), "relayd")
	dir := t.TempDir()
	certFile, keyFile, tokenFile := filepath.Join(dir, "cert"), filepath.Join(dir, "key"), filepath.Join(dir, "tokens")
	write := func(file string, b []byte) {
		t.Helper()
		// In one step, as one who deploys would: relayd is not to read half a file.
		if err := os.WriteFile(file+".new", b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	writeCert := func() (pin string) {
		t.Helper()
		cert, _, _ := hostCert(t, "relay.example.com")
		key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey.(*ecdsa.PrivateKey))
		if err != nil {
			t.Fatal(err)
		}
		write(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}))
		write(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
		leaf, err := x509.ParseCertificate(cert.Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		return relay.Pin(leaf)
	}
	pin := writeCert()
	write(tokenFile, []byte("stays\ngoes 1\ngoes 2\ngoes 3\n"))
	p := startExample(t, relayd, "-listen", "127.0.0.1:0", "-cert", certFile, "-key", keyFile, "-tokens", tokenFile)
	addr := p.awaitLine(t, "its address", listening)
	register := func(token string) (*relay.Listener, error) {
		return relay.Register(t.Context(), addr, relay.WithPin(pin), relay.WithToken(token))
	}
	must := func(token string) *relay.Listener {
		t.Helper()
		ln, err := register(token)
		if err != nil {
			t.Fatalf("with the token %q: %v", token, err)
		}
		t.Cleanup(func() { ln.Close() })
		return ln
	}

	app := &watchedListener{Listener: must("stays")}
	site := startHTTP(t, app, echoPath)
	load := startWebLoad(t, site.addr)
	more := func(n int64) {
		t.Helper()
		want := load.answered.Load() + n
		if !p.poll(func() bool { return t.Failed() || load.answered.Load() >= want }) {
			t.Fatal("the clients got no more answers")
		}
	}
	more(100)
	for _, token := range []string{"goes 1", "goes 2", "goes 3"} {
		ln := must(token)
		accepted := make(chan error, 1)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					accepted <- err
					return
				}
				go io.Copy(c, c)
			}
		}()
		c := dialTCP(t, ln.Addr().String())
		wantExchange(t, c, c, "hello")

		pin = writeCert()
		tokens, err := os.ReadFile(tokenFile)
		if err != nil {
			t.Fatal(err)
		}
		write(tokenFile, []byte(strings.ReplaceAll(string(tokens), token+"\n", "")))
		if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		refused := func(what string, err error) {
			t.Helper()
			if e, ok := errors.AsType[*relay.RegisterError](err); !ok || e.Code != relay.CodeUnauthorized {
				t.Errorf("%s: %v", what, err)
			}
		}
		refused("Accept of the service whose token is gone", await(t, accepted, "the end of the service"))
		if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("its client: %v", err)
		}
		wantRefused(t, ln.Addr().String())
		_, err = register(token)
		refused("registering with the token that is gone", err)
		must("stays").Close()
		more(100)
	}
	load.end()
	if sent, answered := load.sent.Load(), load.answered.Load(); sent != answered {
		t.Errorf("%d requests, %d answered", sent, answered)
	}
	if s := app.Stats(); s.Reconnects != 0 {
		t.Errorf("the service that stays came back %d times", s.Reconnects)
	}

	// What cannot be read changes nothing.
	write(certFile, []byte("no certificate"))
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	p.awaitLine(t, "that it was not reloaded", func(line string) (string, bool) {
		return line, strings.Contains(line, "not reloaded")
	})
	must("stays").Close()
	conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	app.wantShutdown(t, site)
}
