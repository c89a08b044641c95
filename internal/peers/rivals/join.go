package rivals

import (
	"errors"
	"io"
	"net"
	"sync"
)

// HalfCloser is what a relay needs of each of the two conns that it joins.
type HalfCloser interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// Join carries bytes both ways until both have ended, and closes both conns. A clean end
// is passed on as a half-close, an error ends everything. Carry is Copy or Splice.
func Join(near, far HalfCloser, carry func(io.Writer, io.Reader) error) {
	defer near.Close()
	defer far.Close()
	half := func(dst, src HalfCloser) {
		if carry(dst, src) != nil {
			near.Close()
			far.Close()
			return
		}
		dst.CloseWrite()
	}
	var up sync.WaitGroup
	up.Go(func() { half(far, near) })
	half(near, far)
	up.Wait()
}

// Splice is io.Copy: between two TCP conns the kernel moves the bytes, where it can.
func Splice(dst io.Writer, src io.Reader) error {
	_, err := io.Copy(dst, src)
	return err
}

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// Copy is io.Copy with a buffer from a pool. A stream that can write itself out without
// one (smux) does so; a TCP conn's own methods are kept out of it, because towards a
// stream they only add a buffer of their own.
func Copy(dst io.Writer, src io.Reader) error {
	if _, ok := src.(*net.TCPConn); !ok {
		if w, ok := src.(io.WriterTo); ok {
			_, err := w.WriteTo(dst)
			if errors.Is(err, io.EOF) { // smux's way to say that it is done
				err = nil
			}
			return err
		}
	}
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, *buf)
	return err
}
