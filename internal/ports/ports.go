// Package ports keeps the book of the public ports that a relay gives out.
package ports

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"syscall"
)

// Errors of Listen, wrapped.
var (
	ErrRange = errors.New("port outside the relay's range")
	ErrInUse = errors.New("port in use")
	ErrFull  = errors.New("no port of the relay's range is free")
)

// A Pool gives out the ports from First to Last, both included. The zero Pool gives
// out any port. It may be used from several goroutines.
type Pool struct {
	First, Last int

	mu   sync.Mutex
	next int // offset in the range where the next search starts
}

// Listen listens on the wanted port of host, or on the next free one of the range
// if want is 0. Ports are given out in turn, so that one that was just given back
// is not somebody else's at once.
func (p *Pool) Listen(host string, want int) (net.Listener, error) {
	switch {
	case want == 0 && p.First == 0:
		return listen(host, 0)
	case want != 0:
		if want < 1 || want > 65535 || p.First != 0 && (want < p.First || want > p.Last) {
			return nil, fmt.Errorf("port %d: %w", want, ErrRange)
		}
		return listen(host, want)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.Last - p.First + 1
	var other error // of a port that cannot be had for another reason
	for i := range n {
		at := (p.next + i) % n
		ln, err := listen(host, p.First+at)
		if err == nil {
			p.next = (at + 1) % n
			return ln, nil
		}
		if !errors.Is(err, ErrInUse) && other == nil {
			other = err
		}
	}
	if other != nil {
		return nil, other
	}
	return nil, fmt.Errorf("ports %d to %d: %w", p.First, p.Last, ErrFull)
}

func listen(host string, port int) (net.Listener, error) {
	ln, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, wsaEADDRINUSE) {
		err = fmt.Errorf("%w: %w", ErrInUse, err)
	}
	return ln, err
}

// wsaEADDRINUSE is what Windows says, whose syscall.EADDRINUSE is an invention of the
// syscall package.
const wsaEADDRINUSE = syscall.Errno(10048)
