package relay

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/tcprelay/relay/internal/ports"
)

const (
	// handshakeTimeout bounds everything up to the relay's reply, on both sides.
	handshakeTimeout = 10 * time.Second

	defaultHeartbeat = 10 * time.Second
	defaultLease     = 60 * time.Second

	defaultBackoffMin = 250 * time.Millisecond
	defaultBackoffMax = 15 * time.Second

	// defaultBacklog is net.core.somaxconn of Linux, what a TCP listener holds there.
	defaultBacklog = 4096

	// silentTime is how long a client that was accepted may say nothing before Drain
	// does not wait for it any more. So long http.Server.Shutdown gives one, too.
	silentTime = 5 * time.Second

	maxName  = 255     // bytes
	maxToken = 8 << 10 // the hello has room for 16 KiB
)

// A ServerOption is an option of NewServer.
type ServerOption interface{ applyServer(*serverConfig) error }

// A RegisterOption is an option of Register.
type RegisterOption interface{ applyRegister(*registerConfig) error }

// An Option is an option of both NewServer and Register.
type Option interface {
	ServerOption
	RegisterOption
}

type serverConfig struct {
	tls            *tls.Config
	log            *slog.Logger
	events         *events
	heartbeat      heartbeat
	ports          ports.Pool
	publicHost     string
	publicHostSet  bool
	advertisedHost string
	lease          time.Duration // negative: none
	limits         Limits
	authorize      authorizer // nil: anybody may register
	tokens         tokens
	maxOpens       int // streams in the life of a session; 0, but in tests: all that there are
}

type registerConfig struct {
	tls       *tls.Config
	pins      []pin // of the relay's keys; nil: certification authorities decide
	log       *slog.Logger
	events    *events
	heartbeat heartbeat
	name      string
	port      int
	hostname  string
	shared    bool
	token     string
	inClear   bool // the token may be sent over plain TCP
	wait      bool
	min, max  time.Duration // of the backoff
	// Nil is net.Dialer's. Another is the user's, who knows where it leads.
	dial      func(ctx context.Context, network, addr string) (net.Conn, error)
	backlog   int
	dedicated int // spare connections; negative: clients are carried by streams
}

// heartbeat is when a session is pinged, and when it is taken for dead.
type heartbeat struct{ interval, dead time.Duration }

// with returns the heartbeat of a session whose other side wants to hear something as
// often as that; 0: it does not say. Each side keeps to the shorter interval.
func (h heartbeat) with(often time.Duration) heartbeat {
	if often > 0 {
		often = max(often, leastHeartbeat)
		if h.interval <= 0 || often < h.interval {
			h.interval = often
		}
	}
	if h.dead > 0 && h.dead <= h.interval {
		h.dead = 3 * h.interval // one that says no more often that it lives is not dead before
	}
	return h
}

type serverOption func(*serverConfig) error

func (f serverOption) applyServer(c *serverConfig) error { return f(c) }

type registerOption func(*registerConfig) error

func (f registerOption) applyRegister(c *registerConfig) error { return f(c) }

type bothOption struct {
	serverOption
	registerOption
}

// WithTLSConfig runs the connection between app and relay over TLS, which must be
// set on both sides. The relay's config needs a certificate; the app's ServerName
// defaults to the host it registers at. MinVersion defaults to TLS 1.3. The config
// is cloned. It says nothing about the clients' connections, whose bytes pass as
// they are. Nil, the default, is plain TCP.
func WithTLSConfig(config *tls.Config) Option {
	if config != nil {
		config = config.Clone()
		if config.MinVersion == 0 {
			config.MinVersion = tls.VersionTLS13
		}
	}
	return bothOption{
		func(c *serverConfig) error {
			if config != nil && len(config.Certificates) == 0 && config.GetCertificate == nil && config.GetConfigForClient == nil {
				return errors.New("relay: WithTLSConfig: a relay needs a certificate")
			}
			c.tls = config
			return nil
		},
		func(c *registerConfig) error {
			c.tls = config
			return nil
		},
	}
}

