// Command relayd is a relay as a program: services register at -listen, and each gets a
// public port, or, if it has a hostname, shares the ports of -hosts.
//
//	go run github.com/tcprelay/relay/examples/relayd -listen 127.0.0.1:8080 -ports 8081-8180
//
// Each flag can be given in the environment as well, -listen as RELAYD_LISTEN.
//
// At SIGHUP it reads the files of tokens and certificates anew. Nobody is dropped for it,
// but for services whose token is gone. At SIGINT or SIGTERM it takes no more services and
// clients, and ends when the clients that are there have left, after -drain, or at a
// second signal. With -handover another relayd can take its place without a gap.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/cli"
)

const intro = `
Relayd is a relay: services register at -listen and get a public port each.

  relayd -listen 127.0.0.1:8080 -ports 8081-8180

On the open internet, with a certificate that it makes itself, and tokens:

  relayd -listen :8080 -ports 8081-8180 -advertise relay.example.com \
    -tls-self relayd.pem -tokens tokens.txt
`

type config struct {
	listen, ports, public, advertise string
	hosts                            cli.List // addresses
	cert, key, clientCA, self        string
	tokens                           cli.List // files
	lease, heartbeat, drain          time.Duration
	handover, status                 string
	verbose, version                 bool
}

func flags(c *config) *cli.Flags {
	f := cli.New("relayd", intro)
	f.Group("Where it listens")
	f.StringVar(&c.listen, "listen", "127.0.0.1:8080", "`address` that services register at")
	f.StringVar(&c.ports, "ports", "", "public ports, `first-last` or one; otherwise any that is free")
	f.StringVar(&c.public, "public", "", "`host` that public ports are bound to; otherwise that of -listen")
	f.StringVar(&c.advertise, "advertise", "", "`host` that services are told in their public address; otherwise where the port is bound")
	f.Var(&c.hosts, "hosts", "`address`, such as :443, at which clients reach the services that have a hostname, by TLS (which ends in the service) or HTTP; may be given several times")
	f.Group("Who may register")
	f.StringVar(&c.self, "tls-self", "", "`file` with a certificate that nobody vouches for, and its key, which is made if it is not there; services know the relay by the pin that is printed")
	f.StringVar(&c.cert, "cert", "", "`file` with a certificate, for services to register over TLS")
	f.StringVar(&c.key, "key", "", "`file` with the key of -cert")
	f.StringVar(&c.clientCA, "client-ca", "", "`file` with the CA certificates of services: only those with a certificate from them may register")
	f.Var(&c.tokens, "tokens", "`file` with a token a line, and # comments: only services that show one may register; may be given several times, and each is an owner of its own")
	f.Group("Services that are away, and stopping")
	f.DurationVar(&c.lease, "lease", time.Minute, "`time` that the address of a lost service is kept for it; negative: not")
	f.DurationVar(&c.heartbeat, "heartbeat", 10*time.Second, "`time` between two looks whether a service is alive; one that is silent for three times as long is lost")
	f.DurationVar(&c.drain, "drain", 30*time.Second, "`time` that clients may go on for after a signal to stop")
	f.StringVar(&c.handover, "handover", "", "Unix `socket`: if a relayd listens there, take its place; then listen there for the next one")
	f.Group("What it does")
	f.StringVar(&c.status, "status", "", "`address` of a page that shows it, with /status.json, /metrics (Prometheus) and /healthz; without a host it is loopback's")
	f.BoolVar(&c.verbose, "verbose", false, "log each client")
	f.BoolVar(&c.version, "version", false, "print the version and stop")
	return f
}

func main() {
	var c config
	f := flags(&c)
	f.ParseOrExit()
	if c.drain < 0 {
		f.Exit(fmt.Errorf("-drain %v is negative", c.drain))
	}
	if c.version {
		fmt.Println("relayd", cli.Version())
		return
	}
	level := slog.LevelInfo
	if c.verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	if err := run(log, &c); err != nil {
		log.Error("relayd failed", "err", err)
		os.Exit(1)
	}
}

func run(log *slog.Logger, c *config) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	hup := make(chan os.Signal, 1) // from the first, for it would end the program
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)

	creds := &credentials{config: c}
	if err := creds.load(); err != nil {
		return err
	}
	opts, err := c.options()
	if err != nil {
		return err
	}
	chronicle := newChronicle(time.Now())
	opts = append(opts, creds.options()...)
	srv, err := relay.NewServer(append(opts, relay.WithLogger(log), relay.WithEvents(chronicle.note))...)
	if err != nil {
		return err
	}
	defer srv.Close()

	// What can fail does so before a predecessor hands over, for then there is no other.
	page := newStatus(log, srv, chronicle)
	if c.status != "" {
		if err := page.listen(c.status, c.handover != ""); err != nil {
			return fmt.Errorf("-status: %w", err)
		}
	}
	var door *door
	if c.handover != "" {
		if door, err = makeDoor(c.handover); err != nil {
			return fmt.Errorf("-handover: %w", err)
		}
		defer door.Close()
	}
	registration, hosts, err := c.listeners(ctx, log, srv)
	if err != nil {
		return err
	}
	failed := make(chan error, 2+len(registration))
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
	defer page.serve()()
	if door != nil {
		if err := door.open(); err != nil {
			log.Error("no successor can take over", "err", err)
		}
		go awaitSuccessor(log, door, srv, func() {
			page.close() // its address is the successor's
			stop()
		})
	}
	creds.log(log, "services may register")
	tell := func() { c.tellOwners(os.Stdout, creds, registration[0]) }
	tell()
	defer reloadAtSignal(log, hup, srv, creds, tell)()

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	stop() // a second signal ends the program
	log.Info("stopping", "drain", c.drain)
	page.drain()
	drain, cancel := context.WithTimeout(context.Background(), c.drain)
	defer cancel()
	if srv.Shutdown(drain) != nil {
		log.Warn("clients that were still connected were cut off", "after", c.drain)
	}
	log.Info("stopped")
	return nil
}

// listeners returns what services register on, and what clients of hosts come to: a
// predecessor's sockets, if there is one that hands them over, or new ones.
func (c *config) listeners(ctx context.Context, log *slog.Logger, srv *relay.Server) (registration, hosts []net.Listener, err error) {
	registration, hosts, err = c.inherited(ctx, srv)
	if err != nil {
		return nil, nil, err
	}
	inherited := len(registration) > 0
	if !inherited {
		if registration, err = listen(c.listen); err != nil {
			return nil, nil, fmt.Errorf("-listen: %w", err)
		}
	}
	if len(hosts) == 0 {
		hosts, err = listen(c.hosts...)
	}
	if err != nil {
		err = fmt.Errorf("-hosts: %w", err)
	}
	if err != nil && inherited { // what there is goes on
		log.Error("no hosts are served", "err", err)
		err = nil
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
