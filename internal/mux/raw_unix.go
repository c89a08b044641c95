//go:build unix

package mux

import (
	"io"
	"syscall"

	"github.com/tcprelay/relay/internal/socket"
)

// rawWriter writes to a socket without ever waiting for it.
type rawWriter struct {
	rc  syscall.RawConn
	try func(fd uintptr) bool // bound once, so that a write allocates nothing
	p   []byte
	n   int
	err error
}

// newRawWriter returns nil if dst is no plain socket.
func newRawWriter(dst io.Writer) *rawWriter {
	rc := socket.Raw(dst)
	if rc == nil {
		return nil
	}
	w := &rawWriter{rc: rc}
	w.try = func(fd uintptr) bool {
		w.n, w.err = ignoringEINTR(syscall.Write, int(fd), w.p)
		return true
	}
	return w
}

// write writes what the kernel takes of p at once; less than len(p) is no error.
func (w *rawWriter) write(p []byte) (int, error) {
	w.p, w.n, w.err = p, 0, nil
	err := w.rc.Write(w.try)
	w.p = nil
	if err == nil {
		err = w.err
	}
	if err == syscall.EAGAIN {
		err = nil
	}
	return max(w.n, 0), err
}

// rawReader reads from a socket into a chunk that it takes from the pool only
// when there is something to read, so that an idle connection holds none.
type rawReader struct {
	rc   syscall.RawConn
	try  func(fd uintptr) bool
	size int
	c    *chunk
	n    int
	err  error
}

// newRawReader returns nil if r is no plain socket.
func newRawReader(r io.Reader) *rawReader {
	rc := socket.Raw(r)
	if rc == nil {
		return nil
	}
	rd := &rawReader{rc: rc}
	rd.try = func(fd uintptr) bool {
		c := getChunk(headerSize + rd.size)
		rd.n, rd.err = ignoringEINTR(syscall.Read, int(fd), c.buf[headerSize:min(headerSize+rd.size, len(c.buf))])
		if rd.n <= 0 {
			c.release()
			return rd.err != syscall.EAGAIN
		}
		rd.c = c
		return true
	}
	return rd
}

// read waits for bytes and returns a chunk with up to size of them behind the
// room for a header. The chunk is nil when there is an error.
func (rd *rawReader) read(size int) (*chunk, int, error) {
	rd.size, rd.c, rd.n, rd.err = size, nil, 0, nil
	err := rd.rc.Read(rd.try)
	c := rd.c
	rd.c = nil
	switch {
	case c != nil:
		return c, rd.n, nil
	case err != nil:
		return nil, 0, err
	case rd.err != nil:
		return nil, 0, rd.err
	}
	return nil, 0, io.EOF
}

func ignoringEINTR(f func(int, []byte) (int, error), fd int, p []byte) (int, error) {
	for {
		n, err := f(fd, p)
		if err != syscall.EINTR {
			return n, err
		}
	}
}
