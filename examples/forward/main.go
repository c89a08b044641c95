// Command forward gives a program that knows nothing of relays a public address: it
// registers at a relay and carries each client to a local TCP address, with
// half-closes and resets kept both ways.
//
//	go run github.com/tcprelay/relay/examples/forward -relay 127.0.0.1:8080 -to 127.0.0.1:3000 -port 8081
//
// It prints the public address on a line of its own. At SIGINT or SIGTERM it takes
// no more clients, and ends when those that are there have left or at a second
// signal.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/join"
)

func main() {
	at := flag.String("relay", "127.0.0.1:8080", "`address` of the relay")
	to := flag.String("to", "127.0.0.1:3000", "local `address` that clients are carried to")
	port := flag.Int("port", 0, "public port to ask for (default: the relay chooses)")
	name := flag.String("name", "", "name of the service at the relay")
	flag.Usage = usage
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "forward: unexpected argument %q\n", flag.Arg(0))
		usage()
		os.Exit(2)
	}

	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := run(log, *at, *to, relay.WithPort(*port), relay.WithName(*name)); err != nil {
		log.Error("forward failed", "err", err)
		os.Exit(1)
	}
}

func usage() {
	fmt.Fprint(os.Stderr, `Forward registers at a relay and carries each client to a local TCP address.

	forward -relay 127.0.0.1:8080 -to 127.0.0.1:3000 -port 8081

`)
	flag.PrintDefaults()
}

func run(log *slog.Logger, at, to string, opts ...relay.RegisterOption) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ln, err := relay.Register(ctx, at, opts...)
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr())
	defer context.AfterFunc(ctx, func() {
		stop() // a second signal ends the program
		log.Info("stopping")
		ln.Close()
	})()

	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			<-ln.Done() // until the clients have what was sent to them
			return nil
		}
		if err != nil {
			return err
		}
		go carry(log, c.(*relay.Conn), to)
	}
}

// carry joins a client to a new local connection. If there is none the client is
// reset, which is what it would get from a port where nobody listens.
func carry(log *slog.Logger, client *relay.Conn, to string) {
	local, err := net.DialTimeout("tcp", to, 10*time.Second)
	if err != nil {
		log.Warn("no local connection", "client", client.RemoteAddr(), "err", err)
		client.SetLinger(0)
		client.Close()
		return
	}
	if err := join.Join(local.(*net.TCPConn), client); err != nil {
		log.Info("client was cut off", "client", client.RemoteAddr(), "err", err)
	}
}
