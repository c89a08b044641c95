// Command forward gives a program that knows nothing of relays a public address: it
// registers at a relay and carries each client to a local TCP address, with
// half-closes and resets kept both ways.
//
//	go run github.com/tcprelay/relay/examples/forward -relay 127.0.0.1:8080 -to 127.0.0.1:3000 -port 8081
//
// It prints the public address on a line of its own, and keeps it when the relay is
// lost for a time. At SIGINT or SIGTERM it takes no more clients, and ends when those
// that are there have left, after -drain, or at a second signal.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/tcprelay/relay"
)

func main() {
	at := flag.String("relay", "127.0.0.1:8080", "`address` of the relay")
	to := flag.String("to", "127.0.0.1:3000", "local `address` that clients are carried to")
	port := flag.Int("port", 0, "public port to ask for (default: the relay chooses)")
	name := flag.String("name", "", "name of the service at the relay")
	hostname := flag.String("hostname", "", "`host` that clients reach the service by, through the relay's -hosts, instead of a port")
	shared := flag.Bool("shared", false, "share the name, and its address, with others")
	wait := flag.Bool("wait", false, "wait until the relay can be reached and has room")
	useTLS := flag.Bool("tls", false, "reach the relay over TLS")
	ca := flag.String("ca", "", "`file` with the certificates that the relay's is to be verified with (default: the system's); implies -tls")
	token := flag.String("token", "", "`file` with the token to show the relay (default: the environment's RELAY_TOKEN)")
	dedicated := flag.Int("dedicated", -1, "a connection to the relay for each client, with `n` of them ready (default: clients share one)")
	drain := flag.Duration("drain", 30*time.Second, "how long clients may go on after a signal to stop")
	flag.Usage = usage
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "forward: unexpected argument %q\n", flag.Arg(0))
		usage()
		os.Exit(2)
	}

	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	opts := []relay.RegisterOption{relay.WithLogger(log), relay.WithPort(*port), relay.WithName(*name), relay.WithHostname(*hostname)}
	if *shared {
		opts = append(opts, relay.WithShared())
	}
	if *dedicated >= 0 {
		opts = append(opts, relay.WithDedicated(*dedicated))
	}
	if *wait {
		opts = append(opts, relay.WithWait())
	}
	credentials, err := credentials(*useTLS, *ca, *token)
	if err == nil {
		err = run(log, *at, *to, *drain, append(opts, credentials...))
	}
	if err != nil {
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

// credentials are the options for what the relay is to prove and what it is shown.
func credentials(useTLS bool, ca, tokenFile string) ([]relay.RegisterOption, error) {
	token := os.Getenv("RELAY_TOKEN")
	if tokenFile != "" {
		b, err := os.ReadFile(tokenFile)
		if err != nil {
			return nil, fmt.Errorf("-token: %w", err)
		}
		token = strings.TrimSpace(string(b))
		if strings.ContainsAny(token, "\r\n") {
			return nil, fmt.Errorf("-token: more than one line in %s", tokenFile)
		}
	}
	opts := []relay.RegisterOption{relay.WithToken(token)}
	if !useTLS && ca == "" {
		return opts, nil
	}
	config := new(tls.Config)
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("-ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("-ca: no certificate in %s", ca)
		}
	}
	return append(opts, relay.WithTLSConfig(config)), nil
}

func run(log *slog.Logger, at, to string, drain time.Duration, opts []relay.RegisterOption) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ln, err := relay.Register(ctx, at, opts...)
	if err != nil {
		if ctx.Err() != nil {
			return nil // the signal was what it waited for, with -wait
		}
		return err
	}
	fmt.Println(ln.Addr())
	defer context.AfterFunc(ctx, func() {
		stop() // a second signal ends the program
		log.Info("stopping", "drain", drain)
		ln.Close()
	})()

	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil {
			return err
		}
		go carry(log, c.(*relay.Conn), to)
	}
	select {
	case <-ln.Done(): // the clients have what was sent to them
	case <-time.After(drain):
		log.Warn("clients that were still connected were cut off", "after", drain)
	}
	return nil
}

// carry joins a client to a new local connection. If there is none the client is
// reset, which is what it would get from a port where nobody listens.
func carry(log *slog.Logger, client *relay.Conn, to string) {
	local, err := dial(to)
	if err != nil {
		log.Warn("no local connection", "client", client.RemoteAddr(), "err", err)
		client.SetLinger(0)
		client.Close()
		return
	}
	client.Join(local, func(err error) {
		if err != nil {
			log.Info("client was cut off", "client", client.RemoteAddr(), "err", err)
		}
	})
}

// dial connects to a local program.
func dial(to string) (net.Conn, error) {
	d := net.Dialer{KeepAlive: -1}
	c, err := d.DialContext(until{context.Background(), time.Now().Add(10 * time.Second)}, "tcp", to)
	if err != nil {
		return nil, err
	}
	if tcp, ok := c.(*net.TCPConn); ok && !tcp.RemoteAddr().(*net.TCPAddr).IP.IsLoopback() {
		tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true}) // not all that local, and may vanish
	}
	return c, nil
}

// until is a context that ends at a time, which only what asks for that notices. Nothing
// has to watch it, as package net has a goroutine do with one that can be canceled: for
// short connections that is a twentieth of what they cost.
type until struct {
	context.Context
	at time.Time
}

func (u until) Deadline() (time.Time, bool) { return u.at, true }
