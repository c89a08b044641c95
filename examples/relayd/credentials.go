package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/cli"
)

// askTime is how long it may take to ask about all services whether they may stay. There
// is nobody to wait for.
const askTime = 10 * time.Second

// credentials are what relay and services show each other, as the files have it. They are
// read when the program starts, and again at SIGHUP: all of them, or none if one is bad.
type credentials struct {
	config *config
	now    atomic.Pointer[loaded]
}

type loaded struct {
	tls       *tls.Config // nil: plain TCP
	tokens    int         // that there are
	authorize func(context.Context, relay.Registration) (relay.Grant, error)
}

func (cr *credentials) load() error {
	l := new(loaded)
	var err error
	if l.tls, err = cr.config.tls(cr.now.Load() == nil); err != nil {
		return err
	}
	owners, err := cr.config.owners()
	if err != nil {
		return err
	}
	for _, tokens := range owners {
		l.tokens += len(tokens)
	}
	if l.authorize, err = relay.TokenAuthorizer(owners); err != nil {
		return err
	}
	cr.now.Store(l)
	return nil
}

// options have the relay look here each time.
func (cr *credentials) options() (opts []relay.ServerOption) {
	if l := cr.now.Load(); l.tls != nil {
		config := &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &cr.now.Load().tls.Certificates[0], nil
		}}
		if cr.config.clientCA != "" {
			config = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
				return cr.now.Load().tls, nil
			}}
		}
		opts = append(opts, relay.WithTLSConfig(config))
	}
	if len(cr.config.tokens) > 0 {
		opts = append(opts, relay.WithAuthorizer(func(ctx context.Context, r relay.Registration) (relay.Grant, error) {
			return cr.now.Load().authorize(ctx, r)
		}))
	}
	return opts
}

// reloadAtSignal reads the credentials anew at SIGHUP, until end is called, and calls tell
// if the relay's key is another one then. Services whose token is gone are told and cut
// off.
func reloadAtSignal(log *slog.Logger, hup <-chan os.Signal, srv *relay.Server, cr *credentials, tell func()) (end func()) {
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-hup:
				before := cr.pin()
				cr.reload(log, srv)
				if cr.pin() != before {
					tell()
				}
			case <-done:
				return
			}
		}
	}()
	return func() { close(done) }
}

// pin returns that of the relay's key, if it has one.
func (cr *credentials) pin() string {
	if l := cr.now.Load(); l.tls != nil {
		return relay.Pin(l.tls.Certificates[0].Leaf)
	}
	return ""
}

// log tells what is asked of services.
func (cr *credentials) log(log *slog.Logger, msg string) {
	l := cr.now.Load()
	log.Info(msg, "tls", l.tls != nil, "client_certificates", l.tls != nil && l.tls.ClientCAs != nil, "tokens", l.tokens)
}

func (cr *credentials) reload(log *slog.Logger, srv *relay.Server) {
	if err := cr.load(); err != nil {
		log.Error("not reloaded: what was there before still holds", "err", err)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), askTime)
	defer cancel()
	if err := srv.Reauthorize(ctx); err != nil {
		log.Error("reloaded, but not all services were asked about", "err", err)
		return
	}
	cr.log(log, "reloaded")
}

// owners returns the tokens of each owner, who goes by the name of the file, which stays when
// the tokens change.
func (c *config) owners() (map[string][]string, error) {
	owners := make(map[string][]string)
	for _, file := range c.tokens {
		tokens, err := readTokens(file)
		if err != nil {
			return nil, fmt.Errorf("-tokens: %w", err)
		}
		owners[file] = append(owners[file], tokens...)
	}
	return owners, nil
}

// readTokens reads a token from each line that is not empty and no # comment.
func readTokens(file string) (tokens []string, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		// A file of something else, such as the certificate beside it, is no list.
		if strings.HasPrefix(line, "-----") || !utf8.ValidString(line) || strings.ContainsFunc(line, unicode.IsControl) {
			return nil, fmt.Errorf("%s is no list of tokens", file)
		}
		tokens = append(tokens, line)
	}
	if lines.Err() != nil {
		return nil, fmt.Errorf("%s: %w", file, lines.Err())
	}
	if len(tokens) == 0 {
		return nil, fmt.Errorf("no token in %s", file)
	}
	return tokens, nil
}

// tls returns what the files say, nil if there are none. The first time the relay makes
// what it can.
func (c *config) tls(first bool) (*tls.Config, error) {
	var cert tls.Certificate
	var err error
	switch {
	case c.self != "" && (c.cert != "" || c.key != ""):
		return nil, errors.New("-tls-self makes a certificate, and -cert and -key have another one")
	case c.self != "":
		if cert, err = selfSigned(c.self, c.hostNames(), first, time.Now()); err != nil {
			return nil, fmt.Errorf("-tls-self: %w", err)
		}
	case c.cert == "" && c.key == "" && c.clientCA == "":
		return nil, nil
	case c.cert == "" || c.key == "":
		return nil, errors.New("TLS needs both -cert and -key, or -tls-self")
	default:
		if cert, err = tls.LoadX509KeyPair(c.cert, c.key); err != nil {
			return nil, fmt.Errorf("-cert and -key: %w", err)
		}
	}
	config := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}}
	if c.clientCA != "" {
		config.ClientAuth = tls.RequireAndVerifyClientCert
		if config.ClientCAs, err = cli.CAs("client-ca", c.clientCA); err != nil {
			return nil, err
		}
	}
	return config, nil
}

// hostNames returns the hosts under which services may know the relay.
func (c *config) hostNames() []string {
	names := []string{"localhost"}
	host, _, _ := net.SplitHostPort(c.listen)
	for _, name := range []string{host, c.advertise} {
		if name != "" {
			names = append(names, name)
		}
	}
	return names
}

// tellOwners prints what an app's owner needs to register at a relay whose certificate
// nobody vouches for.
func (c *config) tellOwners(w io.Writer, cr *credentials, ln net.Listener) {
	if c.self == "" {
		return
	}
	pin := cr.pin()
	flag, option := "", ""
	if len(c.tokens) > 0 {
		flag, option = " -token token.txt", ", relay.WithToken(token)"
	}
	host, port, _ := net.SplitHostPort(ln.Addr().String())
	if ip := net.ParseIP(host); c.advertise != "" || ip == nil || ip.IsUnspecified() {
		name, _ := os.Hostname()
		host = cmp.Or(c.advertise, name)
	}
	addr := net.JoinHostPort(host, port)
	if c.clientCA != "" {
		option += ", relay.WithTLSConfig(withCertificate)" // which forward has not
	} else {
		fmt.Fprintf(w, "forward -relay %s -pin %s%s -to localhost:3000\n", addr, pin, flag)
	}
	fmt.Fprintf(w, "relay.Register(ctx, %q, relay.WithPin(%q)%s)\n", addr, pin, option)
}
