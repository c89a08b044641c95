//go:build unix

package mux

import (
	"io"
	"net"
	"syscall"

	"github.com/tcprelay/relay/internal/nonblock"
	"github.com/tcprelay/relay/internal/socket"
	"github.com/tcprelay/relay/internal/splice"
)

// rawWriter writes to a socket without ever waiting for it. Its functions are made once, so
// that a write allocates nothing: those that few writers use, when they are used first.
type rawWriter struct {
	rc  syscall.RawConn
	n   int
	err error

	try func(fd uintptr) bool
	p   []byte

	tryBehind func(fd uintptr) bool
	header    []byte

	tryDrain func(fd uintptr) bool
	pipe     *splice.Pipe

	tryPiped func(fd uintptr) bool
	c        *chunk
	wait     bool
}

// newRawWriter returns nil if dst is no plain socket.
func newRawWriter(dst io.Writer) *rawWriter {
	rc := socket.Raw(dst)
	if rc == nil {
		return nil
	}
	w := &rawWriter{rc: rc}
	w.try = func(fd uintptr) bool {
		w.n, w.err = nonblock.Send(fd, w.p)
		return true
	}
	return w
}

// drain writes what the kernel takes of a pipe at once; less than all is no error.
func (w *rawWriter) drain(pipe *splice.Pipe) (int, error) {
	if w.tryDrain == nil {
		w.tryDrain = func(fd uintptr) bool {
			w.n, w.err = w.pipe.Drain(fd)
			return true
		}
	}
	w.pipe, w.n, w.err = pipe, 0, nil
	err := w.rc.Write(w.tryDrain)
	w.pipe = nil
	if err == nil {
		err = w.err
	}
	return w.n, err
}

// ended notes an error, and reports whether a try that did not write all is not to be
// repeated when the socket takes something again.
func (w *rawWriter) ended(err error) bool {
	if err == syscall.EAGAIN {
		err = nil
	}
	w.err = err
	return err != nil || !w.wait
}

// writePiped writes the frame of c, whose payload is in a pipe. If wait it waits until the
// kernel has taken all of it; otherwise less than all is no error.
func (w *rawWriter) writePiped(c *chunk, wait bool) (int, error) {
	if w.tryPiped == nil {
		w.tryPiped = w.sendPiped
	}
	w.c, w.wait, w.n, w.err = c, wait, 0, nil
	err := w.rc.Write(w.tryPiped)
	w.c = nil
	if err == nil {
		err = w.err
	}
	return w.n, err
}

// sendPiped sends what the kernel takes of the frame of c, and reports whether that is not
// to be repeated when it takes something again.
func (w *rawWriter) sendPiped(fd uintptr) bool {
	c := w.c
	if len(c.frame) > 0 {
		n, err := splice.SendMore(fd, c.frame)
		w.n += n
		c.frame = c.frame[n:]
		if len(c.frame) > 0 {
			return w.ended(err)
		}
	}
	n, err := c.pipe.Drain(fd)
	w.n += n
	return c.pipe.Held() == 0 || w.ended(err)
}

// write writes what the kernel takes of p at once; less than len(p) is no error.
func (w *rawWriter) write(p []byte) (int, error) {
	w.p = p
	return w.writeNow(w.try)
}

// writeBehind is write of header and then p.
func (w *rawWriter) writeBehind(header, p []byte) (int, error) {
	if w.tryBehind == nil {
		w.tryBehind = func(fd uintptr) bool {
			w.n, w.err = nonblock.SendBoth(fd, w.header, w.p)
			return true
		}
	}
	w.header, w.p = header, p
	return w.writeNow(w.tryBehind)
}

func (w *rawWriter) writeNow(try func(fd uintptr) bool) (int, error) {
	w.n, w.err = 0, nil
	err := w.rc.Write(try)
	w.header, w.p = nil, nil
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
	pipe bool // wanted

	again bool // it was waited already
	c     *chunk
	n     int
	err   error
}

// newRawReader returns nil if r is no plain socket.
func newRawReader(r io.Reader) *rawReader {
	rc := socket.Raw(r)
	if rc == nil {
		return nil
	}
	rd := &rawReader{rc: rc}
	rd.try = func(fd uintptr) bool {
		if rd.pipe {
			if pipe := splice.Get(); pipe != nil && rd.fill(pipe, fd) {
				return true
			} else if pipe != nil && !rd.again {
				rd.again = true
				return false
			}
			// What is there cannot be spliced, as what is urgent (tcp(7)).
		}
		c := getChunk(headerSize + rd.size)
		rd.n, rd.err = nonblock.Recv(fd, c.buf[headerSize:min(headerSize+rd.size, len(c.buf))])
		if rd.n <= 0 {
			c.release()
			return rd.err != syscall.EAGAIN
		}
		rd.c = c
		return true
	}
	return rd
}

