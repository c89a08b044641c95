// Package mux carries many streams over one connection, in muxado's wire
// protocol.
//
// A [Session] sits on any [net.Conn], the transport. Either end opens
// [Stream]s, each a complete net.Conn with half-close, deadlines and flow
// control of its own. The frames are those of github.com/inconshreveable/muxado
// and its frame package is the codec, so a program that knows only muxado can
// be the peer; session and streams are this package's own.
//
// # Goroutines
//
// A session has two: the reader (run by [Session.readFrames]) parses frames and
// hands their bytes, and their ends, to streams and sinks, and the flusher
// ([writer.run]) writes what the transport did not take at once. Both end when the
// session ends, and [Session.Close] returns after they are gone. Streams have none.
//
// # Locks
//
// Session.mu guards the table of streams, Stream.mu one stream, writer.mu the
// queue of frames to send. They are taken in the order Session.mu, writer.mu or
// Stream.mu, writer.mu; Session.mu and Stream.mu are never held together. No
// lock is held while the transport is read or written.
//
// # The way of bulk
//
// Bytes are copied as little as the two ends allow. Between two sockets of the system,
// which is what a relay has, bulk does not come into this process: it goes through a pipe
// from the client's socket to the session's, behind a header of ours (Stream.ReadFrom,
// rawReader, writer.writePiped), and from the session's to the client's (input.pass, sink).
// What an app reads is read from the transport straight into the room of a Read that waits
// (offer), and what it writes leaves from where it stands (writer.sendDirect). All else, and
// all bulk where the transport is no plain socket, comes and goes in chunks.
//
// # What the protocol leaves open
//
// Muxado has no way to say "I shall read nothing more" short of a reset, which
// a stock peer takes for the loss of everything unread. Between two ends of this
// package ([Session.EnableStop]) an RST with code StreamClosed that follows a
// FIN says just that: what came before the FIN stands and ends in a clean EOF,
// and the sender of the other direction gets an error.
//
// Nor does it say what became of the bytes of a stream that is reset. This package
// sends the codes StreamRefused and AcceptQueueFull only for streams that nobody has
// read from or written to, so a peer that kept what it sent ([Stream.Keep]) may give
// it to somebody else.
package mux

import (
	"errors"
	"fmt"
	"io"
	"syscall"
)

// Window is the number of bytes each side may send on a new stream before the
// other has given window back. Muxado does not negotiate it: both ends must
// hold the same figure, and 256 KiB is that of stock muxado.
const Window = 256 << 10

// Config holds a session's limits. The zero value means the defaults; a zero or
// negative field means its default.
type Config struct {
	// Head is what was read from the connection before it became the session's, and
	// comes first. At most 16 KiB.
	Head []byte
	// Backlog is how many streams that the peer opened may wait for Accept.
	// One more is reset with AcceptQueueFull. Default 128.
	Backlog int
	// Accept, if not nil, is where the streams that the peer opens wait, in place of a
	// queue of the session's own; Backlog does not count then, but the capacity, which
	// must not be 0. Sessions may share it, at once or one after the other. What a
	// session has put there stays when it ends, and reads as ended.
	Accept chan *Stream
	// MaxStreams bounds the streams alive at once, of both ends together.
	// One more of the peer's is reset with StreamRefused; one more of ours makes
	// Open return ErrTooManyStreams. Default 65,536.
	MaxStreams int
	// MaxOpens is how many streams this end may open in the life of the session. One
	// more makes Open return ErrStreamsExhausted. Default, and most, all ids that the
	// protocol has for one end: 2^30 - 1.
	MaxOpens int
	// MaxWindow is how far the receive window of a stream may grow, in bytes,
	// when the sender is seen to wait for it. Default 40 MiB, which is what is under way
	// at 1 Gbit/s and 300 ms; never below Window.
	MaxWindow int
	// MaxUnread bounds the bytes received and not yet read, over all streams.
	// When they exceed it, a stream whose reader has stood still is reset with
	// EnhanceYourCalm. Default 256 MiB.
	MaxUnread int
}

func (c *Config) setDefaults() {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&c.Backlog, 128)
	def(&c.MaxStreams, 1<<16)
	def(&c.MaxOpens, maxOpens)
	def(&c.MaxWindow, 40<<20)
	def(&c.MaxUnread, 256<<20)
	c.MaxOpens = min(c.MaxOpens, maxOpens)
	c.MaxWindow = max(c.MaxWindow, Window)
}

// Code says why a stream was reset or a session ended. The numbers are those of
// muxado's errors.go.
type Code uint32

const (
	NoError          Code = 0
	ProtocolError    Code = 1
	InternalError    Code = 2
	FlowControlError Code = 3
	StreamClosed     Code = 4
	StreamRefused    Code = 5
	StreamCancelled  Code = 6
	StreamReset      Code = 7
	FrameSizeError   Code = 8
	AcceptQueueFull  Code = 9
	EnhanceYourCalm  Code = 10
)

var codeNames = [...]string{
	"no error", "protocol error", "internal error", "flow control error",
	"stream closed", "stream refused", "stream cancelled", "stream reset",
	"frame size error", "accept queue full", "enhance your calm",
}

func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return fmt.Sprintf("code %d", uint32(c))
}

// Errors of Session.Open.
var (
	ErrTooManyStreams   = errors.New("mux: too many streams")
	ErrStreamsExhausted = errors.New("mux: stream ids used up")
	ErrGoneAway         = errors.New("mux: the peer takes no more streams")
	ErrCongested        = errors.New("mux: the transport takes nothing")
)

// ErrTLS is in the error of a session whose peer began with a TLS record where the
// transport should have carried frames: one of the two sides has TLS and the other
// has not.
var ErrTLS = errors.New("the peer speaks TLS")

// StreamError is what the calls of a stream return after it was reset.
// It matches syscall.ECONNRESET, as a reset TCP connection's error does.
type StreamError struct {
	Code   Code
	Remote bool // the peer reset it
}

func (e *StreamError) Error() string {
	if e.Remote {
		return "stream reset by peer: " + e.Code.String()
	}
	return "stream reset: " + e.Code.String()
}

// Is reports that e is a connection reset.
func (e *StreamError) Is(target error) bool { return target == syscall.ECONNRESET }

// SessionError is why a session ended, and what the calls of its streams return
// from then on.
type SessionError struct {
	Code   Code
	Remote bool // the peer said so
	Err    error
}

func (e *SessionError) Error() string {
	who := ""
	if e.Remote {
		who = " by peer"
	}
	if e.Code == NoError {
		return fmt.Sprintf("session ended%s: %v", who, e.Err)
	}
	return fmt.Sprintf("session ended%s: %v: %v", who, e.Code, e.Err)
}

func (e *SessionError) Unwrap() error { return e.Err }

// errTransportEOF stands for the end of the transport. It is not io.EOF, so that
// no stream's reader takes the loss of a session for the end of its bytes.
var errTransportEOF error = transportEOF{}

type transportEOF struct{}

func (transportEOF) Error() string { return "the peer closed the connection" }
func (transportEOF) Unwrap() error { return io.ErrUnexpectedEOF }

var errWindow = errors.New("window exceeded")

func protocolError(format string, args ...any) error {
	return &SessionError{Code: ProtocolError, Err: fmt.Errorf(format, args...)}
}
