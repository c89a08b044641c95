// Package greeting finds out which host a client wants to reach from what it says first,
// by TLS or HTTP, without taking any of it away, and has the answers for one who cannot
// be served.
package greeting

import (
	"errors"
	"io"
	"strings"
)

// A Kind is what a client speaks.
type Kind int

const (
	None  Kind = iota // nothing known
	TLS               // any version; the host is that of its server_name extension (RFC 6066, section 3)
	HTTP              // 1.0 or 1.1 in clear; the host is that of the request's target or Host field (RFC 9112, section 3.3)
	HTTP2             // in clear and without a request before; its first frames name the host, which are not read
)

// Errors of Read. Errors of the reader are returned as they are.
var (
	ErrTooLong   = errors.New("greeting too long")
	ErrMalformed = errors.New("greeting malformed")
)

// A Greeting is what a client said first.
type Greeting struct {
	Kind Kind
	Host string // in lower case, without port or final dot; empty if it names none
	Head []byte // all that was read
	head bool   // the request wants no body in its answer
}

// Read reads from r until it knows the host, limit bytes at most. With an error it
// returns what is known, for an Answer. How long it takes is up to r.
func Read(r io.Reader, limit int) (Greeting, error) {
	rec := &recorder{r: r, limit: limit}
	var g Greeting
	err := rec.fill()
	if err == nil {
		switch {
		case rec.buf[0] == recordHandshake:
			g.Kind = TLS
			g.Host, err = serverName(rec)
		case 'A' <= rec.buf[0] && rec.buf[0] <= 'Z':
			err = g.readRequest(rec)
		default:
			err = ErrMalformed
		}
	}
	g.Head = rec.buf
	g.Host = strings.ToLower(strings.TrimSuffix(g.Host, "."))
	return g, err
}

// A recorder keeps what it reads.
type recorder struct {
	r     io.Reader
	limit int
	buf   []byte
	err   error // the first, which stands
}

const firstRead = 2 << 10 // which a greeting usually fits

// fill reads at least a byte more.
func (rec *recorder) fill() error {
	if rec.err == nil && len(rec.buf) >= rec.limit {
		rec.err = ErrTooLong
	}
	if rec.err != nil {
		return rec.err
	}
	if len(rec.buf) == cap(rec.buf) {
		bigger := make([]byte, len(rec.buf), min(max(2*cap(rec.buf), firstRead), rec.limit))
		copy(bigger, rec.buf)
		rec.buf = bigger
	}
	n, err := 0, error(nil)
	for range 100 {
		if n, err = rec.r.Read(rec.buf[len(rec.buf):cap(rec.buf)]); n > 0 || err != nil {
			break
		}
	}
	if n == 0 && err == nil {
		err = io.ErrNoProgress
	}
	rec.buf = rec.buf[:len(rec.buf)+n]
	rec.err = err
	if n > 0 {
		return nil // the error comes again
	}
	return err
}
