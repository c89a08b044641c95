package relay_test

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

// selfSigned is a certificate that nobody vouches for, of no name and out of date, with
// a key of its own, or with that of another one.
func selfSigned(t testing.TB, key *ecdsa.PrivateKey) (cert tls.Certificate, pin string) {
	t.Helper()
	cert, _ = certificateFor("other.example")
	if key != nil {
		template := &x509.Certificate{SerialNumber: cert.Leaf.SerialNumber, NotAfter: time.Unix(1, 0)}
		der, err := x509.CreateCertificate(nil, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		cert.Certificate, cert.PrivateKey = [][]byte{der}, key
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return cert, relay.Pin(leaf)
}

func TestPin(t *testing.T) {
	cert, pin := selfSigned(t, nil)
	_, other := selfSigned(t, nil)
	again, same := selfSigned(t, cert.PrivateKey.(*ecdsa.PrivateKey))
	if pin != same || pin == other || !strings.HasPrefix(pin, "sha256//") || len(pin) != len("sha256//")+44 {
		t.Fatalf("pins %q, the same %q, another %q", pin, same, other)
	}
	for name, cert := range map[string]tls.Certificate{"the key": cert, "the same key": again} {
		t.Run(name, func(t *testing.T) {
			_, addr := startRelay(t, relay.WithTokens(tokenA),
				relay.WithTLSConfig(&tls.Config{Certificates: []tls.Certificate{cert}}))
			for _, pins := range [][]string{{pin}, {other, pin}, {pin + "\n"}} { // as read from a file
				l := register(t, addr, relay.WithPin(pins...), relay.WithToken(tokenA))
				go serveEcho(l)
				echoes(t, dial(t, l))
			}
		})
	}
}

// A relay with another key gets nothing, whatever its certificate says, and is not waited
// for: it will not be the right one.
func TestPinOfAnother(t *testing.T) {
	_, other := selfSigned(t, nil)
	for name, opts := range map[string][]relay.RegisterOption{
		"alone":        {relay.WithPin(other)},
		"with a CA":    {relay.WithPin(other), relay.WithTLSConfig(clientTLS())},
		"CA first":     {relay.WithTLSConfig(clientTLS()), relay.WithPin(other)},
		"while it may": {relay.WithPin(other), relay.WithWait()},
	} {
		t.Run(name, func(t *testing.T) {
			srv, addr, log := startLogged(t, relay.WithTLSConfig(relayTLS()), relay.WithTokens(tokenA))
			check := nothingLeft(t)
			_, err := signUp(t.Context(), addr, append(opts, relay.WithToken(tokenA))...)
			expectRegisterError(t, err, addr, relay.CodeTLS)
			leaf, perr := x509.ParseCertificate(theCerts().relay.Certificate[0])
			if perr != nil {
				t.Fatal(perr)
			}
			if !strings.Contains(err.Error(), relay.Pin(leaf)) {
				t.Errorf("%v does not say which key it has", err)
			}
			expectRefusalLogged(t, srv, log)
			check()
		})
	}
}

// What else the config says holds: here the app's own certificate, and a check of its own.
func TestPinAndConfig(t *testing.T) {
	cert, pin := selfSigned(t, nil)
	_, addr := startRelay(t, relay.WithTLSConfig(&tls.Config{
		Certificates: []tls.Certificate{cert},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    theCerts().pool,
	}))
	if _, err := signUp(t.Context(), addr, relay.WithPin(pin)); code(err) != relay.CodeTLS {
		t.Errorf("without the app's certificate: %v", err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{theCerts().client}}
	l := register(t, addr, relay.WithPin(pin), relay.WithTLSConfig(config))
	go serveEcho(l)
	echoes(t, dial(t, l))
	if config.InsecureSkipVerify || config.VerifyConnection != nil {
		t.Error("the caller's config was changed")
	}
	config.VerifyConnection = func(tls.ConnectionState) error { return errors.New("not this one") }
	if _, err := signUp(t.Context(), addr, relay.WithPin(pin), relay.WithTLSConfig(config)); code(err) != relay.CodeTLS {
		t.Errorf("with a check that fails: %v", err)
	}
}

// With a name to reach the relay at, it is told that name, for a proxy on the way to see;
// what is none is not told.
func TestPinServerName(t *testing.T) {
	cert, pin := selfSigned(t, nil)
	for addr, want := range map[string]string{
		"relay.example:1": "relay.example", "Relay.Example": "Relay.Example",
		"/run/relay.sock": "", "no address": "", "127.0.0.1:1": "",
	} {
		names := make(chan string, 100)
		srv := newServer(t, relay.WithTLSConfig(&tls.Config{
			GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
				names <- hello.ServerName
				return &cert, nil
			},
		}))
		ln := listenInMemory()
		serveOn(t, srv, ln)
		register(t, addr, relay.WithPin(pin), relay.WithDialer(ln.dial))
		if name := <-names; name != want {
			t.Errorf("of %q the relay was asked for %q", addr, name)
		}
	}
}

func TestPinMalformed(t *testing.T) {
	_, pin := selfSigned(t, nil)
	for _, pins := range [][]string{nil, {""}, {"sha256//"}, {pin[:len(pin)-4]}, {pin + "A"}, {"sha256//" + pin}, {pin, "md5//AAAA"},
		{strings.TrimPrefix(pin, "sha256//")}, {strings.TrimSuffix(pin, "=")}} {
		if _, err := relay.Register(t.Context(), "127.0.0.1:1", relay.WithPin(pins...)); err == nil || code(err) != "" {
			t.Errorf("WithPin(%q): %v", pins, err)
		}
	}
}
