package relay_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

// certs are an authority and what it certified.
type certs struct {
	pool          *x509.CertPool
	relay, client tls.Certificate
}

var theCerts = sync.OnceValue(func() certs {
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	ca := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "authority"},
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	must(err)
	ca, err = x509.ParseCertificate(der)
	must(err)
	certify := func(serial int64, use x509.ExtKeyUsage) tls.Certificate {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(serial),
			NotAfter:     time.Now().Add(time.Hour),
			KeyUsage:     x509.KeyUsageDigitalSignature,
			ExtKeyUsage:  []x509.ExtKeyUsage{use},
			DNSNames:     []string{"relay.example"},
			IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		}, ca, key.Public(), caKey)
		must(err)
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	c := certs{
		pool:   x509.NewCertPool(),
		relay:  certify(2, x509.ExtKeyUsageServerAuth),
		client: certify(3, x509.ExtKeyUsageClientAuth),
	}
	c.pool.AddCert(ca)
	return c
})

func relayTLS() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{theCerts().relay}}
}

func clientTLS() *tls.Config { return &tls.Config{RootCAs: theCerts().pool} }

func TestTLS(t *testing.T) {
	_, addr := startRelay(t, relay.WithTLSConfig(relayTLS()))
	config := clientTLS()
	l := register(t, addr, relay.WithTLSConfig(config))
	if config.ServerName != "" || config.MinVersion != 0 {
		t.Error("the caller's config was changed")
	}
	client := dial(t, l)
	app := accept(t, l)
	expectAddrs(t, client, app)
	sendAndExpect(t, client, app)

	// A name can be asked for that is not the host's.
	config.ServerName = "relay.example"
	l = register(t, addr, relay.WithTLSConfig(config))
	go serveEcho(l)
	echoes(t, dial(t, l))
}

// Other transports carry TLS too.
func TestTLSInMemory(t *testing.T) {
	srv, err := relay.NewServer(relay.WithTLSConfig(relayTLS()))
	if err != nil {
		t.Fatal(err)
	}
	ln := listenInMemory()
	serveOn(t, srv, ln)
	l := register(t, "relay.example:1", relay.WithTLSConfig(clientTLS()), relay.WithDialer(ln.dial))
	go serveEcho(l)
	echoes(t, dial(t, l))
}

func TestTLSRefused(t *testing.T) {
	wrongName := clientTLS()
	wrongName.ServerName = "other.example"
	old := clientTLS()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	oldest := clientTLS()
	oldest.MaxVersion = tls.VersionTLS12 // below the default of MinVersion
	for _, tt := range []struct {
		name   string
		config *tls.Config // the app's
		is     func(error) bool
	}{
		{"unknown authority", &tls.Config{}, func(err error) bool {
			_, ok := errors.AsType[x509.UnknownAuthorityError](err)
			return ok
		}},
		{"another name", wrongName, func(err error) bool {
			_, ok := errors.AsType[x509.HostnameError](err)
			return ok
		}},
		{"TLS 1.2", old, func(err error) bool { return true }},
		{"TLS 1.2 at most", oldest, func(err error) bool { return true }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv, addr, log := startLogged(t, relay.WithTLSConfig(relayTLS()))
			check := nothingLeft(t)
			_, err := signUp(t.Context(), addr, relay.WithTLSConfig(tt.config))
			if code(err) != relay.CodeTLS || !tt.is(err) {
				t.Errorf("Register: %v", err)
			}
			expectRefusalLogged(t, srv, log)
			check()
		})
	}
}

// expectRefusalLogged checks that the relay has logged one failed registration, and
// nothing else, and has no service.
func expectRefusalLogged(t *testing.T, srv *relay.Server, log *logbook) {
	t.Helper()
	e := log.wait(t, "registration failed", 1)[0]
	if e.level != slog.LevelWarn || e.attrs["remote"] == nil || e.attrs["err"] == nil {
		t.Errorf("logged %+v", e)
	}
	if all := log.with(""); len(all) != 2 { // the other is "listening"
		t.Errorf("logged %+v", all)
	}
	if kind, _ := e.attrs["kind"].(string); !maps.Equal(srv.Refusals(), map[string]int64{kind: 1}) {
		t.Errorf("refusals %v, logged %+v", srv.Refusals(), e)
	}
	if n := len(srv.Services()); n != 0 {
		t.Errorf("%d services", n)
	}
}

