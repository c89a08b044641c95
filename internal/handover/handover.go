// Package handover passes open files, above all listening sockets, and a description of them from one process to its
// successor over a Unix stream socket. The successor gets the same sockets, not new ones on the same address: a
// connection that waits in the kernel's queue is not lost when the first process closes its own descriptors.
//
// The process that has the files calls [Send]. The successor calls [Receive], takes up its work and calls [Done], which
// lets Send return:
//
//	err := handover.Send(conn, state, files)
//
//	files, err := handover.Receive(conn, &state)
//	...
//	err = handover.Done(conn, nil)
//
// Each function waits as long as the deadlines of the connection let it: a caller that wants a limit calls
// conn.SetDeadline before. None reads a byte beyond its own message, so the connection may carry other data before and
// after. After an error its position in the stream is unknown: all that is left is to call Done with the error, which
// only the successor can, and to close the connection.
//
// Who may connect to the socket is the caller's business, by the mode of its directory. Whoever can gets the files.
package handover

import (
	"fmt"
	"net"
	"os"
)

const (
	maxState = 64 << 20 // bytes of JSON
	maxFiles = 1 << 20
)

// Send passes state, as JSON of at most 64 MiB, and the files in their order, at most 1<<20, to the process at the other
// end of conn, and returns when that has called [Done]: nil if it took them, else an error with its reason.
//
// After another error, say a deadline that passed, the other process may still have received the files: only its Done
// tells. The files stay the caller's, before and after: it closes them.
func Send(conn *net.UnixConn, state any, files []*os.File) error {
	if err := send(conn, state, files); err != nil {
		return fmt.Errorf("handover: send: %w", err)
	}
	return nil
}

// Receive takes what [Send] at the other end of conn sends: it decodes the JSON into state, a pointer, and returns the
// files in the sender's order. They are the caller's to close, and a process that it starts does not inherit them. (On
// macOS, FreeBSD, Solaris and AIX one started by another goroutine in the moment of their arrival may.) The caller then
// owes the sender a call of [Done].
//
// On an error no file is left open; what is in state then is not defined. An error says so if this process cannot open
// as many files as were sent.
func Receive(conn *net.UnixConn, state any) (files []*os.File, err error) {
	files, err = receive(conn, state, maxFiles)
	if err != nil {
		return nil, fmt.Errorf("handover: receive: %w", err)
	}
	return files, nil
}

// Done tells the sender that this process has taken over what it received, or, with an error, that it has not. The
// sender gets the first 1024 bytes of the error's text.
func Done(conn *net.UnixConn, err error) error {
	if err := done(conn, err); err != nil {
		return fmt.Errorf("handover: done: %w", err)
	}
	return nil
}
