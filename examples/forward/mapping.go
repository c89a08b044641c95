package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/tally"
)

// A target is where clients are carried to, and what the relay is asked for.
type target struct {
	text             string // as it was given, without its options
	network, address string // as net.Dial has them
	port             int
	name, hostname   string
	proxy            proxyVersion
}

// targets are the values of -to.
type targets []target

func (t *targets) String() string {
	var texts []string
	for _, t := range *t {
		texts = append(texts, t.text)
	}
	return strings.Join(texts, " ")
}

// Set appends those of a value, which has spaces between them.
func (t *targets) Set(s string) error {
	if strings.TrimSpace(s) == "" {
		return errors.New("empty")
	}
	for s := range strings.FieldsSeq(s) {
		one, err := parseTarget(s)
		if err != nil {
			return err
		}
		*t = append(*t, one)
	}
	return nil
}

// parseTarget parses an address with its options behind it: localhost:3000,port=8081.
func parseTarget(s string) (target, error) {
	text, options, more := strings.Cut(s, ",")
	t := target{text: text, network: "tcp", address: text}
	if err := t.parseAddress(); err != nil {
		return target{}, err
	}
	var given []string
	for more {
		var option string
		option, options, more = strings.Cut(options, ",")
		key, value, _ := strings.Cut(option, "=")
		if slices.Contains(given, key) {
			return target{}, fmt.Errorf("%s= comes twice", key)
		}
		given = append(given, key)
		if err := t.set(key, value); err != nil {
			return target{}, err
		}
	}
	if t.port != 0 && t.hostname != "" {
		return target{}, errors.New("port= and hostname= exclude each other")
	}
	return t, nil
}

func (t *target) parseAddress() error {
	if path, ok := strings.CutPrefix(t.text, "unix:"); ok {
		if path == "" {
			return errors.New("unix: without a path")
		}
		t.network, t.address = "unix", path
		return nil
	}
	if strings.Contains(t.text, "=") {
		return fmt.Errorf("%q where the address should be, which comes first", t.text)
	}
	if !strings.Contains(t.text, ":") {
		if _, err := parsePort(t.text); err != nil {
			return fmt.Errorf("%q is neither host:port, nor a port, nor unix:path", t.text)
		}
		t.text = "localhost:" + t.text
		t.address = t.text
		return nil
	}
	_, port, err := net.SplitHostPort(t.text)
	if err != nil {
		return fmt.Errorf("%w (host:port is wanted, with an IPv6 address in brackets)", err)
	}
	if n, err := net.LookupPort("tcp", port); err != nil || n == 0 {
		return fmt.Errorf("%q has no port to connect to", t.text)
	}
	return nil
}

func (t *target) set(key, value string) (err error) {
	switch {
	case key != "port" && key != "name" && key != "hostname" && key != "proxy-protocol":
		return fmt.Errorf("%q is no option of a target; there are port=, name=, hostname= and proxy-protocol=", key)
	case value == "":
		return fmt.Errorf("%s= is empty", key)
	case key == "port":
		t.port, err = parsePort(value)
	case key == "name":
		t.name = value
	case key == "hostname":
		t.hostname = value
	case key == "proxy-protocol":
		err = t.proxy.Set(value)
	}
	return err
}

func parsePort(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is not a port", s)
	}
	return int(n), nil
}

// clashes reports why two cannot be had together. Those that share a name, or else a
// hostname, have one address, and the relay gives each client to one of them.
func (t *target) clashes(o *target, shared bool) error {
	together := t.name == o.name && t.hostname == o.hostname && (t.port == o.port || t.port == 0 || o.port == 0)
	named := t.name != "" || t.hostname != ""
	what := ""
	switch {
	case shared && named && together:
		return nil
	case t.name != "" && t.name == o.name:
		what = "name " + t.name
	case t.hostname != "" && t.hostname == o.hostname:
		what = "hostname " + t.hostname
	case t.port != 0 && t.port == o.port:
		what = fmt.Sprintf("port %d", t.port)
	default:
		return nil
	}
	why := "only with -shared can they share it"
	if shared {
		why = "those that share it must have the same name and address"
	}
	return fmt.Errorf("%s and %s both ask for the %s: %s", o.text, t.text, what, why)
}

// options are what the relay is asked for.
func (t *target) options() []relay.RegisterOption {
	return []relay.RegisterOption{relay.WithPort(t.port), relay.WithName(t.name), relay.WithHostname(t.hostname)}
}

// A forwarder has all mappings of the process.
type forwarder struct {
	relay    string
	drain    time.Duration
	log      *slog.Logger
	out      io.Writer // for public addresses; nil: a view shows them
	mappings []*mapping
}

// newForwarder returns one that has yet to serve.
func newForwarder(c *config, services targets, opts []relay.RegisterOption, log *slog.Logger, out io.Writer) *forwarder {
	f := &forwarder{relay: c.relay, drain: c.drain, log: log, out: out}
	for _, t := range services {
		m := &mapping{target: t, f: f, log: log, since: time.Now()}
		if len(services) > 1 {
			m.log = log.With("to", t.text)
		}
		m.missed = tally.New(m.log)
		m.opts = slices.Concat(opts, t.options(), []relay.RegisterOption{relay.WithLogger(m.log), relay.WithEvents(m.event)})
		f.mappings = append(f.mappings, m)
	}
	return f
}

