package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/tcprelay/relay"
)

// options are those of the flags, but for what is in files.
func (c *config) options() ([]relay.ServerOption, error) {
	opts := []relay.ServerOption{
		relay.WithAdvertisedHost(c.advertise),
		relay.WithLease(c.lease),
		relay.WithHeartbeat(c.heartbeat, 0),
	}
	if c.ports != "" {
		first, last, err := parsePorts(c.ports)
		if err != nil {
			return nil, err
		}
		opts = append(opts, relay.WithPorts(first, last))
	}
	if c.public != "" {
		opts = append(opts, relay.WithPublicHost(c.public))
	}
	return opts, nil
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
