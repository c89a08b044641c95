package parts

import (
	"regexp"
)

// App starts an app behind a port, and returns its address.
func (r *Running) App() (addr string, err error) {
	_, addr, err = r.Part("", "app")
	return addr, err
}

// Proxy starts a plain TCP proxy to what is at to, and returns its address.
func (r *Running) Proxy(role, to string) (addr string, err error) {
	_, addr, err = r.Part(role, "proxy", "-to", to)
	return addr, err
}

var listening = regexp.MustCompile(`msg=listening addr=(\S+)`)

// Relayd starts the relay, whose log tells its address.
func (r *Running) Relayd() (string, error) {
	p, err := r.Start("relay", "sh", "-c", `exec "$0" "$@" 2>&1`, r.Bench.Relayd, "-listen", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	for {
		line, err := p.Line()
		if err != nil {
			return "", err
		}
		if m := listening.FindStringSubmatch(line); m != nil {
			go p.Drain() // the log goes on
			return m[1], nil
		}
	}
}

// Via returns the address at which what is at addr is reached, through something else.
// Nil is no detour.
type Via func(addr string) (string, error)

func (v Via) reach(addr string) (string, error) {
	if v == nil {
		return addr, nil
	}
	return v(addr)
}

// Embedded starts the relay and an app with the library in it, and returns the public
// address, or addresses with commas between them if args ask for more services. The app
// reaches the relay via what is given, and has args.
func (r *Running) Embedded(via Via, args ...string) (string, error) {
	at, err := r.Relayd()
	if err != nil {
		return "", err
	}
	if at, err = via.reach(at); err != nil {
		return "", err
	}
	_, addr, err := r.Part("agent", "embed", append([]string{"-relay", at}, args...)...)
	return addr, err
}

// Forwarded starts an app, the relay and forward, which has args, and returns the public
// address.
func (r *Running) Forwarded(args ...string) (string, error) {
	to, err := r.App()
	if err != nil {
		return "", err
	}
	at, err := r.Relayd()
	if err != nil {
		return "", err
	}
	p, err := r.Start("agent", r.Bench.Forward, append([]string{"-relay", at, "-to", to}, args...)...)
	if err != nil {
		return "", err
	}
	return p.Line()
}

// Bare starts an app, and the least that a relay and its agent can be, and returns the
// public address.
func (r *Running) Bare() (string, error) {
	to, err := r.App()
	if err != nil {
		return "", err
	}
	relay, at, err := r.Part("relay", "bare-relay")
	if err != nil {
		return "", err
	}
	if _, _, err := r.Part("agent", "bare-agent", "-to", to, "-relay", at); err != nil {
		return "", err
	}
	return relay.Line()
}

// Rival starts a rival's relay and agent, and returns the public address. The agent
// reaches the relay via what is given, and carries to an app's port or, if to is empty,
// is the app.
func (r *Running) Rival(name, to string, via Via) (string, error) {
	relay, at, err := r.Part("relay", "relay", "-over", name)
	if err != nil {
		return "", err
	}
	if at, err = via.reach(at); err != nil {
		return "", err
	}
	if _, _, err := r.Part("agent", "agent", "-over", name, "-to", to, "-relay", at); err != nil {
		return "", err
	}
	return relay.Line()
}
