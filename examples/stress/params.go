package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"time"

	"github.com/tcprelay/relay/internal/cli"
)

// A mode is what clients do.
type mode string

const (
	roundTrips  mode = "round-trips"
	bulk        mode = "bulk"
	connections mode = "connections"
)

// messages is what the messages of the mode are called.
func (m mode) messages() string {
	switch m {
	case roundTrips:
		return "round trips"
	case connections:
		return "exchanges"
	}
	return "messages"
}

// throughput formats what the mode is mostly about.
func (m mode) throughput(messages, bytes float64) string {
	if m == bulk {
		return amount(bytes) + "/s"
	}
	return digits(messages) + " " + m.messages() + "/s"
}

// Params are what the command line says.
type params struct {
	to       string
	clients  int
	mode     mode
	size     int
	rate     float64
	inflight int
	time     time.Duration
	ramp     time.Duration
	timeout  time.Duration
	seed     uint64
	tls      bool
	ca       string // file or empty
	insecure bool
	json     string // file, "-" or empty
	svg      string // file or empty
	version  bool

	dial  func(context.Context) (conn, error) // to the service
	pause time.Duration                       // of a client after a failure, before it connects again
}

// Bounds of flags, beyond which something else was meant. Those of rate keep the time
// between two messages within what a time.Duration can express.
const (
	maxClients  = 1_000_000
	maxSize     = 1 << 30
	maxInflight = 1 << 16
	minRate     = 1e-3
	maxRate     = 1e6
)

const intro = `
Stress opens many clients against a TCP echo service and verifies every byte that
comes back.

  stress -to 127.0.0.1:8081

At a rate that the service can sustain, for latencies that can be compared:

  stress -to 127.0.0.1:8081 -clients 50 -rate 100 -time 30s -svg report.svg
`

func (p *params) flags() *cli.Flags {
	f := cli.New("stress", intro)
	f.Group("The service")
	f.StringVar(&p.to, "to", "", "`address` of an echo service, host:port; required")
	f.BoolVar(&p.tls, "tls", false, "speak TLS with the service")
	f.StringVar(&p.ca, "ca", "", "`file` with the certificates that the service's is to be verified with (default: the system's); implies -tls")
	f.BoolVar(&p.insecure, "insecure", false, "do not verify the service's certificate; implies -tls")
	f.Group("The load")
	f.StringVar((*string)(&p.mode), "mode", string(roundTrips), "what clients do: round-trips, bulk or connections")
	f.IntVar(&p.clients, "clients", 100, "`number` of clients")
	f.IntVar(&p.size, "size", 0, "`bytes` of a message (default 1024, in bulk 65536)")
	f.Float64Var(&p.rate, "rate", 0, "`n` messages a second of each client, so that all send -clients times as many; latencies are then measured from when a message was due (default: as fast as possible)")
	f.IntVar(&p.inflight, "inflight", 16, "`number` of messages that a client of -mode bulk has under way at most")
	f.Uint64Var(&p.seed, "seed", 0, "`number` that the bytes that are sent derive from (default: random)")
	f.Group("How long")
	f.DurationVar(&p.time, "time", 10*time.Second, "how long to run")
	f.DurationVar(&p.ramp, "ramp", 0, "over how much of -time clients are started (default: all at once)")
	f.DurationVar(&p.timeout, "timeout", 10*time.Second, "how long connecting may take, or a message to go out or to come back")
	f.Group("What it says")
	f.StringVar(&p.json, "json", "", "`file` for the report as JSON; - for stdout, with the text on stderr")
	f.StringVar(&p.svg, "svg", "", "`file` for the report as an SVG image")
	f.BoolVar(&p.version, "version", false, "print the version and stop")
	return f
}

// parse returns the params, or an error for the flags to tell.
func parse(args []string, lookup func(string) (string, bool)) (*params, *cli.Flags, error) {
	p := &params{pause: 250 * time.Millisecond}
	f := p.flags()
	if err := f.Parse(args, lookup); err != nil || p.version {
		return p, f, err
	}
	p.tls = p.tls || p.ca != "" || p.insecure
	if !f.Given("size") {
		p.size = 1024
		if p.mode == bulk {
			p.size = 64 << 10
		}
	}
	if !f.Given("seed") {
		p.seed = rand.Uint64N(1 << 53) // which is exact wherever JSON is read
	}
	err := p.validate()
	if err == nil && f.Given("inflight") && p.mode != bulk {
		err = fmt.Errorf("-inflight is of -mode bulk, not %s", p.mode)
	}
	var config *tls.Config
	if err == nil && p.tls {
		config, err = p.tlsConfig()
	}
	p.dial = dialer(p.to, p.timeout, config)
	return p, f, err
}

// validate says what is wrong with the flags' values.
func (p *params) validate() error {
	if p.to == "" {
		return errors.New("-to is missing: the address of an echo service")
	}
	host, port, err := net.SplitHostPort(p.to)
	switch {
	case err != nil || port == "":
		return fmt.Errorf("-to %q is not host:port", p.to)
	case p.tls && !p.insecure && host == "":
		return fmt.Errorf("-to %q has no host, which the certificate is to be for", p.to)
	case p.ca != "" && p.insecure:
		return errors.New("-ca and -insecure exclude each other")
	}
	switch p.mode {
	case roundTrips, bulk, connections:
	default:
		return fmt.Errorf("-mode %q is not round-trips, bulk or connections", string(p.mode))
	}
	switch {
	case p.clients < 1 || p.clients > maxClients:
		return fmt.Errorf("-clients %d is not 1 to %d", p.clients, maxClients)
	case p.size < 1 || p.size > maxSize:
		return fmt.Errorf("-size %d is not 1 to %d", p.size, maxSize)
	case p.inflight < 1 || p.inflight > maxInflight:
		return fmt.Errorf("-inflight %d is not 1 to %d", p.inflight, maxInflight)
	case p.rate != 0 && !(p.rate >= minRate && p.rate <= maxRate): // NaN is neither
		return fmt.Errorf("-rate %v is not 0, or %v to %.0f", p.rate, minRate, maxRate)
	case p.time <= 0:
		return fmt.Errorf("-time %v is not positive", p.time)
	case p.timeout <= 0:
		return fmt.Errorf("-timeout %v is not positive", p.timeout)
	case p.ramp < 0 || p.ramp >= p.time:
		return fmt.Errorf("-ramp %v is negative, or not less than -time %v", p.ramp, p.time)
	case p.svg == "-":
		return errors.New("-svg takes a file, not -")
	case p.svg != "" && filepath.Clean(p.svg) == filepath.Clean(p.json):
		return errors.New("-json and -svg are the same file")
	}
	return nil
}

// parameters are the params as the report has them.
func (p *params) parameters() parameters {
	r := parameters{
		To: printable(p.to), Mode: p.mode, Clients: p.clients, Time: seconds(p.time), Size: p.size, Rate: p.rate,
		Ramp: seconds(p.ramp), Timeout: seconds(p.timeout), TLS: p.tls, Seed: p.seed,
	}
	if p.mode == bulk {
		r.Inflight = p.inflight
	}
	return r
}

// tlsConfig is that of clients.
func (p *params) tlsConfig() (*tls.Config, error) {
	config := &tls.Config{InsecureSkipVerify: p.insecure}
	if p.ca != "" {
		pool, err := cli.CAs("ca", p.ca)
		if err != nil {
			return nil, err
		}
		config.RootCAs = pool
	}
	return config, nil
}
