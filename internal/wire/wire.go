// Package wire holds what a relay and a service say to each other above muxado:
// JSON lines on the control stream, which is the first stream of a session and is
// opened by the service, and a PROXY protocol header at the start of each client's
// stream.
//
// The control stream carries the service's Hello in its opening frame, the relay's
// Reply, and then Control messages both ways for the life of the session. Fields
// and control messages that a version does not know are ignored, so that versions
// can meet.
package wire

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
)

const (
	// Version is the version of the protocol that this package speaks.
	Version = 1

	// MaxLine is the length of the longest line, its newline included.
	MaxLine = 16 << 10
)

// Hello is the first line of a service.
type Hello struct {
	Version  int      `json:"version"`
	Name     string   `json:"name,omitempty"`
	Port     int      `json:"port,omitempty"`
	Hostname string   `json:"hostname,omitempty"` // instead of a port of its own
	Token    string   `json:"token,omitempty"`
	Lease    string   `json:"lease,omitempty"`
	Shared   bool     `json:"shared,omitempty"`
	Features []string `json:"features,omitempty"`
	// HeartbeatMS is how often the service wants to hear something, in milliseconds;
	// 0 if it does not say. So is a Reply's.
	HeartbeatMS int `json:"heartbeat_ms,omitempty"`
	// Spares is how many dedicated connections a service with that feature wants to have
	// ready.
	Spares int `json:"spares,omitempty"`
}

// Dedicated is the feature of a service that opens a connection for each client when it
// is asked to. A relay need not ask.
const Dedicated = "dedicated"

// Reply is the first line of a relay. It holds either Address or Error.
type Reply struct {
	Version int    `json:"version"`
	Address string `json:"address,omitempty"`
	// Lease, shown in the hello of a later session, brings the same address. It is a
	// secret. Empty: the address goes with the session.
	Lease       string `json:"lease,omitempty"`
	HeartbeatMS int    `json:"heartbeat_ms,omitempty"`
	Error       *Error `json:"error,omitempty"`
}

// Error is why a relay refused a service.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message,omitempty"`
}

// The codes of Error.
const (
	CodeMalformed       = "malformed"        // the hello is too long, not JSON, or has bad values
	CodeVersion         = "version"          // the relay does not speak the hello's version
	CodePortUnavailable = "port_unavailable" // out of the relay's range, or in use
	CodeHostUnavailable = "host_unavailable" // not a hostname, or the relay serves none
	CodeNameTaken       = "name_taken"
	CodeServerFull      = "server_full"  // no port is left, or the limit of services reached
	CodeClosing         = "closing"      // the relay is going away
	CodeUnauthorized    = "unauthorized" // the credential does not do
	CodeUnavailable     = "unavailable"  // whether it does cannot be told now
	CodeDisconnected    = "disconnected" // of End: by the relay's operator
	CodeSuperseded      = "superseded"   // of End: a newer session has shown the lease
)

// Control is every later line.
type Control struct {
	Type  string `json:"type"`
	ID    int64  `json:"id,omitempty"`    // of a ping, which its pong repeats
	Error *Error `json:"error,omitempty"` // of an end: why

	// Secrets are of the connections that an open asks for, one each, and of those that
	// an unopened says there will be none for.
	Secrets []Secret `json:"secrets,omitempty"`
}

// The types of Control.
const (
	Ping   = "ping"
	Pong   = "pong"
	Drain  = "drain"  // relay: this session gets no more clients; open another one
	Close  = "close"  // service: it wants no more clients
	Closed = "closed" // relay, to that: there come no more
	End    = "end"    // relay: the session ends now, for a reason that stands

	Open     = "open"     // relay: open dedicated connections
	Unopened = "unopened" // service, to that: they could not be opened, or were not taken
)

// MaxSecrets is how many secrets fit a line.
const MaxSecrets = 256

// Errors of Reader.
var (
	ErrTooLong = errors.New("line too long")
	ErrCut     = errors.New("line without an end")
)

// A SyntaxError says that a line is not the JSON it should be.
type SyntaxError struct{ Err error }

func (e *SyntaxError) Error() string { return "line is not the JSON expected: " + e.Err.Error() }
func (e *SyntaxError) Unwrap() error { return e.Err }

// A Reader reads the lines of a control stream.
type Reader struct {
	r     *bufio.Reader
	limit int
}

// NewReader returns a Reader of r.
func NewReader(r io.Reader) *Reader { return &Reader{bufio.NewReaderSize(r, MaxLine), MaxLine} }

// Limit has lines longer than n bytes be too long from now on; n is MaxLine at most,
// and that at the start.
func (r *Reader) Limit(n int) { r.limit = n }

// Read reads the next line into v, a pointer to a Hello, Reply or Control. At a
// clean end before a line it returns io.EOF.
func (r *Reader) Read(v any) error {
	line, err := r.r.ReadSlice('\n')
	switch {
	case err == bufio.ErrBufferFull, len(line) > r.limit:
		return ErrTooLong
	case err == io.EOF && len(line) > 0:
		return ErrCut
	case err != nil:
		return err
	}
	if err := json.Unmarshal(line, v); err != nil {
		return &SyntaxError{err}
	}
	return nil
}

// Line returns v as a line.
func Line(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	if b = append(b, '\n'); len(b) > MaxLine {
		return nil, ErrTooLong
	}
	return b, nil
}
