package socket

import (
	"net"
	"syscall"
)

// Raw returns the raw access to v if it is a TCP or Unix stream socket of the net
// package itself, and nil otherwise. A type that embeds one may do more in its Read and
// Write than the socket does, so nothing else counts.
func Raw(v any) syscall.RawConn {
	var c syscall.Conn
	switch v := v.(type) {
	case *net.TCPConn:
		c = v
	case *net.UnixConn:
		if v.LocalAddr().Network() != "unix" {
			return nil
		}
		c = v
	default:
		return nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}