// WithLogger has events logged: registrations at level Info, clients at Debug, what a
// peer did wrong at Warn. Nil, the default, logs nothing.
func WithLogger(log *slog.Logger) Option {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return bothOption{
		func(c *serverConfig) error {
			c.log = log
			return nil
		},
		func(c *registerConfig) error {
			c.log = log
			return nil
		},
	}
}

// WithPorts gives the relay the public ports from first to last, both included,
// 1 to 65535. A service gets the next free one, in turn, or the one it asks for if
// that lies in the range. By default a service gets any free port, and may ask for
// any.
func WithPorts(first, last int) ServerOption {
	return serverOption(func(c *serverConfig) error {
		if first < 1 || last > 65535 || first > last {
			return fmt.Errorf("relay: WithPorts(%d, %d): not a range within 1 to 65535", first, last)
		}
		c.ports.First, c.ports.Last = first, last
		return nil
	})
}

// WithPublicHost sets the address that public listeners bind, an IP address or a
// name of this host; "" is all addresses. By default it is the address of the
// listener on which the service registered, so that loopback stays loopback. Whether
// it can be bound shows when the first service registers.
func WithPublicHost(host string) ServerOption {
	return serverOption(func(c *serverConfig) error {
		c.publicHost, c.publicHostSet = host, true
		return nil
	})
}

// WithAdvertisedHost sets the host that services are told in their public address.
// By default it is the address that the public listener is bound to, and if that
// is all addresses, the one at which the service reached the relay. Whether clients
// can reach it there is not checked.
func WithAdvertisedHost(host string) ServerOption {
	return serverOption(func(c *serverConfig) error {
		if _, err := netip.ParseAddr(host); err != nil && strings.ContainsAny(host, ":/[] \t\r\n") {
			return fmt.Errorf("relay: WithAdvertisedHost(%q): not a host", host)
		}
		c.advertisedHost = host
		return nil
	})
}

// WithHeartbeat sets how a session between app and relay is found to be dead. Each
// side pings when it has heard nothing, or sent nothing, for interval; whatever
// arrives is a sign of life. A side that has heard nothing for dead ends the session.
// Defaults, also for 0, are 10 s and three times the interval; dead must be more
// than interval. Negative: no pings, or no end for silence. The other side is told the
// interval and sends something as often.
//
// A service that speaks plain muxado is not pinged, nor taken for dead.
func WithHeartbeat(interval, dead time.Duration) Option {
	h := heartbeat{interval, dead}
	if h.interval == 0 {
		h.interval = defaultHeartbeat
	}
	if h.dead == 0 {
		h.dead = 3 * max(h.interval, defaultHeartbeat)
		if h.interval > 0 {
			h.dead = 3 * h.interval
		}
	}
	var err error
	if h.dead > 0 && h.dead <= h.interval {
		err = fmt.Errorf("relay: WithHeartbeat(%v, %v): dead before a ping can be answered", interval, dead)
	}
	return bothOption{
		func(c *serverConfig) error { c.heartbeat = h; return err },
		func(c *registerConfig) error { c.heartbeat = h; return err },
	}
}

// WithEvents has f called with what happens to services, one event at a time and in
// order. It is called by the goroutines that do the work, so it must return soon, and
// may not call Close, Shutdown, Disconnect or Reauthorize. Nil, the default, is nobody.
func WithEvents(f func(Event)) Option {
	return bothOption{
		func(c *serverConfig) error { c.events.f = f; return nil },
		func(c *registerConfig) error { c.events.f = f; return nil },
	}
}

// WithListen has listen make the public listeners, for those that need their own: with a
// PROXY protocol in front, SO_REUSEPORT, sockets of systemd, or a network in memory for
// tests (see the example InMemory). Network is "tcp" and address a host and port; port 0 is
// any. An error that matches syscall.EADDRINUSE says that the port is taken. Apps are told
// the port in the listener's Addr, 0 if that has none, as a Unix socket's. Connections
// should have the methods CloseWrite and SetLinger that a *net.TCPConn has; without them a
// half-close or a reset is not passed on. SetLinger and the listener's Close must not wait
// for anything. Nil, the default, is net.ListenConfig.
func WithListen(listen func(ctx context.Context, network, address string) (net.Listener, error)) ServerOption {
	return serverOption(func(c *serverConfig) error {
		c.ports.ListenFunc = listen
		return nil
	})
}

