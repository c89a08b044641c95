package pump

import (
	"errors"
	"math"
	"sync"
	"syscall"

	"github.com/tcprelay/relay/internal/nofile"
)

const (
	// pipeSize is what a pipe is asked to hold: what io.Copy's do, and pipe(7) allows
	// anybody.
	pipeSize = 1 << 20
	// sparePipes is how many empty pipes are kept for whoever has bulk next.
	sparePipes = 16
)

// maxPipes bounds the pipes, which a destination that takes nothing holds on to, to a
// tenth of the process's files. Who gets none copies.
var maxPipes = sync.OnceValue(func() int {
	if files := nofile.Limit(); files > 0 {
		return max(files/20, sparePipes)
	}
	return math.MaxInt
})

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
	pipes int // that there are
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
	s.pipes -= len(s.empty)
	s.empty = nil
}

// get returns nil if there are no files left for it.
func (s *pipeStore) get() *pipe {
	s.mu.Lock()
	if n := len(s.empty); n > 0 {
		p := s.empty[n-1]
		s.empty = s.empty[:n-1]
		s.mu.Unlock()
		return p
	}
	full := s.pipes >= maxPipes()
	if !full {
		s.pipes++
	}
	s.mu.Unlock()
	var fds [2]int
	if full {
		return nil
	}
	if syscall.Pipe2(fds[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK) != nil {
		s.mu.Lock()
		s.pipes--
		s.mu.Unlock()
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
		s.discard(p)
	}
}

// discard closes a pipe, which may hold something.
func (s *pipeStore) discard(p *pipe) {
	p.close()
	s.mu.Lock()
	s.pipes--
	s.mu.Unlock()
}
