package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/tcprelay/relay"
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

// Set appends one.
func (t *targets) Set(s string) error {
	one, err := parseTarget(s)
	if err == nil {
		*t = append(*t, one)
	}
	return err
}

// SetAll appends those that the environment has, with spaces between.
func (t *targets) SetAll(s string) error {
	if strings.TrimSpace(s) == "" {
		return errors.New("empty")
	}
	for one := range strings.FieldsSeq(s) {
		if err := t.Set(one); err != nil {
			return err
		}
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

// agree has all that share a name ask for the port that one of them names, or else who
// comes first might be given another. They do not clash.
func (t targets) agree() {
	for i := range t {
		for _, o := range t {
			if t[i].port == 0 && o.port != 0 && t[i].name != "" && t[i].name == o.name {
				t[i].port = o.port
			}
		}
	}
}

// lookedUp reports whether it takes more than this machine to know the target's address.
func (t *target) lookedUp() bool {
	if t.network != "tcp" {
		return false
	}
	host, _, _ := net.SplitHostPort(t.address)
	_, err := netip.ParseAddr(host)
	return err != nil && host != "" && host != "localhost"
}

// options are what the relay is asked for.
func (t *target) options() []relay.RegisterOption {
	return []relay.RegisterOption{relay.WithPort(t.port), relay.WithName(t.name), relay.WithHostname(t.hostname)}
}
