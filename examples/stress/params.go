package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"time"
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
	json     string // file, "-" or empty
	svg      string // file or empty

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

// parse returns the params, or nil and an exit status.
func parse(args []string, stderr io.Writer) (*params, int) {
	p := &params{pause: 250 * time.Millisecond}
	var name, ca string
	var insecure bool
	f := flag.NewFlagSet("stress", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&p.to, "to", "", "`address` of an echo service, host:port; required")
	f.IntVar(&p.clients, "clients", 100, "how many clients")
	f.DurationVar(&p.time, "time", 10*time.Second, "how long to run")
	f.StringVar(&name, "mode", string(roundTrips), "what clients do: round-trips, bulk or connections")
	f.IntVar(&p.size, "size", 0, "`bytes` of a message (default 1024, in bulk 65536)")
	f.Float64Var(&p.rate, "rate", 0, "messages a second of each client; latencies are then measured from when a message was due (default: as fast as possible)")
	f.IntVar(&p.inflight, "inflight", 16, "messages that a client of -mode bulk has under way at most")
	f.DurationVar(&p.ramp, "ramp", 0, "over how much of -time clients are started (default: all at once)")
	f.DurationVar(&p.timeout, "timeout", 10*time.Second, "how long connecting may take, or a message to go out or to come back")
	f.Uint64Var(&p.seed, "seed", 0, "what the bytes that are sent derive from (default: random)")
	f.BoolVar(&p.tls, "tls", false, "speak TLS with the service")
	f.StringVar(&ca, "ca", "", "`file` with the certificates that the service's is to be verified with (default: the system's); implies -tls")
	f.BoolVar(&insecure, "insecure", false, "do not verify the service's certificate; implies -tls")
	f.StringVar(&p.json, "json", "", "`file` for the report as JSON; - for stdout, with the text on stderr")
	f.StringVar(&p.svg, "svg", "", "`file` for the report as an SVG image")
	f.Usage = func() {
		fmt.Fprint(stderr, `Stress opens many clients against a TCP echo service and verifies every byte that
comes back.

	stress -to 127.0.0.1:8081

`)
		f.PrintDefaults()
	}
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, 0
		}
		return nil, 2 // package flag has said why
	}
	p.mode = mode(name)
	p.tls = p.tls || ca != "" || insecure
	given := make(map[string]bool)
	f.Visit(func(f *flag.Flag) { given[f.Name] = true })
	if !given["size"] {
		p.size = 1024
		if p.mode == bulk {
			p.size = 64 << 10
		}
	}
	if !given["seed"] {
		p.seed = rand.Uint64N(1 << 53) // which is exact wherever JSON is read
	}
	err := p.validate()
	switch {
	case f.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", f.Arg(0))
	case err == nil && given["inflight"] && p.mode != bulk:
		err = fmt.Errorf("-inflight is of -mode bulk, not %s", p.mode)
	case err == nil && ca != "" && insecure:
		err = errors.New("-ca and -insecure exclude each other")
	}
	var config *tls.Config
	if err == nil && p.tls {
		config, err = tlsConfig(ca, insecure)
	}
	if err != nil {
		fmt.Fprintf(stderr, "stress: %v\n", err)
		f.Usage()
		return nil, 2
	}
	p.dial = dialer(p.to, p.timeout, config)
	return p, 0
}

// validate says what is wrong with the flags' values.
func (p *params) validate() error {
	if p.to == "" {
		return errors.New("-to is missing: the address of an echo service")
	}
	if _, port, err := net.SplitHostPort(p.to); err != nil || port == "" {
		return fmt.Errorf("-to %q is not host:port", p.to)
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

// tlsConfig is that of clients, who verify the service's certificate with those in the
// file ca or, if that is empty, the system's.
func tlsConfig(ca string, insecure bool) (*tls.Config, error) {
	config := &tls.Config{InsecureSkipVerify: insecure}
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
	return config, nil
}
