// Package socket asks the system about a TCP connection what reads and writes do not
// tell.
package socket

import "net"

// resetter is a connection that is no socket and knows what WasReset asks.
type resetter interface{ WasReset() bool }

// unwrap returns the connection that c is a layer on.
func unwrap(c net.Conn) net.Conn {
	for {
		layer, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return c
		}
		c = layer.NetConn()
	}
}