func (rd *rawReader) fill(pipe *splice.Pipe, fd uintptr) bool {
	rd.n, rd.err = pipe.Fill(fd, rd.size)
	if rd.n <= 0 {
		pipe.Put()
		return rd.err != syscall.EAGAIN
	}
	rd.c = getChunk(headerSize)
	rd.c.pipe = pipe
	return true
}

// read waits for bytes and returns a chunk with up to size of them behind the
// room for a header, or in a pipe if one is wanted and to be had. The chunk is nil when
// there is an error.
func (rd *rawReader) read(size int, pipe bool) (*chunk, int, error) {
	rd.size, rd.pipe, rd.again, rd.c, rd.n, rd.err = size, pipe, false, nil, 0, nil
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

// rawInput reads from a socket into what is there for it when it has something.
type rawInput struct {
	conn net.Conn
	rc   syscall.RawConn
	n    int
	err  error
	size int // the most that is wanted

	tryRead func(fd uintptr) bool
	into    []byte

	tryFill func(fd uintptr) bool
	pipe    *splice.Pipe
	again   bool // it was waited already

	tryOffer func(fd uintptr) bool
	st       *Stream
	head     []byte
}

// newRawInput returns nil if conn is no plain socket.
func newRawInput(conn net.Conn) *rawInput {
	rc := socket.Raw(conn)
	if rc == nil {
		return nil
	}
	in := &rawInput{conn: conn, rc: rc}
	in.tryRead = func(fd uintptr) bool {
		in.n, in.err = nonblock.Recv(fd, in.into)
		return in.err != syscall.EAGAIN
	}
	in.tryFill = func(fd uintptr) bool {
		if in.pipe = splice.Get(); in.pipe == nil {
			in.err = errNotStraight
			return true
		}
		in.n, in.err = in.pipe.Fill(fd, in.size)
		if in.n == 0 {
			in.pipe.Put()
			in.pipe = nil
		}
		if in.err == syscall.EAGAIN && in.again {
			in.err = errNotStraight // as what is urgent (tcp(7))
		}
		in.again = true
		return in.err != syscall.EAGAIN
	}
	in.tryOffer = func(fd uintptr) bool {
		p := in.st.takeOffer(in.size)
		if p == nil {
			in.err = errNotStraight
			return true
		}
		head := copy(p, in.head)
		if in.n = head; head < len(p) {
			var n int
			n, in.err = nonblock.Recv(fd, p[head:])
			in.n += n
		}
		in.st.fillOffer(in.n)
		if in.n > 0 { // an error or the end comes again
			in.err = nil
		}
		return in.err != syscall.EAGAIN
	}
	return in
}

// Read is that of a net.Conn.
func (in *rawInput) Read(p []byte) (int, error) {
	in.into = p
	return in.await(in.tryRead)
}

// fill waits for bytes and returns a pipe with up to n of them.
func (in *rawInput) fill(n int) (*splice.Pipe, error) {
	in.size, in.again = n, false
	_, err := in.await(in.tryFill)
	pipe := in.pipe
	in.pipe = nil
	return pipe, err
}

// give waits for bytes and reads up to n of them to where a reader of st waits for them,
// behind those of head. It returns how many they were, and how many of them of head.
func (in *rawInput) give(st *Stream, n int, head []byte) (all, ofHead int, err error) {
	in.size, in.st, in.head = n, st, head
	all, err = in.await(in.tryOffer)
	return all, min(all, len(head)), err
}

func (in *rawInput) await(try func(fd uintptr) bool) (int, error) {
	in.n, in.err = 0, nil
	err := in.rc.Read(try)
	in.into, in.st, in.head = nil, nil, nil
	switch {
	case err != nil:
		return 0, err
	case in.err == errNotStraight:
		return 0, in.err
	case in.err != nil:
		return 0, &net.OpError{
			Op: "read", Net: in.conn.LocalAddr().Network(),
			Source: in.conn.LocalAddr(), Addr: in.conn.RemoteAddr(),
			Err: in.err,
		}
	case in.n == 0:
		return 0, io.EOF
	}
	return in.n, nil
}
