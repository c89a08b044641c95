package relay

import (
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

	// defaultBacklog is net.core.somaxconn of Linux, what a TCP listener holds there.
	defaultBacklog = 4096

	maxName = 255 // bytes
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
	ports          *ports.Pool
	publicHost     string
	publicHostSet  bool
	advertisedHost string
}

type registerConfig struct {
	tls     *tls.Config
	log     *slog.Logger
	name    string
	port    int
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)
	backlog int
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

// WithLogger has events logged: registrations and clients at level Info, what a
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
		c.ports = &ports.Pool{First: first, Last: last}
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

// WithName names the service, for the relay's log and Services. A name belongs to
// one service at a time; another that asks for it is refused with CodeNameTaken.
// At most 255 bytes. By default, or with "", the service is called by its public
// address.
func WithName(name string) RegisterOption {
	return registerOption(func(c *registerConfig) error {
		if len(name) > maxName {
			return fmt.Errorf("relay: WithName: %d bytes are more than %d", len(name), maxName)
		}
		c.name = name
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
// what Register was given. TLS, if set, runs on top. Nil, the default, is a
// net.Dialer.
func WithDialer(dial func(ctx context.Context, network, addr string) (net.Conn, error)) RegisterOption {
	return registerOption(func(c *registerConfig) error {
		c.dial = dial
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
