package splice

import (
	"io"
	"math"
	"os"
	"sync"
	"syscall"

	"github.com/tcprelay/relay/internal/nofile"
	"github.com/tcprelay/relay/internal/nonblock"
)

const (
	// Size is what a pipe is asked to hold, as those of io.Copy are, and enough is what it
	// has to: beyond some pages in all, of which pipe(7) tells, the system gives users but
	// two for a pipe.
	Size   = 1 << 20
	enough = 256 << 10
	// spares is how many empty pipes are kept for whoever has bulk next.
	spares = 16
)

// most bounds the pipes, which a destination that takes nothing holds on to, to a
// tenth of the process's files.
var most = sync.OnceValue(func() int {
	if files := nofile.Limit(); files > 0 {
		return max(files/20, spares)
	}
	return math.MaxInt
})

// A Pipe is what the kernel splices through. It belongs to the one who has bytes in it.
type Pipe struct {
	r, w uintptr
	held int
}

// Held returns how many bytes are in the pipe.
func (p *Pipe) Held() int { return p.held }

// Fill moves up to n bytes from a socket into the pipe, of those that are there. EAGAIN
// says that none are, and no bytes without an error that there will be none.
func (p *Pipe) Fill(socket uintptr, n int) (int, error) {
	n, err := splice(socket, p.w, n)
	p.held += n
	return n, err
}

// Drain moves what is in the pipe to a socket, as far as that takes it now. Less than all
// is no error.
func (p *Pipe) Drain(socket uintptr) (n int, err error) {
	for p.held > 0 {
		m, err := splice(p.r, socket, p.held)
		if m == 0 && err == nil {
			err = io.ErrUnexpectedEOF // of a pipe that holds something
		}
		n += m
		p.held -= m
		if err == syscall.EAGAIN {
			break
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// SendMore writes b to a socket, as far as that takes it now, for a Drain to follow: what
// is little leaves together with what that moves.
func SendMore(socket uintptr, b []byte) (int, error) {
	n, err := nonblock.SendMore(socket, b)
	return n, wrap("send", err)
}

// Read copies out of the pipe, which must hold something.
func (p *Pipe) Read(b []byte) (int, error) {
	n, err := syscall.Read(int(p.r), b)
	n = max(n, 0)
	p.held -= n
	return n, wrap("read", err)
}

func splice(from, to uintptr, n int) (int, error) {
	n, err := nonblock.Splice(from, to, n)
	return n, wrap("splice", err)
}

// wrap leaves nil and EAGAIN as they are.
func wrap(call string, err error) error {
	if err == syscall.EAGAIN {
		return err
	}
	return os.NewSyscallError(call, err)
}

// store has the empty pipes. They are closed when the last user leaves, so that none is
// left without an owner.
var store struct {
	mu    sync.Mutex
	users int
	pipes int // that there are
	empty []*Pipe
}

// Enter says that somebody may want pipes, until Leave.
func Enter() {
	store.mu.Lock()
	store.users++
	store.mu.Unlock()
}

// Leave takes an Enter back. Pipes may be put back after it.
func Leave() {
	store.mu.Lock()
	defer store.mu.Unlock()
	if store.users--; store.users > 0 {
		return
	}
	for _, p := range store.empty {
		p.close()
	}
	store.pipes -= len(store.empty)
	store.empty = nil
}

// Get returns an empty pipe, or nil if there are no files left for it.
func Get() *Pipe {
	store.mu.Lock()
	if n := len(store.empty); n > 0 {
		p := store.empty[n-1]
		store.empty = store.empty[:n-1]
		store.mu.Unlock()
		return p
	}
	full := store.pipes >= most()
	if !full {
		store.pipes++
	}
	store.mu.Unlock()
	if full {
		return nil
	}
	var fds [2]int
	if syscall.Pipe2(fds[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK) != nil {
		store.mu.Lock()
		store.pipes--
		store.mu.Unlock()
		return nil
	}
	p := &Pipe{r: uintptr(fds[0]), w: uintptr(fds[1])}
	if !p.resize(Size) && !p.resize(enough) {
		store.mu.Lock()
		defer store.mu.Unlock()
		p.dropLocked()
		return nil
	}
	return p
}

// resize reports whether the pipe may hold n bytes.
func (p *Pipe) resize(n uintptr) bool {
	const setPipeSize = 1031 // fcntl.h: F_SETPIPE_SZ
	_, _, errno := syscall.Syscall(syscall.SYS_FCNTL, p.r, setPipeSize, n)
	return errno == 0
}

// Put gives the pipe back. What it holds is dropped.
func (p *Pipe) Put() {
	store.mu.Lock()
	defer store.mu.Unlock()
	if p.held == 0 && store.users > 0 && len(store.empty) < spares {
		store.empty = append(store.empty, p)
		return
	}
	p.dropLocked()
}

func (p *Pipe) dropLocked() {
	store.pipes--
	p.close()
}

func (p *Pipe) close() {
	syscall.Close(int(p.r))
	syscall.Close(int(p.w))
}
