// Package memnet is a TCP-like network in memory, for tests.
//
// A [Network] has listeners and connections whose ends behave as a *net.TCPConn on
// Linux does, down to its errors: half-close, resets, a bounded buffer each way,
// deadlines. A test can make each connection slow, freeze it, slice its bytes or cut
// it at a given byte.
//
//	n := memnet.New()
//	ln, err := n.Listen(ctx, "tcp", "127.0.0.1:0")
//	conn, err := n.Dial(ctx, "tcp", ln.Addr().String())
//	conn.(*memnet.Conn).SetLatency(50 * time.Millisecond)
//
// All its waits are those of a sync.Cond, so they are durable in a bubble of
// testing/synctest, where latency and deadlines follow the fake clock. No goroutine
// waits: a timer's function delivers what was under way. A connection belongs to the
// bubble it is used in.
//
// Three habits of Linux that surprise: bytes that arrived before a reset can still be
// read; the reset is an error of the first Read or Write that meets it, after which
// Read gives io.EOF and Write syscall.EPIPE; and behind a peer's FIN its reset does
// not show in Read at all, which gives io.EOF.
package memnet

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
)

const (
	backlog   = 4096  // connections that wait for Accept, per listener
	firstPort = 32768 // of those that the network picks, up to 65535
)

var (
	loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	wildcard = netip.AddrFrom4([4]byte{})
)

// A Network is a set of hosts, one per IP address, that all reach each other. Its
// methods may be called from any goroutine.
type Network struct {
	mu        sync.Mutex // never held while that of a link is taken
	listeners map[uint16][]*listener
	conns     map[uint16]*Conn // dialed ends by source port, until both ends are closed
	lastPort  uint16           // picked
	onConn    func(dialed, accepted *Conn)
}

// New returns a network without listeners.
func New() *Network {
	return &Network{
		listeners: make(map[uint16][]*listener),
		conns:     make(map[uint16]*Conn),
		lastPort:  65535,
	}
}

// Listen listens on "host:port". The host is an IP address or localhost; none, or an
// unspecified address, stands for every host. Port 0 picks a free one. An address in
// use gives syscall.EADDRINUSE in a *net.OpError.
func (n *Network) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	fail := func(addr net.Addr, err error) (net.Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: addr, Err: err}
	}
	addr, err := resolve(ctx, network, address)
	if err != nil {
		return fail(nil, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	port := addr.Port()
	if port == 0 {
		if port, err = n.pickPort(); err != nil {
			return fail(net.TCPAddrFromAddrPort(addr), os.NewSyscallError("bind", err))
		}
		addr = netip.AddrPortFrom(addr.Addr(), port)
	}
	for _, ln := range n.listeners[port] {
		if addr.Addr().IsUnspecified() || ln.serves(addr.Addr()) {
			return fail(net.TCPAddrFromAddrPort(addr), os.NewSyscallError("bind", syscall.EADDRINUSE))
		}
	}
	ln := &listener{n: n, addr: addr, arrived: sync.Cond{L: &n.mu}}
	n.listeners[port] = append(n.listeners[port], ln)
	return ln, nil
}

// Dial connects from 127.0.0.1; see [Network.DialFrom].
func (n *Network) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return n.dial(ctx, loopback, network, address)
}

// DialFrom returns a function that connects from an IP address, each time from a port
// that no other connection has. It returns a *Conn at once, as soon as the listener's
// backlog has room and before Accept. Where nobody listens, or the backlog is full, it
// gives syscall.ECONNREFUSED in a *net.OpError.
func (n *Network) DialFrom(ip string) func(ctx context.Context, network, address string) (net.Conn, error) {
	source, err := netip.ParseAddr(ip)
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		if err != nil {
			return nil, &net.OpError{Op: "dial", Net: network, Err: err}
		}
		return n.dial(ctx, source.Unmap(), network, address)
	}
}

func (n *Network) dial(ctx context.Context, source netip.Addr, network, address string) (net.Conn, error) {
	addr, err := resolve(ctx, network, address)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	if addr.Addr().IsUnspecified() {
		addr = netip.AddrPortFrom(loopback, addr.Port())
	}
	ln, dialed, err := n.connect(source, addr)
	if err != nil {
		err = os.NewSyscallError("connect", err)
		return nil, &net.OpError{Op: "dial", Net: network, Addr: net.TCPAddrFromAddrPort(addr), Err: err}
	}
	n.mu.Lock()
	hook := n.onConn
	n.mu.Unlock()
	if hook != nil {
		hook(dialed, dialed.peer)
	}
	ln.push(dialed.peer)
	return dialed, nil
}

