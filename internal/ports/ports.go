// Package ports keeps the book of the public ports that a relay gives out.
package ports

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync/atomic"
	"syscall"

	"github.com/tcprelay/relay/internal/socket"
)

// Errors of Pool.Listen, wrapped.
var (
	ErrRange = errors.New("port out of range")
	ErrInUse = errors.New("port in use")
	ErrFull  = errors.New("no port of the range is free")
)

// Listen listens on an address, as net.ListenConfig.Listen does. If the port is in
// use, its error wraps syscall.EADDRINUSE.
type Listen func(ctx context.Context, network, address string) (net.Listener, error)

// A Pool gives out the ports from First to Last, both included. The zero Pool gives
// out any port. It may be used from several goroutines; its fields are set before.
type Pool struct {
	First, Last int

	// ListenFunc is what listens. Nil means a net.ListenConfig. It may be called from
	// several goroutines at once, for the same port too.
	ListenFunc Listen

	tried atomic.Uint64 // ports that searches have tried: where the next one starts
}

const maxPort = 65535

// Listen listens on the wanted port of host, or on a free one if want is 0. Of the
// pool's ports it takes only those from first to last; 0 and 0 mean all of them. If
// neither the pool nor the caller names a range, the system chooses the free one.
//
// Free ports are given out in turn, so that one that was just given back is not
// somebody else's at once. The search ends with ctx, with its cause.
func (p *Pool) Listen(ctx context.Context, host string, want, first, last int) (net.Listener, error) {
	lo, hi := 1, maxPort
	if p.First != 0 {
		lo, hi = max(lo, p.First), min(hi, p.Last)
	}
	narrowed := first != 0 || last != 0
	if narrowed {
		lo, hi = max(lo, first), min(hi, last)
	}
	switch {
	case want != 0 && (want < lo || want > hi):
		return nil, fmt.Errorf("port %d: %w", want, ErrRange)
	case lo > hi:
		return nil, fmt.Errorf("ports %d to %d: %w", first, last, ErrRange)
	case want == 0 && (p.First != 0 || narrowed):
		return p.search(ctx, host, lo, hi)
	}
	return p.listen(ctx, host, want) // 0: any
}

// search listens on the next free port from lo to hi.
func (p *Pool) search(ctx context.Context, host string, lo, hi int) (net.Listener, error) {
	n := uint64(hi - lo + 1)
	var start uint64
	var other error // of a port that cannot be had for another reason
	for i := range n {
		// Every port counts when it is tried: who comes meanwhile starts behind it.
		if turn := p.tried.Add(1) - 1; i == 0 {
			start = turn
		}
		ln, err := p.listen(ctx, host, lo+int((start+i)%n))
		if err == nil {
			return ln, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !errors.Is(err, ErrInUse) && other == nil {
			other = err
		}
	}
	if other != nil {
		return nil, other
	}
	return nil, fmt.Errorf("ports %d to %d: %w", lo, hi, ErrFull)
}

func (p *Pool) listen(ctx context.Context, host string, port int) (net.Listener, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	listen := p.ListenFunc
	if listen == nil {
		listen = socket.Listen
	}
	ln, err := listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, wsaEADDRINUSE) {
			err = fmt.Errorf("%w: %w", ErrInUse, err)
		}
		return nil, err
	}
	return ln, nil
}

// wsaEADDRINUSE is what Windows says, whose syscall.EADDRINUSE is an invention of the
// syscall package.
const wsaEADDRINUSE = syscall.Errno(10048)
