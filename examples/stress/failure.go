package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"unicode"
)

// A kind is what sort of thing went wrong.
type kind int

const (
	connectRefused kind = iota // nobody listens
	connectFailed              // no connection for another reason, such as no route or no files left
	timedOut                   // connecting, sending or receiving took longer than -timeout
	reset                      // the connection was reset while it was used
	earlyEOF                   // it ended before all that was sent had come back
	wrongByte                  // something else came back than was sent
	extraByte                  // more came back than was sent
	otherFailure
	kinds // their number
)

// kindNames are those of the JSON report.
var kindNames = [kinds]string{
	"connect_refused", "connect_failed", "timeout", "reset", "early_eof", "wrong_byte", "extra_byte", "other",
}

func (k kind) String() string { return kindNames[k] }

// A wrongByteError is the first byte of a connection that is not the one that was sent.
type wrongByteError struct {
	offset    uint64 // in all that was sent on the connection
	got, want byte
}

func (e *wrongByteError) Error() string {
	return fmt.Sprintf("byte %d of the connection is %#02x, not %#02x", e.offset, e.got, e.want)
}

// An extraByteError is a byte where the connection should have ended.
type extraByteError struct {
	offset uint64
	got    byte
}

func (e *extraByteError) Error() string {
	return fmt.Sprintf("a byte more, %#02x, than the %d that were sent on the connection", e.got, e.offset)
}

// A connectError is why there is no connection.
type connectError struct{ err error }

func (e *connectError) Error() string { return "connecting: " + e.err.Error() }
func (e *connectError) Unwrap() error { return e.err }

// The numbers that Windows has for what happens to its sockets, which package syscall has
// others for. No other system has such numbers.
const (
	windowsAborted      = syscall.Errno(10053)
	windowsReset        = syscall.Errno(10054)
	windowsNotConnected = syscall.Errno(10057)
	windowsRefused      = syscall.Errno(10061)
)

// kindOf returns what sort of error err is. What was connected and is not is what a reset
// looks like to who half-closes after it.
func kindOf(err error) kind {
	if _, ok := errors.AsType[*wrongByteError](err); ok {
		return wrongByte
	}
	if _, ok := errors.AsType[*extraByteError](err); ok {
		return extraByte
	}
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return timedOut
	}
	if _, ok := errors.AsType[*connectError](err); ok {
		if isAny(err, syscall.ECONNREFUSED, windowsRefused) {
			return connectRefused
		}
		return connectFailed
	}
	if isAny(err, io.EOF, io.ErrUnexpectedEOF) {
		return earlyEOF
	}
	if isAny(err, syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE, syscall.ENOTCONN,
		windowsAborted, windowsReset, windowsNotConnected) {
		return reset
	}
	return otherFailure
}

func isAny(err error, targets ...error) bool {
	for _, target := range targets {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// printable returns s with a replacement for what a terminal might obey: an address or an
// error may have come from elsewhere.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}
