// Command relayd is a relay as a program: services register on -listen, and each
// gets a public port.
//
//	go run github.com/tcprelay/relay/examples/relayd -listen 127.0.0.1:8080 -ports 8081-8180
//
// At SIGINT or SIGTERM it takes no more services and clients, and ends when the
// clients that are there have left, after -drain, or at a second signal.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tcprelay/relay"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:8080", "`address` that services register at")
	ports := flag.String("ports", "", "public ports, `first-last` (default: any free port)")
	public := flag.String("public", "", "`host` that public ports are bound to (default: that of -listen)")
	advertise := flag.String("advertise", "", "`host` that services are told in their public address (default: where the port is bound)")
	drain := flag.Duration("drain", 30*time.Second, "how long clients may go on after a signal to stop")
	flag.Usage = usage
	flag.Parse()
	if flag.NArg() > 0 || *drain < 0 {
		fmt.Fprintf(os.Stderr, "relayd: unexpected arguments or a negative -drain: %q\n", os.Args[1:])
		usage()
		os.Exit(2)
	}

	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := run(log, *listen, *ports, *public, *advertise, *drain); err != nil {
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

func run(log *slog.Logger, listen, ports, public, advertise string, drain time.Duration) error {
	opts := []relay.ServerOption{relay.WithLogger(log), relay.WithAdvertisedHost(advertise)}
	if ports != "" {
		first, last, err := parsePorts(ports)
		if err != nil {
			return err
		}
		opts = append(opts, relay.WithPorts(first, last))
	}
	if public != "" {
		opts = append(opts, relay.WithPublicHost(public))
	}
	srv, err := relay.NewServer(opts...)
	if err != nil {
		return err
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	drained := make(chan error, 1)
	go func() {
		<-ctx.Done()
		stop() // a second signal ends the program
		log.Info("stopping", "drain", drain)
		ctx, cancel := context.WithTimeout(context.Background(), drain)
		defer cancel()
		drained <- srv.Shutdown(ctx)
	}()
	if err := srv.ListenAndServe(listen); !errors.Is(err, relay.ErrServerClosed) {
		return err
	}
	if err := <-drained; err != nil {
		log.Warn("clients that were still connected were cut off", "after", drain)
	}
	log.Info("stopped")
	return nil
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
