package greeting

import (
	"crypto/tls"
	"errors"
	"net"
	"time"
)

const recordHandshake = 22 // the type of a TLS record that begins a handshake

var errSeen = errors.New("the ClientHello was seen")

// serverName returns the name in the ClientHello that rec reads. It is package tls that
// reads it, as the beginning of a handshake of which nothing is answered.
func serverName(rec *recorder) (name string, err error) {
	seen := false
	conn := &deaf{rec: rec}
	err = tls.Server(conn, &tls.Config{
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			name, seen = hello.ServerName, true
			return nil, errSeen
		},
	}).Handshake()
	switch {
	case seen:
		return name, nil
	case conn.err != nil:
		return "", conn.err
	}
	return "", errors.Join(ErrMalformed, err)
}

// A deaf is a connection of which reads are recorded and writes are dropped.
type deaf struct {
	rec *recorder
	at  int
	err error // that a Read has returned
}

func (d *deaf) Read(p []byte) (int, error) {
	if d.at == len(d.rec.buf) {
		if d.err = d.rec.fill(); d.err != nil {
			return 0, d.err
		}
	}
	n := copy(p, d.rec.buf[d.at:])
	d.at += n
	return n, nil
}

func (d *deaf) Write(p []byte) (int, error)      { return len(p), nil }
func (d *deaf) Close() error                     { return nil }
func (d *deaf) LocalAddr() net.Addr              { return nil }
func (d *deaf) RemoteAddr() net.Addr             { return nil }
func (d *deaf) SetDeadline(time.Time) error      { return nil }
func (d *deaf) SetReadDeadline(time.Time) error  { return nil }
func (d *deaf) SetWriteDeadline(time.Time) error { return nil }
