// Command relayd is a relay as a program: services register on -listen, and each
// gets a public port.
//
//	go run github.com/tcprelay/relay/examples/relayd -listen 127.0.0.1:8080 -ports 8081-8180
//
// Services that have a hostname share the ports of -hosts instead.
//
// At SIGINT or SIGTERM it takes no more services and clients, and ends when the
// clients that are there have left, after -drain, or at a second signal. With
// -handover another relayd can take its place without a gap.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tcprelay/relay"
)

// handoverTime is how long a relayd may take to hand over to another.
const handoverTime = 10 * time.Second

type config struct {
	listen, ports, public, advertise string
	cert, key, clientCA              string
	tokens                           []string // files
	hosts                            []string // addresses
	lease, heartbeat, drain          time.Duration
	handover                         string
}

func main() {
	var c config
	flag.StringVar(&c.listen, "listen", "127.0.0.1:8080", "`address` that services register at")
	flag.StringVar(&c.ports, "ports", "", "public ports, `first-last` (default: any free port)")
	flag.StringVar(&c.public, "public", "", "`host` that public ports are bound to (default: that of -listen)")
	flag.StringVar(&c.advertise, "advertise", "", "`host` that services are told in their public address (default: where the port is bound)")
	flag.Func("hosts", "`address`, such as :443, at which clients reach the services that have a hostname, by TLS (which ends in the service) or HTTP; may be given several times", func(s string) error {
		c.hosts = append(c.hosts, s)
		return nil
	})
	flag.StringVar(&c.cert, "cert", "", "`file` with a certificate, for services to register over TLS")
	flag.StringVar(&c.key, "key", "", "`file` with its key")
	flag.StringVar(&c.clientCA, "client-ca", "", "`file` with the CA certificates of services: only those with a certificate from them may register")
	flag.Func("tokens", "`file` with a token a line, and # comments: only services that show one may register; each -tokens is an owner of its own", func(s string) error {
		c.tokens = append(c.tokens, s)
		return nil
	})
	flag.DurationVar(&c.lease, "lease", time.Minute, "how long the address of a lost service is kept for it; negative: not")
	flag.DurationVar(&c.heartbeat, "heartbeat", 10*time.Second, "how often to look whether a service is alive; one that is silent for three times as long is lost")
	flag.DurationVar(&c.drain, "drain", 30*time.Second, "how long clients may go on after a signal to stop")
	flag.StringVar(&c.handover, "handover", "", "Unix `socket`: if a relayd listens there, take its place; then listen there for the next one")
	flag.Usage = usage
	flag.Parse()
	if flag.NArg() > 0 || c.drain < 0 {
		fmt.Fprintf(os.Stderr, "relayd: unexpected arguments or a negative -drain: %q\n", os.Args[1:])
		usage()
		os.Exit(2)
	}

	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := run(log, &c); err != nil {
		log.Error("relayd failed", "err", err)
		os.Exit(1)
	}
}

func usage() {
	fmt.Fprint(os.Stderr, `Relayd is a relay: services register at -listen and get a public port each.

	relayd -listen 127.0.0.1:8080 -ports 8081-8180

`)
	flag.PrintDefaults()
}

func run(log *slog.Logger, c *config) error {
	opts, err := c.options()
	if err != nil {
		return err
	}
	srv, err := relay.NewServer(append(opts, relay.WithLogger(log))...)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	registration, hosts, err := c.listeners(ctx, srv)
	if err != nil {
		return err
	}
	defer srv.Close()
	failed := make(chan error, 1+len(registration))
	if len(hosts) > 0 {
		go func() {
			// It ends with a handover, too.
			if err := srv.ServeHosts(hosts...); !errors.Is(err, relay.ErrServerClosed) {
				failed <- err
			}
		}()
	}
	for _, ln := range registration {
		go func() { failed <- srv.Serve(ln) }()
	}
	if c.handover != "" {
		door, err := openDoor(c.handover)
		if err != nil {
			return err
		}
		defer door.Close()
		go awaitSuccessor(log, door, srv, stop)
	}

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	stop() // a second signal ends the program
	log.Info("stopping", "drain", c.drain)
	drain, cancel := context.WithTimeout(context.Background(), c.drain)
	defer cancel()
	if srv.Shutdown(drain) != nil {
		log.Warn("clients that were still connected were cut off", "after", c.drain)
	}
	log.Info("stopped")
	return nil
}

// awaitSuccessor hands over to whoever comes through the door, and then calls stop. It
// ends when the door is closed.
func awaitSuccessor(log *slog.Logger, door *net.UnixListener, srv *relay.Server, stop func()) {
	for {
		conn, err := door.AcceptUnix()
		if err != nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), handoverTime)
		err = srv.HandOver(ctx, conn)
		cancel()
		if err == nil {
			door.Close() // who comes now is the successor's
			stop()
			return
		}
		log.Warn("not handed over", "err", err)
	}
}

