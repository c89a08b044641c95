package wire

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
)

// The header is version 2 of the PROXY protocol, as in HAProxy's
// doc/proxy-protocol.txt, section 2.2: a signature, a byte each for version and
// command and for family and protocol, the length of what follows, and addresses.
const (
	proxySignature = "\r\n\r\n\x00\r\nQUIT\n"
	proxyFixed     = len(proxySignature) + 4

	proxyLocal = 0x20 // version 2, LOCAL: the addresses say nothing
	proxyProxy = 0x21 // version 2, PROXY

	proxyUnspec = 0x00
	proxyTCP4   = 0x11
	proxyTCP6   = 0x21

	// MaxProxyHeader is the longest header that ParseProxy takes, room for
	// extensions included.
	MaxProxyHeader = 1 << 10
)

// Errors of ParseProxy.
var (
	ErrNotProxy   = errors.New("not a PROXY protocol v2 header")
	ErrProxyShort = errors.New("PROXY header is incomplete")
)

// AppendProxy appends the header of a connection from src to dst, the public
// address it came in at. Addresses that are not of TCP are said to be unknown.
func AppendProxy(b []byte, src, dst net.Addr) []byte {
	b = append(b, proxySignature...)
	s, d := AddrPort(src), AddrPort(dst)
	switch {
	case !s.IsValid() || !d.IsValid():
		return append(b, proxyProxy, proxyUnspec, 0, 0)
	case s.Addr().Is4() && d.Addr().Is4():
		b = append(b, proxyProxy, proxyTCP4, 0, 12)
		b = append(b, s.Addr().AsSlice()...)
		b = append(b, d.Addr().AsSlice()...)
	default:
		b = append(b, proxyProxy, proxyTCP6, 0, 36)
		s16, d16 := s.Addr().As16(), d.Addr().As16()
		b = append(b, s16[:]...)
		b = append(b, d16[:]...)
	}
	b = binary.BigEndian.AppendUint16(b, s.Port())
	return binary.BigEndian.AppendUint16(b, d.Port())
}

// AddrPort returns an address of TCP, without a zone, which means nothing elsewhere, and the
// zero value for what is none.
func AddrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// ParseProxy reads the header at the start of b and returns its length. The
// addresses are nil when they are unknown.
func ParseProxy(b []byte) (n int, src, dst *net.TCPAddr, err error) {
	if k := min(len(b), len(proxySignature)); string(b[:k]) != proxySignature[:k] {
		return 0, nil, nil, ErrNotProxy
	}
	if len(b) < proxyFixed {
		return 0, nil, nil, ErrProxyShort
	}
	command, family := b[len(proxySignature)], b[len(proxySignature)+1]
	size := int(binary.BigEndian.Uint16(b[proxyFixed-2:]))
	n = proxyFixed + size
	if command != proxyProxy && command != proxyLocal || n > MaxProxyHeader {
		return 0, nil, nil, ErrNotProxy
	}
	if len(b) < n {
		return 0, nil, nil, ErrProxyShort
	}
	if command == proxyLocal {
		return n, nil, nil, nil
	}
	width := 0
	switch family {
	case proxyTCP4:
		width = 4
	case proxyTCP6:
		width = 16
	case proxyUnspec:
		return n, nil, nil, nil
	default: // UDP or a Unix socket: not what this relay carries
		return 0, nil, nil, ErrNotProxy
	}
	body := b[proxyFixed:n] // extensions may follow the addresses
	if len(body) < 2*width+4 {
		return 0, nil, nil, ErrNotProxy
	}
	ports := body[2*width:]
	src = tcpAddr(body[:width], ports)
	dst = tcpAddr(body[width:2*width], ports[2:])
	return n, src, dst, nil
}

func tcpAddr(ip, port []byte) *net.TCPAddr {
	a, _ := netip.AddrFromSlice(ip)
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(a.Unmap(), binary.BigEndian.Uint16(port)))
}
