package main

import (
	"fmt"
	"net"

	"github.com/tcprelay/relay/internal/wire"
)

// A proxyVersion is one of the PROXY protocol, HAProxy's doc/proxy-protocol.txt.
type proxyVersion int

const (
	proxyUnset proxyVersion = iota
	proxyV1
	proxyV2
	proxyOff
)

func (v *proxyVersion) String() string { return [...]string{"", "v1", "v2", "off"}[*v] }

func (v *proxyVersion) Set(s string) error {
	switch s {
	case "v1":
		*v = proxyV1
	case "v2":
		*v = proxyV2
	case "off":
		*v = proxyOff
	default:
		return fmt.Errorf("%q is no version of the PROXY protocol; there are v1 and v2, and off", s)
	}
	return nil
}

// What stands for a connection whose addresses cannot be told: the target is to go by
// those of the connection that it has.
const (
	unknownV1 = "PROXY UNKNOWN\r\n"
	localV2   = "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"
)

// appendHeader appends the header of a connection that a client made to a public address.
func (v proxyVersion) appendHeader(b []byte, client, public net.Addr) []byte {
	src, dst := wire.AddrPort(client), wire.AddrPort(public)
	known := src.IsValid() && dst.IsValid() && src.Addr().Is4() == dst.Addr().Is4()
	switch {
	case v == proxyV2 && known:
		return wire.AppendProxy(b, client, public)
	case v == proxyV2:
		return append(b, localV2...)
	case !known:
		return append(b, unknownV1...)
	}
	family := 6
	if src.Addr().Is4() {
		family = 4
	}
	return fmt.Appendf(b, "PROXY TCP%d %s %s %d %d\r\n", family, src.Addr(), dst.Addr(), src.Port(), dst.Port())
}