// options are those of the flags.
func (c *config) options() ([]relay.ServerOption, error) {
	opts := []relay.ServerOption{
		relay.WithAdvertisedHost(c.advertise),
		relay.WithLease(c.lease),
		relay.WithHeartbeat(c.heartbeat, 0),
	}
	if c.ports != "" {
		first, last, err := parsePorts(c.ports)
		if err != nil {
			return nil, err
		}
		opts = append(opts, relay.WithPorts(first, last))
	}
	if c.public != "" {
		opts = append(opts, relay.WithPublicHost(c.public))
	}
	for _, file := range c.tokens {
		tokens, err := readTokens(file)
		if err == nil && len(tokens) == 0 {
			err = fmt.Errorf("-tokens: no token in %s", file)
		}
		if err != nil {
			return nil, err
		}
		opts = append(opts, relay.WithTokens(tokens...))
	}
	config, err := c.tls()
	if err != nil {
		return nil, err
	}
	return append(opts, relay.WithTLSConfig(config)), nil
}

func (c *config) tls() (*tls.Config, error) {
	if c.cert == "" && c.key == "" && c.clientCA == "" {
		return nil, nil
	}
	if c.cert == "" || c.key == "" {
		return nil, errors.New("TLS needs both -cert and -key")
	}
	cert, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return nil, fmt.Errorf("-cert and -key: %w", err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{cert}}
	if c.clientCA != "" {
		pem, err := os.ReadFile(c.clientCA)
		if err != nil {
			return nil, fmt.Errorf("-client-ca: %w", err)
		}
		config.ClientAuth = tls.RequireAndVerifyClientCert
		config.ClientCAs = x509.NewCertPool()
		if !config.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("-client-ca: no certificate in %s", c.clientCA)
		}
	}
	return config, nil
}

// readTokens reads a token from each line that is not empty and no # comment.
func readTokens(file string) (tokens []string, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("-tokens: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line != "" && !strings.HasPrefix(line, "#") {
			tokens = append(tokens, line)
		}
	}
	if lines.Err() != nil {
		return nil, fmt.Errorf("-tokens: %w", lines.Err())
	}
	return tokens, nil
}

func parsePorts(s string) (first, last int, err error) {
	a, b, found := strings.Cut(s, "-")
	if !found {
		b = a
	}
	if first, err = strconv.Atoi(a); err == nil {
		last, err = strconv.Atoi(b)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("-ports %q: want first-last", s)
	}
	return first, last, nil
}

// listeners returns what services register on, and what clients of hosts come to: a
// predecessor's sockets, if there is one that hands them over, or new ones.
func (c *config) listeners(ctx context.Context, srv *relay.Server) (registration, hosts []net.Listener, err error) {
	registration, hosts, err = c.inherited(ctx, srv)
	if err == nil && len(registration) == 0 {
		registration, err = listen(c.listen)
	}
	if err == nil && len(hosts) == 0 {
		hosts, err = listen(c.hosts...)
	}
	return registration, hosts, err
}

func listen(addrs ...string) (all []net.Listener, err error) {
	for _, addr := range addrs {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, err // the program ends for it
		}
		all = append(all, ln)
	}
	return all, nil
}

// inherited returns what a predecessor hands over, and nothing if there is none.
func (c *config) inherited(ctx context.Context, srv *relay.Server) (registration, hosts []net.Listener, err error) {
	if c.handover != "" {
		if info, err := os.Stat(c.handover); err == nil && info.Mode().Type() != fs.ModeSocket {
			return nil, nil, fmt.Errorf("-handover: %s is there, and is no socket", c.handover)
		}
		conn, err := net.Dial("unix", c.handover)
		if err == nil {
			ctx, cancel := context.WithTimeout(ctx, handoverTime)
			defer cancel()
			return srv.TakeOver(ctx, conn.(*net.UnixConn))
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, fmt.Errorf("-handover: %w", err)
		}
	}
	return nil, nil, nil
}

// openDoor listens for a successor, in the place of a predecessor if there was one.
// Only this user may come.
func openDoor(path string) (*net.UnixListener, error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), ".relayd-") // nobody else can enter it
	if err != nil {
		return nil, fmt.Errorf("-handover: %w", err)
	}
	defer os.RemoveAll(dir)
	door, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/door", Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("-handover: %w", err)
	}
	door.SetUnlinkOnClose(false) // it may be a successor's by then
	if err = os.Chmod(dir+"/door", 0o600); err == nil {
		err = os.Rename(dir+"/door", path)
	}
	if err != nil {
		door.Close()
		return nil, fmt.Errorf("-handover: %w", err)
	}
	return door, nil
}
