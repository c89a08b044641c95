package pump

import (
	"errors"
	"sync"
	"syscall"
)

const (
	// pipeSize is what a pipe is asked to hold: what io.Copy's do, and pipe(7) allows
	// anybody.
	pipeSize = 1 << 20
	// sparePipes is how many empty pipes are kept for whoever has bulk next.
	sparePipes = 16
)

var errNoPipe = errors.New("no pipe")

// A pipe is what the kernel splices through. It belongs to the one who has bytes in it.
type pipe struct{ r, w int }

func (p *pipe) close() {
	syscall.Close(p.r)
	syscall.Close(p.w)
}

// pipes are the empty ones. They are closed when the last pump between sockets ends, so
// that none is left without an owner.
var pipes pipeStore

type pipeStore struct {
	mu    sync.Mutex
	pumps int
	empty []*pipe
}

func (s *pipeStore) enter() {
	s.mu.Lock()
	s.pumps++
	s.mu.Unlock()
}

func (s *pipeStore) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pumps--; s.pumps > 0 {
		return
	}
	for _, p := range s.empty {
		p.close()
	}
	s.empty = nil
}

// get returns nil if there are no files left.
func (s *pipeStore) get() *pipe {
	s.mu.Lock()
	if n := len(s.empty); n > 0 {
		p := s.empty[n-1]
		s.empty = s.empty[:n-1]
		s.mu.Unlock()
		return p
	}
	s.mu.Unlock()
	var fds [2]int
	if syscall.Pipe2(fds[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK) != nil {
		return nil
	}
	const setPipeSize = 1031 // fcntl.h: F_SETPIPE_SZ; it is no harm if that is refused
	syscall.Syscall(syscall.SYS_FCNTL, uintptr(fds[0]), setPipeSize, pipeSize)
	return &pipe{fds[0], fds[1]}
}

func (s *pipeStore) put(p *pipe) {
	s.mu.Lock()
	if len(s.empty) < sparePipes {
		s.empty = append(s.empty, p)
		p = nil
	}
	s.mu.Unlock()
	if p != nil {
		p.close()
	}
}
