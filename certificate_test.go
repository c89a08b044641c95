package relay_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

// clientCert makes a client's certificate that is its own authority and holds for d
// from now.
func clientCert(t *testing.T, subject pkix.Name, d time.Duration) (tls.Certificate, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      subject,
		NotAfter:     time.Now().Add(d),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, leaf
}

// With mutual TLS an app is known by the subject of its certificate, and refused if
// that is not good.
func TestCertificateIdentity(t *testing.T) {
	config := relayTLS()
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
	apps := make(map[string]relay.RegisterOption)
	for name, tt := range map[string]struct {
		subject pkix.Name
		lasts   time.Duration
		foreign bool
	}{
		"one":           {pkix.Name{CommonName: "one", Organization: []string{"us"}}, time.Hour, false},
		"two":           {pkix.Name{CommonName: "two"}, time.Hour, false},
		"nameless, one": {pkix.Name{}, time.Hour, false},
		"nameless, two": {pkix.Name{}, time.Hour, false},
		"foreign":       {pkix.Name{CommonName: "one", Organization: []string{"us"}}, time.Hour, true},
		"expired":       {pkix.Name{CommonName: "one", Organization: []string{"us"}}, -time.Hour, false},
	} {
		cert, leaf := clientCert(t, tt.subject, tt.lasts)
		if !tt.foreign {
			config.ClientCAs.AddCert(leaf)
		}
		app := clientTLS()
		app.Certificates = []tls.Certificate{cert}
		// Also one that the relay does not ask for.
		app.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		apps[name] = relay.WithTLSConfig(app)
	}
	srv, addr, log := startLogged(t, relay.WithTLSConfig(config))
	check := nothingLeft(t)
	for n, name := range []string{"foreign", "expired", "none"} {
		with := apps[name]
		if with == nil {
			with = relay.WithTLSConfig(clientTLS())
		}
		_, err := signUp(t.Context(), addr, with)
		expectRegisterError(t, err, addr, relay.CodeTLS)
		eventually(t, "it counted", func() bool { return srv.Refusals()["tls"] == int64(n+1) })
		if len(srv.Services()) != 0 {
			t.Errorf("%s: services %+v", name, srv.Services())
		}
	}
	if e := log.wait(t, "registration failed", 1)[0]; e.attrs["kind"] != "tls" || e.attrs["remote"] == nil || e.attrs["err"] == nil {
		t.Errorf("logged %+v", e)
	}
	check()

	one := register(t, addr, apps["one"], relay.WithName("web"), relay.WithShared())
	if got := srv.Services(); len(got) != 1 || got[0].Identity != "CN=one,O=us" {
		t.Errorf("services %+v", got)
	}
	go serveEcho(one)
	go serveEcho(register(t, addr, apps["one"], relay.WithName("web"), relay.WithShared()))
	if _, err := signUp(t.Context(), addr, apps["two"], relay.WithName("web"), relay.WithShared()); code(err) != relay.CodeNameTaken {
		t.Errorf("another subject shares the name: %v", err)
	}
	// Without a subject it is the key that says who it is.
	register(t, addr, apps["nameless, one"], relay.WithName("api"), relay.WithShared())
	register(t, addr, apps["nameless, one"], relay.WithName("api"), relay.WithShared())
	if _, err := signUp(t.Context(), addr, apps["nameless, two"], relay.WithName("api"), relay.WithShared()); code(err) != relay.CodeNameTaken {
		t.Errorf("another key shares the name: %v", err)
	}
	if got := srv.Services()[0]; !strings.HasPrefix(got.Identity, "key ") || len(got.Identity) != 4+64 {
		t.Errorf("service %+v", got)
	}
	echoes(t, dial(t, one))
}

// With an authorizer mutual TLS is asked for too.
func TestCertificateAndAuthorizer(t *testing.T) {
	config := relayTLS()
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, theCerts().pool
	srv, addr := startRelay(t, relay.WithTLSConfig(config), relay.WithTokens(tokenA))
	known := clientTLS()
	known.Certificates = []tls.Certificate{theCerts().client}
	for _, tt := range []struct {
		tls   *tls.Config
		token string
		want  relay.Code
	}{
		{clientTLS(), tokenA, relay.CodeTLS},
		{known, tokenB, relay.CodeUnauthorized},
		{known, tokenA, ""},
	} {
		l, err := signUp(t.Context(), addr, relay.WithTLSConfig(tt.tls), relay.WithToken(tt.token))
		if code(err) != tt.want || err != nil && tt.want == "" {
			t.Errorf("Register: %v, want %q", err, tt.want)
		}
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
	}
	if got := srv.Services(); len(got) != 1 || got[0].Identity != "tokens 1" {
		t.Errorf("services %+v", got)
	}
}

// What is wrong with TLS is no better for waiting, which would only hide it. A relay that
// hangs up in the middle may be a better one soon.
func TestTLSInVain(t *testing.T) {
	ofSessions(t)
	mutual := relayTLS()
	mutual.ClientAuth, mutual.ClientCAs = tls.RequireAndVerifyClientCert, theCerts().pool
	plain, overTLS, asks := []relay.ServerOption(nil), []relay.ServerOption{relay.WithTLSConfig(relayTLS())}, []relay.ServerOption{relay.WithTLSConfig(mutual)}
	for name, tt := range map[string]struct {
		relay []relay.ServerOption
		app   *tls.Config
	}{
		"not trusted":     {overTLS, &tls.Config{}},
		"another host's":  {overTLS, &tls.Config{RootCAs: theCerts().pool, ServerName: "example.com"}},
		"no certificate":  {asks, clientTLS()},
		"the relay plain": {plain, clientTLS()},
		"the app plain":   {overTLS, nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, addr := startRelay(t, tt.relay...)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			_, err := signUp(ctx, addr, relay.WithTLSConfig(tt.app), relay.WithWait(), relay.WithBackoff(never, never))
			expectRegisterError(t, err, addr, relay.CodeTLS)
		})
	}
	t.Run("cut", func(t *testing.T) {
		_, addr := startRelay(t, overTLS...)
		tries := 0
		l := register(t, addr, relay.WithTLSConfig(clientTLS()), relay.WithWait(), relay.WithBackoff(time.Millisecond, time.Millisecond),
			relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
				if tries++; tries > 3 {
					return new(net.Dialer).DialContext(ctx, network, addr)
				}
				a, b := net.Pipe()
				go func() {
					b.Read(make([]byte, 64<<10)) // the hello
					b.Close()
				}()
				return a, nil
			}))
		if tries != 4 || l.Addr() == nil {
			t.Errorf("%d tries", tries)
		}
	})
}