// A relay takes TLS 1.2 from those who say so on both sides.
func TestTLS12(t *testing.T) {
	old := relayTLS()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	_, addr := startRelay(t, relay.WithTLSConfig(old))
	if _, err := signUp(t.Context(), addr, relay.WithTLSConfig(clientTLS())); code(err) != relay.CodeTLS {
		t.Errorf("an app that did not say so: %v", err)
	}
	config := clientTLS()
	config.MinVersion = tls.VersionTLS12
	l := register(t, addr, relay.WithTLSConfig(config))
	go serveEcho(l)
	echoes(t, dial(t, l))
}

func TestMutualTLS(t *testing.T) {
	config := relayTLS()
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, theCerts().pool
	known := clientTLS()
	known.Certificates = []tls.Certificate{theCerts().client}
	wrong := clientTLS()
	wrong.Certificates = []tls.Certificate{theCerts().relay} // not one of a client

	// In TLS 1.3 the client's side of the handshake is over before the relay has
	// looked at its certificate.
	for name, bad := range map[string]*tls.Config{"no certificate": clientTLS(), "a wrong one": wrong} {
		t.Run(name, func(t *testing.T) {
			srv, addr, log := startLogged(t, relay.WithTLSConfig(config))
			check := nothingLeft(t)
			const n = 20
			for range n {
				_, err := signUp(t.Context(), addr, relay.WithTLSConfig(bad))
				expectRegisterError(t, err, addr, relay.CodeTLS)
			}
			eventually(t, "all refused", func() bool { return maps.Equal(srv.Refusals(), map[string]int64{"tls": n}) })
			// The log has one a second.
			e := log.wait(t, "registration failed", 1)
			if all := log.with(""); len(all) != len(e)+1 || e[0].attrs["kind"] != "tls" || e[0].attrs["err"] == nil || len(srv.Services()) != 0 {
				t.Errorf("logged %+v", all)
			}
			check()
			l := register(t, addr, relay.WithTLSConfig(known))
			go serveEcho(l)
			echoes(t, dial(t, l))
		})
	}
}

// TLS on one side only is an error on both, which says so, and neither falls back.
func TestTLSOneSide(t *testing.T) {
	saysTLS := func(s string) bool { return strings.Contains(strings.ToLower(s), "tls") }
	for _, tt := range []struct {
		name   string
		server []relay.ServerOption
		app    []relay.RegisterOption
	}{
		{"relay", []relay.ServerOption{relay.WithTLSConfig(relayTLS())}, nil},
		{"app", nil, []relay.RegisterOption{relay.WithTLSConfig(clientTLS())}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv, addr, log := startLogged(t, append(tt.server, relay.WithTokens(tokenA))...)
			check := nothingLeft(t)
			var rec *recorder
			_, err := signUp(t.Context(), addr, append(tt.app, relay.WithToken(tokenA), recorded(&rec))...)
			expectRegisterError(t, err, addr, relay.CodeTLS)
			if !saysTLS(err.(*relay.RegisterError).Err.Error()) {
				t.Errorf("the app is told %v", err)
			}
			if len(tt.app) == 0 && !strings.Contains(err.Error(), "WithPin") {
				t.Errorf("the app is not told what to do: %v", err)
			}
			expectRefusalLogged(t, srv, log)
			e := log.wait(t, "registration failed", 1)[0]
			if e.attrs["kind"] != "tls" || !saysTLS(fmt.Sprint(e.attrs["err"])) {
				t.Errorf("logged %+v", e)
			}
			if !maps.Equal(srv.Refusals(), map[string]int64{"tls": 1}) {
				t.Errorf("refusals %v", srv.Refusals())
			}
			if len(tt.app) > 0 && rec.has(tokenA) {
				t.Error("the token was sent in clear")
			}
			check()
		})
	}
}
