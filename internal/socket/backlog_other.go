//go:build !linux && !darwin

package socket

import "net"

// LimitUnsent is for systems that can limit what they take and cannot send yet.
func LimitUnsent(net.Conn, int) {}
