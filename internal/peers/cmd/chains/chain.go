package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"regexp"
)

// baseline is the chain that ratios are to.
const baseline = "proxy"

// A chain is what lies between load and app.
type chain struct {
	name string
	// start starts its parts, the app too, and returns the public address.
	start func(r *running) (addr string, err error)
}

var allChains = []chain{
	{"direct", func(r *running) (string, error) { return app(r) }},
	{baseline, proxies(1)},
	{"haproxy", haproxies(1)},
	{"relay, app", embedded()},
	{"yamux, app", rivalChain("yamux", false)},
	{"smux, app", rivalChain("smux", false)},
	{"muxado, app", rivalChain("muxado", false)},
	{"proxy × 2", proxies(2)},
	{"haproxy × 2", haproxies(2)},
	{"relay, forward", forwarded()},
	{"yamux, agent", rivalChain("yamux", true)},
	{"smux, agent", rivalChain("smux", true)},
	{"muxado, agent", rivalChain("muxado", true)},
}

func app(r *running) (addr string, err error) {
	_, addr, err = r.part("", "app")
	return addr, err
}

func proxies(n int) func(r *running) (string, error) {
	return func(r *running) (string, error) {
		addr, err := app(r)
		for i := range n {
			if err != nil {
				break
			}
			_, addr, err = r.part(role(n, i), "proxy", "-to", addr)
		}
		return addr, err
	}
}

// role names the carriers of a chain: that which is nearer to the app is the agent.
func role(n, i int) string {
	if n > 1 && i == 0 {
		return "agent"
	}
	return "relay"
}

func haproxies(n int) func(r *running) (string, error) {
	return func(r *running) (string, error) {
		if _, err := exec.LookPath("haproxy"); err != nil {
			return "", fmt.Errorf("%w; it is in the Debian package haproxy", err)
		}
		to, err := app(r)
		for i := range n {
			if err != nil {
				break
			}
			to, err = haproxy(r, role(n, i), to)
		}
		return to, err
	}
}

func haproxy(r *running, role, to string) (string, error) {
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
	f, err := os.CreateTemp(r.b.dir, "haproxy")
	if err != nil {
		return "", err
	}
	if _, err := f.WriteString(config); err != nil {
		return "", err
	}
	if err := f.Close(); err != nil {
		return "", err
	}
	if _, err := r.start(role, "haproxy", "-db", "-q", "-f", f.Name()); err != nil {
		return "", err
	}
	return addr, awaitPort(r.ctx, addr)
}

var listening = regexp.MustCompile(`msg=listening addr=(\S+)`)

// relayd starts the relay, whose log tells its address.
func relayd(r *running) (string, error) {
	p, err := r.start("relay", "sh", "-c", `exec "$0" "$@" 2>&1`, r.b.relayd, "-listen", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	line, err := p.line()
	if err != nil {
		return "", err
	}
	m := listening.FindStringSubmatch(line)
	if m == nil {
		return "", fmt.Errorf("relayd says %q", line)
	}
	go drain(p.out) // the log goes on
	return m[1], nil
}

func drain(r *bufio.Reader) {
	for {
		if _, err := r.ReadSlice('\n'); err != nil && err != bufio.ErrBufferFull {
			return
		}
	}
}

func embedded(args ...string) func(r *running) (string, error) {
	return func(r *running) (string, error) {
		at, err := relayd(r)
		if err != nil {
			return "", err
		}
		_, addr, err := r.part("agent", "embed", append([]string{"-relay", at}, args...)...)
		return addr, err
	}
}

func forwarded(args ...string) func(r *running) (string, error) {
	return func(r *running) (string, error) {
		to, err := app(r)
		if err != nil {
			return "", err
		}
		at, err := relayd(r)
		if err != nil {
			return "", err
		}
		p, err := r.start("agent", r.b.forward, append([]string{"-relay", at, "-to", to}, args...)...)
		if err != nil {
			return "", err
		}
		return p.line()
	}
}

func rivalChain(name string, agent bool) func(r *running) (string, error) {
	return func(r *running) (string, error) {
		args := []string{"-over", name}
		if agent {
			to, err := app(r)
			if err != nil {
				return "", err
			}
			args = append(args, "-to", to)
		}
		relay, at, err := r.part("relay", "relay", "-over", name)
		if err != nil {
			return "", err
		}
		if _, _, err := r.part("agent", "agent", append(args, "-relay", at)...); err != nil {
			return "", err
		}
		return relay.line()
	}
}
