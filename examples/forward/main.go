// Command forward gives programs that know nothing of relays public addresses: it
// registers at a relay and carries each client to a local port, with half-closes and
// resets kept both ways (but a Unix socket has no resets: there they are plain ends).
//
//	go run github.com/tcprelay/relay/examples/forward -relay 127.0.0.1:8080 -to localhost:3000,port=8081
//
// Given several times, -to makes as many services in one process, each with a port, a name
// or a hostname of its own behind a comma. A target may be a Unix socket, too, and be told
// who the client is by the PROXY protocol.
//
// On a terminal it shows what goes on, on one screen. Otherwise, or with -plain, it prints
// each public address on a line of its own, with " -> " and the target behind it if there
// are several, and logs to standard error. The addresses stay when the relay is lost for
// a time.
//
// At SIGINT, SIGTERM or SIGHUP it takes no more clients, and ends when those that are there have
// left, after -drain, or at a second signal. If the relay will not have one of the services
// the others end the same way, and the exit status is 1.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/cli"
)

const intro = `
Forward registers at a relay and carries each client to a local port.

  forward -relay 127.0.0.1:8080 -to localhost:3000

Several at once, each with what it asks the relay for:

  forward -to localhost:3000,port=8081 -to localhost:22,port=2222,name=ssh
  forward -to 3000,hostname=app.example.com -to unix:/run/db.sock,port=5432
`

type config struct {
	to             targets
	port           int
	name, hostname string
	shared         bool
	proxy          proxyVersion

	relay     string
	tls       bool
	ca, token string // files
	pins      cli.List
	wait      bool
	dedicated int

	drain time.Duration
	plain bool
}

func (c *config) flags() *cli.Flags {
	f := cli.New("forward", intro)
	f.Group("What is carried")
	f.Var(&c.to, "to", "`target`: host:port, a port of this machine, or unix:path; behind it, with commas, port=, name=, hostname= and proxy-protocol= of its own. May be given several times, and in the environment with spaces between (default 127.0.0.1:3000)")
	f.IntVar(&c.port, "port", 0, "public `port` to ask for, unless the target says port= or hostname= (default: the relay chooses)")
	f.StringVar(&c.name, "name", "", "`name` of the service at the relay, unless the target says name=")
	f.StringVar(&c.hostname, "hostname", "", "`host` that clients reach the service by, through the relay's -hosts, instead of a port, unless the target says hostname= or port=")
	f.BoolVar(&c.shared, "shared", false, "share names or hostnames, and their addresses, with others, also of this process")
	f.Var(&c.proxy, "proxy-protocol", "`version` of the PROXY protocol, v1 or v2, by which targets are told the client's address before all else, unless the target says proxy-protocol=, which may also be off")
	f.Group("The relay")
	f.StringVar(&c.relay, "relay", "127.0.0.1:8080", "`address` of the relay")
	f.BoolVar(&c.wait, "wait", false, "wait until the relay can be reached and has room")
	f.BoolVar(&c.tls, "tls", false, "reach the relay over TLS")
	f.StringVar(&c.ca, "ca", "", "`file` with the certificates that the relay's is to be verified with (default: the system's); implies -tls")
	f.Var(&c.pins, "pin", "`pin`, sha256//..., of the key that the relay must have, whoever signed its certificate; implies -tls; several are alternatives")
	f.StringVar(&c.token, "token", "", "`file` with the token to show the relay (default: the token in the environment's RELAY_TOKEN)")
	f.IntVar(&c.dedicated, "dedicated", -1, "a connection to the relay for each client, with `n` of them ready (default: clients share one)")
	f.Group("Running")
	f.DurationVar(&c.drain, "drain", 30*time.Second, "how long clients may go on after a signal to stop")
	f.BoolVar(&c.plain, "plain", false, "lines on a terminal, too, instead of the screen")
	return f
}

func main() {
	var c config
	f := c.flags()
	f.ParseOrExit()
	services, err := c.services()
	if err != nil {
		f.Exit(err)
	}
	stderr := slog.NewTextHandler(os.Stderr, nil)
	log := slog.New(stderr)
	opts, err := c.options()
	if err != nil {
		fail(log, err)
	}

	ctx, stop := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signal.Notify(signals, syscall.SIGHUP)
	}
	var fw *forwarder
	restore := func() {}
	if !c.plain && canView(os.Stdout) {
		events := newNotes()
		handler := events.handler()
		if _, _, ok := terminalSize(os.Stderr); !ok { // which would be the screen
			handler = slog.NewMultiHandler(handler, stderr)
		}
		fw = newForwarder(&c, services, opts, slog.New(handler), nil)
		restore = newView(fw, events, os.Stdout).show()
	} else {
		fw = newForwarder(&c, services, opts, log, os.Stdout)
	}
	go obey(signals, stop, restore)
	failed, cut := fw.serve(ctx)
	restore()
	if cut {
		log.Warn("clients that were still connected were cut off", "after", c.drain)
	}
	if len(failed) > 0 {
		fail(log, failed...)
	}
}

