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
// With -shared targets of one name have one public address, and the clients between them.
// The client for whom a target cannot be reached is reset, as by a port where nobody
// listens, and then the target has no more until it can be reached again: the others have
// them, or if there is none, nobody is at the address.
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
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"slices"
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

	drain                   time.Duration
	plain, verbose, version bool
}

func (c *config) flags() *cli.Flags {
	f := cli.New("forward", intro)
	f.Group("What is carried")
	f.Var(&c.to, "to", "`target`: host:port, a port of this machine, or unix:path, without commas in it; behind it, with commas, port=, name=, hostname= and proxy-protocol= of its own. Required; may be given several times, and in the environment with spaces between")
	f.IntVar(&c.port, "port", 0, "public `port` to ask for, unless the target says port= or hostname= (default: the relay chooses)")
	f.StringVar(&c.name, "name", "", "`name` of the service at the relay, unless the target says name=")
	f.StringVar(&c.hostname, "hostname", "", "`host` that clients reach the service by, through the relay's -hosts, instead of a port, unless the target says hostname= or port=")
	f.BoolVar(&c.shared, "shared", false, "share names or hostnames, and their addresses, with others, also of this process; while a target cannot be reached the others have its clients")
	f.Var(&c.proxy, "proxy-protocol", "`version` of the PROXY protocol, v1 or v2, by which targets are told the client's address before all else, unless the target says proxy-protocol=, which may also be off")
	f.Group("The relay")
	f.StringVar(&c.relay, "relay", "127.0.0.1:8080", "`address` of the relay")
	f.BoolVar(&c.wait, "wait", false, "wait until the relay can be reached and has room")
	f.BoolVar(&c.tls, "tls", false, "reach the relay over TLS")
	f.StringVar(&c.ca, "ca", "", "`file` with the certificates that the relay's is to be verified with (default: the system's); implies -tls")
	f.Var(&c.pins, "pin", "`pin`, sha256//..., of the key that the relay must have, whoever signed its certificate; implies -tls; several are alternatives")
	f.StringVar(&c.token, "token", "", "`file` with the token to show the relay, and # comments (default: the token in the environment's RELAY_TOKEN)")
	f.IntVar(&c.dedicated, "dedicated", -1, "a connection to the relay for each client, with `n` of them ready (default: clients share one)")
	f.Group("Running")
	f.DurationVar(&c.drain, "drain", 30*time.Second, "how long clients may go on after a signal to stop")
	f.BoolVar(&c.plain, "plain", false, "lines on a terminal, too, instead of the screen")
	f.BoolVar(&c.verbose, "verbose", false, "a line for each client that comes, leaves or is cut off, too")
	f.BoolVar(&c.version, "version", false, "print the version and stop")
	return f
}

func main() {
	var c config
	f := c.flags()
	f.ParseOrExit()
	if c.version {
		fmt.Println("forward", cli.Version())
		return
	}
	services, err := c.services()
	if err != nil {
		f.Exit(err)
	}
	level := slog.LevelInfo
	if c.verbose {
		level = slog.LevelDebug
	}
	stderr := slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})
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
	token := strings.TrimSpace(os.Getenv("RELAY_TOKEN"))
	if c.token != "" {
		var err error
		if token, err = readToken(c.token); err != nil {
			return nil, fmt.Errorf("-token: %w", err)
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
		pool, err := cli.CAs("ca", c.ca)
		if err != nil {
			return nil, err
		}
		config.RootCAs = pool
	}
	return append(opts, relay.WithTLSConfig(config)), nil
}

// readToken reads a file with one token, and # comments. What is given as its name may be
// the token itself, which is nothing for a log: only a file that is there is called by it.
func readToken(file string) (token string, err error) {
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return "", err
	case err != nil:
		return "", errors.New("there is no such file, or none that can be read; a token itself goes into the environment's RELAY_TOKEN")
	}
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case token != "":
			return "", fmt.Errorf("more than one token in %s", file)
		default:
			token = line
		}
	}
	if token == "" {
		return "", fmt.Errorf("no token in %s", file)
	}
	return token, nil
}

// services are the targets with what they ask the relay for: their own, or else the
// flags'.
func (c *config) services() (targets, error) {
	switch {
	case c.drain < 0:
		return nil, fmt.Errorf("-drain %v is negative", c.drain)
	case c.port < 0 || c.port > 65535:
		return nil, fmt.Errorf("-port %d is not a port", c.port)
	case c.dedicated < -1:
		return nil, fmt.Errorf("-dedicated %d is negative", c.dedicated)
	case len(c.pins) > 0 && c.ca != "":
		return nil, errors.New("-pin and -ca exclude each other: with a pin no other certificate counts")
	case len(c.to) == 0:
		return nil, errors.New("-to is missing: where clients are to be carried, such as localhost:3000")
	}
	if _, port, err := net.SplitHostPort(c.relay); err != nil || port == "" {
		return nil, fmt.Errorf("-relay %q is not host:port", c.relay)
	}
	if len(c.pins) > 0 {
		if err := check(relay.WithPin(c.pins...)); err != nil {
			return nil, fmt.Errorf("-pin: %w", err)
		}
	}
	all := slices.Clone(c.to)
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
		if err := check(t.options()...); err != nil {
			return nil, fmt.Errorf("%s: %w", t.text, err)
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

// check reports what is wrong with options, by a registration that gets no further.
func check(opts ...relay.RegisterOption) error {
	nowhere := relay.WithDialer(func(context.Context, string, string) (net.Conn, error) { return nil, errors.ErrUnsupported })
	_, err := relay.Register(context.Background(), "", append(opts, nowhere)...)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}
