package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// A conn is what clients need of a connection: that of TCP and that of TLS have it.
type conn interface {
	net.Conn
	CloseWrite() error
}

// A link is one connection to the service. It counts the bytes that it has verified.
type link struct {
	conn
	timeout  time.Duration // for each message to go out, and to come back
	sent     payload
	expected payload // the same, as far as it has come back
	out, in  []byte  // buffers
	meter    *shard
}

// direct is the longest message that is sent before its echo is read. The buffers of any
// two sockets hold it, so that sending does not wait for somebody to read. A longer one
// is received while it is sent.
const direct = 16 << 10

// exchange sends the next n bytes and receives them. With last, it half-closes after them
// and expects the other side to do the same.
func (l *link) exchange(n int, last bool) error {
	if n > direct {
		return l.duplex(context.Background(),
			func(context.Context) error { return l.send(n, last) },
			func() error { return l.receive(n, last) })
	}
	if err := l.send(n, last); err != nil {
		return err
	}
	return l.receive(n, last)
}

// duplex runs send and receive at the same time and returns when both have. The error of
// the one that fails first is returned, and ends the other: it ends the context of send,
// and closes the connection. But the system tells a reset once, and if it told send what
// receive has seen is no end, although it looks like one.
func (l *link) duplex(ctx context.Context, send func(context.Context) error, receive func() error) (first error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var mu sync.Mutex
	ended := func(err error) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err == nil:
		case first == nil:
			first = err
			stop()
			l.Close()
		case kindOf(first) == earlyEOF && isAny(err, syscall.ECONNRESET, windowsReset): // behind an end it is EPIPE
			first = err
		}
	}
	var receiver sync.WaitGroup
	receiver.Go(func() { ended(receive()) })
	ended(send(ctx))
	receiver.Wait()
	return first
}

// send sends the next n bytes, and half-closes after the last.
func (l *link) send(n int, last bool) error {
	if err := l.SetWriteDeadline(time.Now().Add(l.timeout)); err != nil {
		return fmt.Errorf("sending: %w", err)
	}
	for n > 0 {
		b := l.out[:min(n, len(l.out))]
		l.sent.read(b)
		if _, err := l.Write(b); err != nil {
			return fmt.Errorf("sending: %w", err)
		}
		n -= len(b)
	}
	if last {
		return l.finish()
	}
	return nil
}

// finish half-closes the connection.
func (l *link) finish() error {
	if err := l.CloseWrite(); err != nil {
		return fmt.Errorf("half-closing: %w", err)
	}
	return nil
}

// receive receives the next n bytes and verifies them, and after the last expects the end.
func (l *link) receive(n int, last bool) error {
	if err := l.SetReadDeadline(time.Now().Add(l.timeout)); err != nil {
		return fmt.Errorf("receiving: %w", err)
	}
	for n > 0 {
		got, err := l.Read(l.in[:min(n, len(l.in))])
		if err := l.expected.check(l.in[:got]); err != nil {
			return err
		}
		l.meter.bytes.Add(int64(got))
		if n -= got; err != nil && n > 0 {
			return fmt.Errorf("receiving byte %d of the connection: %w", l.expected.offset, err)
		}
	}
	if last {
		return l.expectEOF()
	}
	return nil
}

// expectEOF expects the connection to end cleanly, within the time that receive has set.
func (l *link) expectEOF() error {
	n, err := io.ReadFull(l, l.in[:1])
	if n > 0 {
		return &extraByteError{offset: l.expected.offset, got: l.in[0]}
	}
	if err != io.EOF {
		return fmt.Errorf("waiting for the end: %w", err)
	}
	return nil
}

// dialer returns a function that connects to the service.
func dialer(to string, timeout time.Duration, config *tls.Config) func(context.Context) (conn, error) {
	d := net.Dialer{Timeout: timeout}
	if config == nil {
		return func(ctx context.Context) (conn, error) {
			c, err := d.DialContext(ctx, "tcp", to)
			if err != nil {
				return nil, err
			}
			return c.(*net.TCPConn), nil
		}
	}
	return func(ctx context.Context) (conn, error) {
		// The handshake has to be over in that time, too.
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		c, err := (&tls.Dialer{NetDialer: &d, Config: config}).DialContext(ctx, "tcp", to)
		if err != nil {
			return nil, err
		}
		return c.(*tls.Conn), nil
	}
}