// WithLease sets for how long the relay keeps the public address of an app whose
// session broke: the port stays bound, nobody else gets it, and clients wait for the
// app (Limits.WaitTime). The default, also for 0, is a minute. Negative: not at all.
func WithLease(d time.Duration) ServerOption {
	return serverOption(func(c *serverConfig) error {
		c.lease = d
		if d == 0 {
			c.lease = defaultLease
		}
		return nil
	})
}

// WithLimits sets what services and clients may take. See Limits for the defaults.
func WithLimits(l Limits) ServerOption {
	return serverOption(func(c *serverConfig) error {
		c.limits = l
		return l.validate()
	})
}

// WithTokens lets those services register, and only those, that show one of the
// tokens. All of one call are as good as each other, and one identity, so that an old
// and a new one can be in use together while apps change over. Given several times,
// each call is another identity: its services are kept apart as [Grant] says. Tokens
// are compared in constant time. They should be long and random; an empty one is an
// error. It excludes WithAuthorizer.
func WithTokens(tokens ...string) ServerOption {
	return serverOption(func(c *serverConfig) error {
		if err := c.tokens.add(fmt.Sprintf("tokens %d", len(c.tokens)+1), tokens); err != nil {
			return fmt.Errorf("relay: WithTokens: %w", err)
		}
		return nil
	})
}

// WithAuthorizer has authorize decide who may register and as what. It is asked at
// each registration, also when an app comes back, and by [Server.Reauthorize]. It may take
// as long as the handshake has time; ctx ends with that, or when the app has gone. Several
// calls may run at once. An error refuses the app with CodeUnauthorized, which ends it for
// good, and is logged here; one that is no answer wraps [ErrUndecided]. Nil, the default,
// lets everybody register; with a TLS config that verifies client certificates, as the
// certificate's subject, or "key" and the SHA-256 of its public key if that is empty.
func WithAuthorizer(authorize func(ctx context.Context, r Registration) (Grant, error)) ServerOption {
	return serverOption(func(c *serverConfig) error {
		c.authorize = authorize
		return nil
	})
}

// WithToken shows token to the relay. Over anything but TLS, loopback, or a connection
// that WithDialer made, Register refuses to send it and fails with CodeInsecure; see
// WithTokenInClear. At most 8 KiB.
func WithToken(token string) RegisterOption {
	return registerOption(func(c *registerConfig) error {
		if len(token) > maxToken {
			return fmt.Errorf("relay: WithToken: %d bytes are more than %d", len(token), maxToken)
		}
		c.token = token
		return nil
	})
}

// WithTokenInClear lets the token be sent over plain TCP, where everybody on the way
// can read and use it.
func WithTokenInClear() RegisterOption {
	return registerOption(func(c *registerConfig) error {
		c.inClear = true
		return nil
	})
}

// WithShared lets services of the same name, all with WithShared and of the same
// identity, have one public address together. Each new client goes to the one with
// the fewest; the address stays while one of them lives. That is how an app is
// replaced by its successor without a gap: start the new one, then close the old
// one's listener. It needs WithName.
func WithShared() RegisterOption {
	return registerOption(func(c *registerConfig) error {
		c.shared = true
		return nil
	})
}

// WithWait has Register try again, as long as its context lets it, when the relay
// cannot be reached, is full, or the name or port is taken; WithEvents and WithLogger tell
// of each try. By default it fails at once. Credentials that are refused, and TLS that
// cannot work, such as a certificate that is not trusted, fail in any case.
func WithWait() RegisterOption {
	return registerOption(func(c *registerConfig) error {
		c.wait = true
		return nil
	})
}