func fail(log *slog.Logger, errs ...error) {
	for _, err := range errs {
		log.Error("forward failed", "err", err)
	}
	os.Exit(1)
}

// obey calls stop at the first signal. At the second it leaves the terminal as it was and
// has the program ended by that signal. It runs for as long as the program.
func obey(signals <-chan os.Signal, stop, restore func()) {
	<-signals
	stop()
	die(<-signals, restore)
}

// die ends the program by a signal that it caught.
func die(sig os.Signal, restore func()) {
	restore()
	signal.Reset(sig)
	self, err := os.FindProcess(os.Getpid())
	if err == nil {
		err = self.Signal(sig)
	}
	if err != nil { // a system without
		os.Exit(1)
	}
	select {}
}

// options are those that all services have: what the relay is to prove and is shown, and
// how clients come.
func (c *config) options() ([]relay.RegisterOption, error) {
	opts, err := c.credentials()
	if err != nil {
		return nil, err
	}
	if c.shared {
		opts = append(opts, relay.WithShared())
	}
	if c.dedicated >= 0 {
		opts = append(opts, relay.WithDedicated(c.dedicated))
	}
	if c.wait {
		opts = append(opts, relay.WithWait())
	}
	return opts, nil
}

func (c *config) credentials() ([]relay.RegisterOption, error) {
	token := os.Getenv("RELAY_TOKEN")
	if c.token != "" {
		b, err := os.ReadFile(c.token)
		if errors.Is(err, fs.ErrNotExist) {
			// What was given may be the token itself, which is nothing for a log.
			return nil, errors.New("-token: there is no such file; a token itself goes into the environment's RELAY_TOKEN")
		}
		if err != nil {
			return nil, fmt.Errorf("-token: %w", err)
		}
		token = strings.TrimSpace(string(b))
		if strings.ContainsAny(token, "\r\n") {
			return nil, fmt.Errorf("-token: more than one line in %s", c.token)
		}
	}
	opts := []relay.RegisterOption{relay.WithToken(token)}
	if len(c.pins) > 0 {
		opts = append(opts, relay.WithPin(c.pins...))
	}
	if !c.tls && c.ca == "" {
		return opts, nil
	}
	config := new(tls.Config)
	if c.ca != "" {
		pem, err := os.ReadFile(c.ca)
		if err != nil {
			return nil, fmt.Errorf("-ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("-ca: no certificate in %s", c.ca)
		}
	}
	return append(opts, relay.WithTLSConfig(config)), nil
}

// services are the targets with what they ask the relay for: their own, or else the
// flags'.
func (c *config) services() (targets, error) {
	switch {
	case c.drain < 0:
		return nil, fmt.Errorf("-drain %v is negative", c.drain)
	case c.port < 0 || c.port > 65535:
		return nil, fmt.Errorf("-port %d is not a port", c.port)
	case len(c.pins) > 0 && c.ca != "":
		return nil, errors.New("-pin and -ca exclude each other: with a pin no other certificate counts")
	}
	all := append(targets(nil), c.to...)
	if len(all) == 0 {
		all = targets{{text: "127.0.0.1:3000", network: "tcp", address: "127.0.0.1:3000"}}
	}
	for i := range all {
		t := &all[i]
		if t.port == 0 && t.hostname == "" {
			t.port, t.hostname = c.port, c.hostname
		}
		t.name = cmp.Or(t.name, c.name)
		t.proxy = cmp.Or(t.proxy, c.proxy)
		if t.port != 0 && t.hostname != "" {
			return nil, fmt.Errorf("%s: a port and a hostname exclude each other", t.text)
		}
		if c.shared && t.name == "" && t.hostname == "" {
			return nil, fmt.Errorf("%s: -shared needs a name or a hostname to share", t.text)
		}
		for _, other := range all[:i] {
			if err := t.clashes(&other, c.shared); err != nil {
				return nil, err
			}
		}
	}
	if c.shared {
		all.agree()
	}
	return all, nil
}