// connect makes a connection and reserves its place in the backlog of the listener.
func (n *Network) connect(source netip.Addr, addr netip.AddrPort) (*listener, *Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	at := slices.IndexFunc(n.listeners[addr.Port()], func(ln *listener) bool { return ln.serves(addr.Addr()) })
	if at < 0 {
		return nil, nil, syscall.ECONNREFUSED
	}
	ln := n.listeners[addr.Port()][at]
	if len(ln.waiting)+ln.coming == backlog {
		return nil, nil, syscall.ECONNREFUSED
	}
	port, err := n.pickPort()
	if err != nil {
		return nil, nil, err
	}
	ln.coming++
	c := newConn(n, netip.AddrPortFrom(source, port), addr)
	n.conns[port] = c
	return ln, c, nil
}

// pickPort returns a port that is nobody's. They are given out in turn, so that one
// just given back is not somebody else's at once.
func (n *Network) pickPort() (uint16, error) {
	for range 65536 - firstPort {
		n.lastPort = max(n.lastPort+1, firstPort)
		if n.conns[n.lastPort] == nil && len(n.listeners[n.lastPort]) == 0 {
			return n.lastPort, nil
		}
	}
	return 0, syscall.EADDRNOTAVAIL
}

// OnConn sets what is called for every new connection, before Dial or Accept return
// an end of it. There is one such hook; nil clears it.
func (n *Network) OnConn(f func(dialed, accepted *Conn)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.onConn = f
}

// Conns returns the dialed ends of the connections of which an end is not closed yet,
// by source port.
func (n *Network) Conns() []*Conn {
	n.mu.Lock()
	defer n.mu.Unlock()
	conns := make([]*Conn, 0, len(n.conns))
	for _, port := range slices.Sorted(maps.Keys(n.conns)) {
		conns = append(conns, n.conns[port])
	}
	return conns
}

// Listeners returns how many listeners are open.
func (n *Network) Listeners() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	open := 0
	for _, lns := range n.listeners {
		open += len(lns)
	}
	return open
}

// forget ends the life of a connection of which both ends are closed.
func (n *Network) forget(port int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.conns, uint16(port))
}

// A listener is guarded by its network's lock.
type listener struct {
	n       *Network
	addr    netip.AddrPort
	arrived sync.Cond
	waiting []*Conn // for Accept
	coming  int     // connections whose hook is running
	closed  bool
}

func (ln *listener) serves(host netip.Addr) bool {
	return ln.addr.Addr().IsUnspecified() || ln.addr.Addr() == host
}

func (ln *listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(ln.addr) }

func (ln *listener) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Addr: ln.Addr(), Err: err}
}

// push hands an end to Accept, or resets it if the listener was closed meanwhile.
func (ln *listener) push(c *Conn) {
	ln.n.mu.Lock()
	ln.coming--
	if ln.closed {
		ln.n.mu.Unlock()
		c.abort()
		return
	}
	ln.waiting = append(ln.waiting, c)
	ln.arrived.Signal()
	ln.n.mu.Unlock()
}

// Accept waits for a connection and returns its *Conn.
func (ln *listener) Accept() (net.Conn, error) {
	ln.n.mu.Lock()
	defer ln.n.mu.Unlock()
	for len(ln.waiting) == 0 && !ln.closed {
		ln.arrived.Wait()
	}
	if ln.closed {
		return nil, ln.opError("accept", net.ErrClosed)
	}
	c := ln.waiting[0]
	ln.waiting = ln.waiting[1:]
	return c, nil
}

// Close frees the address and resets the connections that nobody accepted.
func (ln *listener) Close() error {
	n, port := ln.n, ln.addr.Port()
	n.mu.Lock()
	if ln.closed {
		n.mu.Unlock()
		return ln.opError("close", net.ErrClosed)
	}
	ln.closed = true
	waiting := ln.waiting
	ln.waiting = nil
	n.listeners[port] = slices.DeleteFunc(n.listeners[port], func(other *listener) bool { return other == ln })
	if len(n.listeners[port]) == 0 {
		delete(n.listeners, port)
	}
	ln.arrived.Broadcast()
	n.mu.Unlock()
	for _, c := range waiting {
		c.abort()
	}
	return nil
}

// resolve parses an address; an empty host is the unspecified one. It fails if ctx
// has ended, as whatever needs an address would.
func resolve(ctx context.Context, network, address string) (netip.AddrPort, error) {
	switch network {
	case "tcp", "tcp4", "tcp6":
	default:
		return netip.AddrPort{}, net.UnknownNetworkError(network)
	}
	if err := ctx.Err(); err != nil {
		return netip.AddrPort{}, err
	}
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return netip.AddrPort{}, &net.AddrError{Err: "invalid port", Addr: service}
	}
	ip := wildcard
	switch host {
	case "":
	case "localhost":
		ip = loopback
	default:
		if ip, err = netip.ParseAddr(host); err != nil {
			return netip.AddrPort{}, err
		}
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(port)), nil
}