// WithBackoff sets how long a listener waits before it tries to reach a lost relay
// again: a random time up to a bound that starts at min and doubles to max. Defaults,
// also for 0, are 250 ms and 15 s. Neither may be negative, nor max less than min.
func WithBackoff(min, max time.Duration) RegisterOption {
	return registerOption(func(c *registerConfig) error {
		if min < 0 || max < 0 {
			return fmt.Errorf("relay: WithBackoff(%v, %v): negative", min, max)
		}
		c.min, c.max = cmp.Or(min, defaultBackoffMin), cmp.Or(max, defaultBackoffMax)
		if max == 0 && c.max < c.min {
			c.max = c.min
		}
		if c.max < c.min {
			return fmt.Errorf("relay: WithBackoff(%v, %v): not a range", min, max)
		}
		return nil
	})
}

// WithName names the service, for the relay's log and Services. A name belongs to
// one service at a time, or to those that share it; another that asks for it is refused
// with CodeNameTaken. At most 255 bytes. By default, or with "", the service is called by
// its hostname ([WithHostname]), or else by its public address.
func WithName(name string) RegisterOption {
	return registerOption(func(c *registerConfig) error {
		if len(name) > maxName {
			return fmt.Errorf("relay: WithName: %d bytes are more than %d", len(name), maxName)
		}
		c.name = name
		return nil
	})
}

// WithHostname has clients reach the service by a host, such as "app.example.com", through
// the listeners that the relay has for all such services ([Server.ServeHosts]), instead
// of a port of its own: by TLS, which ends in the app ([crypto/tls.NewListener],
// [net/http.Server.ServeTLS]), or by HTTP in clear. "*.example.com" is every name with one
// label more. DNS has to lead them to the relay. A hostname belongs to one service at a
// time, or to those that share it; without WithName the service is called by it. It
// excludes WithPort. With "", the default, the service has a port.
func WithHostname(host string) RegisterOption {
	return registerOption(func(c *registerConfig) error {
		if host != "" {
			if err := checkHostname(host); err != nil {
				return fmt.Errorf("relay: WithHostname: %w", err)
			}
		}
		c.hostname = host
		return nil
	})
}

// WithPort asks for a public port, 1 to 65535. With 0, the default, the relay
// chooses one.
func WithPort(port int) RegisterOption {
	return registerOption(func(c *registerConfig) error {
		if port < 0 || port > 65535 {
			return fmt.Errorf("relay: WithPort(%d): not a port", port)
		}
		c.port = port
		return nil
	})
}

// WithDialer has dial make the connection to the relay, which may then run over
// whatever dial returns: a proxy, a Unix socket, SSH. Network is "tcp" and addr is
// what Register was given. TLS, if set, runs on top. With WithDedicated several calls
// may run at once. Nil, the default, is a net.Dialer.
func WithDialer(dial func(ctx context.Context, network, addr string) (net.Conn, error)) RegisterOption {
	return registerOption(func(c *registerConfig) error {
		c.dial = dial
		return nil
	})
}

// WithDedicated has the app open one more connection to the relay for each client,
// instead of carrying it in the session's. Bulk costs less so, since nothing has to be put
// in front of what a client sends, and clients share neither losses nor a congestion
// window. It takes a file more for each client, here and in the relay, and
// time to open a connection: n, 0 or more, are kept ready, so that those who come one by
// one, or n at once, do not wait for it. A client for whom there is none after three
// seconds, because the relay or what lies between does not allow it, is carried by the
// session as without this option. By default every client is.
//
// What [Conn] does is the same, but that a write deadline missed under TLS ends the
// connection's sending side.
func WithDedicated(n int) RegisterOption {
	return registerOption(func(c *registerConfig) error {
		if n < 0 {
			return fmt.Errorf("relay: WithDedicated(%d): negative", n)
		}
		c.dedicated = n
		return nil
	})
}

// WithBacklog sets how many clients may wait for Accept. One more is reset at once
// and counted in Stats. The default, also for 0, is 4096, which is what a TCP
// listener on Linux holds. It may not be negative.
func WithBacklog(n int) RegisterOption {
	return registerOption(func(c *registerConfig) error {
		if n < 0 {
			return fmt.Errorf("relay: WithBacklog(%d): negative", n)
		}
		if n == 0 {
			n = defaultBacklog
		}
		c.backlog = n
		return nil
	})
}
