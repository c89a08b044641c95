package relay

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path"
	"slices"
	"strings"
)

// A Registration is what an app that asks for a public address shows of itself.
type Registration struct {
	Token  string               // as it was sent; may be empty
	TLS    *tls.ConnectionState // nil over plain TCP
	Remote net.Addr             // where it comes from
	Name   string               // the name asked for; may be empty
	Port   int                  // the port asked for; 0 if the relay is to choose
	Shared bool                 // it would share the name with others

	Hostname string // that clients are to reach it by; empty if it wants a port of its own
}

// A Grant is what an authorizer lets an app have.
type Grant struct {
	// Identity says whose the service is. Its name, port and lease are kept for that
	// identity, and only services of one identity share a name. All apps of the empty
	// identity are strangers to each other in this, but for shared names.
	Identity string

	// Names are the names that the app may ask for, as patterns of path.Match: "web",
	// "web-*". Nil: any. An app that asks for none is let through.
	Names []string

	// Hostnames are those that the app may ask for, as patterns of path.Match, in which
	// "*" stands for dots too: "app.example.com", "*.example.com". A wildcard, such as
	// "*.example.com" itself, may be asked for only where a pattern begins with "*". Nil:
	// any.
	Hostnames []string

	// FirstPort to LastPort are the public ports that it may have, of those that the
	// relay has. 0, 0: any.
	FirstPort, LastPort int

	// Limits are those of the identity's own. Services, Clients and ClientsPerIP bound
	// what it has in all, beside the server's; those on a service, its clients and its
	// rates replace the server's, and are those of the registration that opened it for as
	// long as it lives; zero leaves the server's, and those on connections before
	// registration and on unread bytes are not looked at.
	Limits Limits
}

// An authorizer returns what an app may have, or why it may have nothing, which only the
// relay's log has.
type authorizer func(context.Context, Registration) (Grant, error)

// ErrUndecided is for an authorizer that cannot tell whether an app may register, because
// it does not reach what it goes by: its error wraps this one. The app is told
// CodeUnavailable and tries again, and one that is registered stays ([Server.Reauthorize]).
// A missed deadline, context.DeadlineExceeded or os.ErrDeadlineExceeded, says the same.
var ErrUndecided = errors.New("relay: it cannot be told who may register")

// isUndecided reports whether an authorizer's error is no answer.
func isUndecided(err error) bool {
	return errors.Is(err, ErrUndecided) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
}

var (
	errNoToken = errors.New("no token")
	errToken   = errors.New("a token that nobody has")
)

// tokens is the authorizer of WithTokens: a group of tokens for each owner.
type tokens []owner

type owner struct {
	identity string
	sums     [][sha256.Size]byte
}

func (t *tokens) add(identity string, group []string) error {
	if len(group) == 0 {
		return errors.New("no token")
	}
	o := owner{identity: identity}
	for i, token := range group {
		if token == "" {
			return fmt.Errorf("token %d is empty", i+1)
		}
		sum := sha256.Sum256([]byte(token))
		for _, other := range *t {
			if slices.Contains(other.sums, sum) {
				return errors.New("two owners have one token")
			}
		}
		o.sums = append(o.sums, sum)
	}
	*t = append(*t, o)
	return nil
}

// authorize takes as long for any token: all are compared, by their hashes.
func (t tokens) authorize(_ context.Context, r Registration) (Grant, error) {
	sum := sha256.Sum256([]byte(r.Token))
	found := 0
	for i, owner := range t {
		for _, token := range owner.sums {
			found = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(sum[:], token[:]), i+1, found)
		}
	}
	switch {
	case found > 0:
	case r.Token == "":
		return Grant{}, errNoToken
	default:
		return Grant{}, errToken
	}
	return Grant{Identity: t[found-1].identity}, nil
}

// TokenAuthorizer returns an authorizer that goes by tokens, as [WithTokens] has one, for
// one of your own to ask whose tokens can change ([Server.Reauthorize]). Owners have the
// tokens of each identity ([Grant]), which keeps what it has for as long as it is called the
// same. An identity without a name or a token, an empty token, and one that two have are
// errors.
func TokenAuthorizer(owners map[string][]string) (func(context.Context, Registration) (Grant, error), error) {
	t := tokens{}
	for _, identity := range slices.Sorted(maps.Keys(owners)) {
		err := errors.New("no name")
		if identity != "" {
			err = t.add(identity, owners[identity])
		}
		if err != nil {
			return nil, fmt.Errorf("relay: TokenAuthorizer: %q: %w", identity, err)
		}
	}
	return t.authorize, nil
}

// byCertificate is the authorizer where there is no other: who has shown a client
// certificate that the TLS config had verified is known by its subject, or if that is
// empty by its key.
func byCertificate(_ context.Context, r Registration) (Grant, error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return Grant{}, nil
	}
	cert := r.TLS.VerifiedChains[0][0]
	if subject := cert.Subject.String(); subject != "" {
		return Grant{Identity: subject}, nil
	}
	return Grant{Identity: fmt.Sprintf("key %x", sha256.Sum256(cert.RawSubjectPublicKeyInfo))}, nil
}

// guarded reports that not just anybody may register.
func (c *serverConfig) guarded() bool {
	return c.authorize != nil ||
		c.tls != nil && (c.tls.ClientAuth == tls.RequireAndVerifyClientCert || c.tls.GetConfigForClient != nil)
}

func (g *Grant) validate() error {
	if g.FirstPort < 0 || g.LastPort > 65535 || g.FirstPort > g.LastPort || g.FirstPort == 0 && g.LastPort != 0 {
		return fmt.Errorf("grant of ports %d to %d: not a range within 1 to 65535", g.FirstPort, g.LastPort)
	}
	for _, p := range g.Names {
		if _, err := path.Match(p, ""); err != nil {
			return fmt.Errorf("grant of name %q: %w", p, err)
		}
	}
	for _, p := range g.Hostnames {
		if _, err := path.Match(p, ""); err != nil {
			return fmt.Errorf("grant of hostname %q: %w", p, err)
		}
	}
	return g.Limits.validate()
}

func (g *Grant) allowsName(name string) bool {
	if g.Names == nil || name == "" {
		return true
	}
	for _, p := range g.Names {
		if ok, _ := path.Match(p, name); ok {
			return true
		}
	}
	return false
}

func (g *Grant) allowsHost(host string) bool {
	if g.Hostnames == nil {
		return true
	}
	wildcard := strings.HasPrefix(host, "*")
	for _, p := range g.Hostnames {
		if wildcard && !strings.HasPrefix(p, "*") {
			continue
		}
		if ok, _ := path.Match(p, host); ok {
			return true
		}
	}
	return false
}

// allowsAddress reports whether the app may be where a service is.
func (g *Grant) allowsAddress(svc *service) bool {
	if svc.host != "" {
		return g.allowsHost(svc.host)
	}
	return g.allowsPort(svc.port)
}

func (g *Grant) allowsPort(port int) bool {
	return g.FirstPort == 0 || g.FirstPort <= port && port <= g.LastPort
}

// private reports that what is sent over conn cannot be read on a network: TLS, this
// machine, or not a TCP connection at all.
func private(conn net.Conn) bool {
	if _, ok := conn.(*tls.Conn); ok {
		return true
	}
	addr, ok := conn.RemoteAddr().(*net.TCPAddr)
	return !ok || addr.IP.IsLoopback()
}
