package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"time"

	"github.com/tcprelay/relay/internal/peers/parts"
)

// baseline is the chain that ratios are to.
const baseline = "proxy"

// spares is how many dedicated connections are ready for those who come.
const spares = "64"

// A chain is what lies between load and app.
type chain struct {
	name string
	// start starts its parts, the app too, and returns the public address.
	start func(r *parts.Running) (addr string, err error)
	// kinds are the jobs that it can do; nil is all.
	kinds []string
}

func (c chain) does(j job) bool { return c.kinds == nil || slices.Contains(c.kinds, j.kind) }

var allChains = []chain{
	{name: "direct", start: (*parts.Running).App},
	{name: baseline, start: proxies(1)},
	{name: "haproxy", start: haproxies(1)},
	{name: "relay, app", start: func(r *parts.Running) (string, error) { return r.Embedded(nil) }},
	{name: "dedicated, app", start: func(r *parts.Running) (string, error) { return r.Embedded(nil, "-dedicated", spares) }},
	{name: "yamux, app", start: rivalChain("yamux", false)},
	{name: "smux, app", start: rivalChain("smux", false)},
	{name: "muxado, app", start: rivalChain("muxado", false)},
	{name: "proxy × 2", start: proxies(2)},
	{name: "haproxy × 2", start: haproxies(2)},
	{name: "relay, forward", start: func(r *parts.Running) (string, error) { return r.Forwarded() }},
	{name: "dedicated, forward", start: func(r *parts.Running) (string, error) { return r.Forwarded("-dedicated", spares) }},
	{name: "yamux, agent", start: rivalChain("yamux", true)},
	{name: "smux, agent", start: rivalChain("smux", true)},
	{name: "muxado, agent", start: rivalChain("muxado", true)},
	// Not to be used, but to tell what of a relay's cost is its own.
	{name: "bare, agent", start: (*parts.Running).Bare, kinds: []string{"trips", "connect"}},
}

func proxies(n int) func(r *parts.Running) (string, error) {
	return func(r *parts.Running) (string, error) {
		to, err := r.App()
		for i := range n {
			if err != nil {
				break
			}
			to, err = r.Proxy(role(n, i), to)
		}
		return to, err
	}
}

// role names the carriers of a chain: that which is nearer to the app is the agent.
func role(n, i int) string {
	if n > 1 && i == 0 {
		return "agent"
	}
	return "relay"
}

func haproxies(n int) func(r *parts.Running) (string, error) {
	return func(r *parts.Running) (string, error) {
		if _, err := exec.LookPath("haproxy"); err != nil {
			return "", fmt.Errorf("%w; it is in the Debian package haproxy", err)
		}
		to, err := r.App()
		for i := range n {
			if err != nil {
				break
			}
			to, err = haproxy(r, role(n, i), to)
		}
		return to, err
	}
}

func haproxy(r *parts.Running, role, to string) (string, error) {
	addr, err := freePort()
	if err != nil {
		return "", err
	}
	config := fmt.Sprintf(`global
	maxconn 9900
defaults
	mode tcp
	timeout connect 5s
	timeout client 1h
	timeout server 1h
listen l
	bind %s
	server s %s
`, addr, to)
	f, err := os.CreateTemp(r.Bench.Dir, "haproxy")
	if err != nil {
		return "", err
	}
	if _, err := f.WriteString(config); err != nil {
		return "", err
	}
	if err := f.Close(); err != nil {
		return "", err
	}
	if _, err := r.Start(role, "haproxy", "-db", "-q", "-f", f.Name()); err != nil {
		return "", err
	}
	return addr, awaitPort(r.Ctx, addr)
}

func rivalChain(name string, agent bool) func(r *parts.Running) (string, error) {
	return func(r *parts.Running) (string, error) {
		var to string
		if agent {
			var err error
			if to, err = r.App(); err != nil {
				return "", err
			}
		}
		return r.Rival(name, to, nil)
	}
}

// freePort returns an address where nobody listens now.
func freePort() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

// awaitPort returns when somebody listens at addr.
func awaitPort(ctx context.Context, addr string) error {
	for {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(5 * time.Millisecond):
		}
	}
}