// several reports that it takes a target's name to tell mappings apart.
func (f *forwarder) several() bool { return len(f.mappings) > 1 }

// errCut is the end of a mapping whose clients had no more time to leave.
var errCut = errors.New("clients were cut off")

// serve carries clients until ctx ends, or the relay refuses one of the mappings for good;
// then those who are there may go on for a while. It returns why mappings failed, and
// whether it left clients behind.
func (f *forwarder) serve(ctx context.Context) (failed []error, cut bool) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	over := make(chan struct{}) // closed when the time to leave is
	defer context.AfterFunc(ctx, func() {
		f.log.Info("stopping", "drain", f.drain)
		time.AfterFunc(f.drain, func() { close(over) })
	})()
	ended := make(chan error)
	for _, m := range f.mappings {
		go func() { ended <- m.serve(ctx, over) }()
	}
	for left := len(f.mappings) - 1; left >= 0; left-- {
		err := <-ended
		switch {
		case err == nil:
		case errors.Is(err, errCut):
			cut = true
		default:
			if f.several() {
				f.log.Error("mapping failed", "err", err)
			}
			failed = append(failed, err)
			if left > 0 {
				stop()
			}
		}
	}
	return failed, cut
}

// A state is how a mapping stands with the relay.
type state int

const (
	registering state = iota
	connected
	reconnecting
	refused // by the relay, and will be asked again
	leaving // no more clients are taken
	ended
)

func (s state) String() string {
	return [...]string{"registering", "connected", "reconnecting", "refused", "leaving", "ended"}[s]
}

// A mapping is a service at the relay, whose clients it carries to its target.
type mapping struct {
	target
	f      *forwarder
	log    *slog.Logger
	opts   []relay.RegisterOption
	missed *tally.Tally // clients that could not be carried

	mu    sync.Mutex
	ln    *relay.Listener // nil until it is registered
	addr  string
	state state
	since time.Time // when it came into the state
	why   string    // of reconnecting, refused and ended
}

// serve registers and carries clients until ctx ends and they have left. When over is
// closed it waits for them no longer.
func (m *mapping) serve(ctx context.Context, over <-chan struct{}) error {
	ln, err := relay.Register(ctx, m.f.relay, m.opts...)
	if err != nil {
		if ctx.Err() != nil && !answered(err) {
			return nil // that ctx ended was what it waited for, with -wait
		}
		return m.fail(err)
	}
	m.mu.Lock()
	m.ln = ln
	m.mu.Unlock()
	defer context.AfterFunc(ctx, func() {
		m.become(leaving, nil)
		ln.Close()
	})()

	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil {
			return m.fail(err)
		}
		go m.carry(c.(*relay.Conn))
	}
	select {
	case <-ln.Done(): // the clients have what was sent to them
		return nil
	case <-over:
		return errCut
	}
}

func (m *mapping) fail(err error) error {
	m.become(ended, err)
	if m.f.several() {
		return fmt.Errorf("-to %s: %w", m.text, err)
	}
	return err
}

// answered reports that err is what the relay itself said.
func answered(err error) bool {
	re, ok := errors.AsType[*relay.RegisterError](err)
	return ok && re.Err == nil
}

// event is told what happens between the listener and the relay.
func (m *mapping) event(ev relay.Event) {
	switch ev.Kind {
	case relay.EventRegistered, relay.EventResumed:
		m.become(connected, nil)
		m.announce(ev.Addr)
	case relay.EventLost:
		m.become(reconnecting, ev.Err)
	case relay.EventDraining:
		m.become(reconnecting, errors.New("the relay is going away"))
	case relay.EventRefused:
		next := reconnecting
		if answered(ev.Err) {
			next = refused
		} else if ev.Addr == "" {
			next = registering
		}
		m.become(next, ev.Err)
	case relay.EventEnded:
		m.become(ended, ev.Err)
	}
}

func (m *mapping) become(s state, why error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == leaving && s != ended {
		return
	}
	if m.state != s {
		m.state, m.since = s, time.Now()
	}
	m.why = ""
	if why != nil {
		m.why = why.Error()
	}
}

// announce prints the public address if it is another than before.
func (m *mapping) announce(addr string) {
	m.mu.Lock()
	same := m.addr == addr
	m.addr = addr
	m.mu.Unlock()
	switch {
	case same || m.f.out == nil:
	case m.f.several():
		fmt.Fprintf(m.f.out, "%s -> %s\n", clean(addr), clean(m.text))
	default:
		fmt.Fprintln(m.f.out, clean(addr))
	}
}

// row returns how the mapping is.
func (m *mapping) row() row {
	m.mu.Lock()
	r := row{addr: m.addr, target: m.text, state: m.state, since: m.since, why: m.why, missed: m.missed.Total()}
	ln := m.ln
	m.mu.Unlock()
	if r.addr == "" { // what it is going to be
		r.addr = cmp.Or(m.hostname, "any port")
		if m.port != 0 {
			r.addr = fmt.Sprintf("port %d", m.port)
		}
	}
	if ln != nil {
		r.stats = ln.Stats()
	}
	return r
}
