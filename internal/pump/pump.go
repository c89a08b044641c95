// Package pump carries bytes one way from a connection to another, at no cost while
// there are none: an idle pump holds no buffer and no pipe. Between two sockets of a
// system that can splice, bulk does not pass through this process's memory.
package pump

import (
	"io"
	"sync"
	"sync/atomic"
)

const (
	// waitSize is how much a connection that is no socket is waited for with, which
	// takes a buffer; bulkSize is that of all other copying, a few TLS records or a
	// message.
	waitSize = 2 << 10
	bulkSize = 32 << 10
)

var (
	waitBuffers = sync.Pool{New: func() any { return new([waitSize]byte) }}
	bulkBuffers = sync.Pool{New: func() any { return new([bulkSize]byte) }}
)

// A Meter is what can be seen of a pump while it runs.
type Meter struct {
	Moved  atomic.Int64 // bytes that the destination has taken
	InHand atomic.Int64 // bytes that it is about to take
}

// Copy carries bytes from src to dst until the end of src, which is no error, and
// returns how many dst took. Of its two errors, of src's and of dst's, one is nil. Who
// calls it owns src's reading and dst's writing side; deadlines of both hold.
//
// Tap, if not nil, is shown all bytes before dst is, until it returns false.
func Copy(dst io.Writer, src io.Reader, m *Meter, tap func(p []byte) bool) (n int64, rerr, werr error) {
	before := m.Moved.Load()
	done, rerr, werr := copySockets(dst, src, m, tap)
	if !done {
		rerr, werr = copyBuffered(dst, src, m, tap)
	}
	return m.Moved.Load() - before, rerr, werr
}

// copyBuffered waits with a small buffer and reads on with a large one for as long as
// there is much.
func copyBuffered(dst io.Writer, src io.Reader, m *Meter, tap func(p []byte) bool) (rerr, werr error) {
	small := waitBuffers.Get().(*[waitSize]byte)
	defer waitBuffers.Put(small)
	var large *[bulkSize]byte
	defer func() {
		if large != nil {
			bulkBuffers.Put(large)
		}
	}()
	buf := small[:]
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if tap != nil && !tap(buf[:n]) {
				tap = nil
			}
			if err := writeAll(dst, buf[:n], m); err != nil {
				return nil, err
			}
		}
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return err, nil
		}
		switch {
		case n == len(buf) && large == nil:
			large = bulkBuffers.Get().(*[bulkSize]byte)
			buf = large[:]
		case n < waitSize/2 && large != nil:
			bulkBuffers.Put(large)
			large, buf = nil, small[:]
		}
	}
}

func writeAll(dst io.Writer, p []byte, m *Meter) error {
	m.InHand.Store(int64(len(p)))
	n, err := dst.Write(p)
	m.InHand.Store(0)
	m.Moved.Add(int64(n))
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}
