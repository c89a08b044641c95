package pump

import (
	"errors"
	"io"
	"os"
	"syscall"

	"github.com/tcprelay/relay/internal/nonblock"
	"github.com/tcprelay/relay/internal/socket"
	"github.com/tcprelay/relay/internal/splice"
)

var errNoPipe = errors.New("no pipe")

// copySockets is Copy between two sockets of the net package itself. It waits with
// nothing in hand, reads what comes, and splices while there is much.
func copySockets(dst io.Writer, src io.Reader, m *Meter, tap func([]byte) bool) (done bool, rerr, werr error) {
	from, to := socket.Raw(src), socket.Raw(dst)
	if from == nil || to == nil {
		return false, nil, nil
	}
	splice.Enter()
	defer splice.Leave()
	s := &sockets{m: m, from: from, to: to, tap: tap}
	s.tryIn, s.tryOut = s.in, s.out
	for {
		if end, rerr, werr := s.step(); end || rerr != nil || werr != nil {
			return true, rerr, werr
		}
	}
}

// sockets is a pump between two sockets.
type sockets struct {
	m             *Meter
	from, to      syscall.RawConn
	tap           func([]byte) bool
	tryIn, tryOut func(fd uintptr) bool // bound once, so that moving bytes allocates nothing

	bulk  bool            // the last step moved much
	again bool            // it was waited already
	buf   *[bulkSize]byte // what came is in either of these
	pipe  *splice.Pipe
	rest  []byte // of buf, to be written
	n     int    // how much came, or is left in the pipe
	err   error
}

// step moves what comes next.
func (s *sockets) step() (end bool, rerr, werr error) {
	s.n, s.err, s.again = 0, nil, false
	switch err := s.from.Read(s.tryIn); {
	case err != nil:
		return false, err, nil
	case s.err == errNoPipe:
		s.bulk = false
		return false, nil, nil
	case s.err != nil:
		return false, s.err, nil
	case s.n == 0:
		return true, nil, nil
	}
	if s.pipe != nil {
		s.bulk = s.n >= splice.Least
	} else {
		s.bulk = s.n == bulkSize && s.tap == nil
		s.rest = s.buf[:s.n]
		if s.tap != nil && !s.tap(s.rest) {
			s.tap = nil
		}
	}
	s.m.InHand.Store(int64(s.n))
	werr = s.to.Write(s.tryOut)
	s.m.InHand.Store(0)
	if werr == nil {
		werr = s.err
	}
	if s.buf != nil {
		bulkBuffers.Put(s.buf)
	} else {
		s.pipe.Put()
	}
	s.buf, s.rest, s.pipe = nil, nil, nil
	return false, nil, werr
}

// in takes what has come, and what holds it only then.
func (s *sockets) in(fd uintptr) bool {
	if s.bulk {
		return s.spliceIn(fd)
	}
	s.buf = bulkBuffers.Get().(*[bulkSize]byte)
	s.n, s.err = nonblock.Recv(fd, s.buf[:])
	s.err = wrap("read", s.err)
	if s.n > 0 {
		return true
	}
	bulkBuffers.Put(s.buf)
	s.buf = nil
	return s.err != syscall.EAGAIN
}

func (s *sockets) spliceIn(fd uintptr) bool {
	if s.pipe = splice.Get(); s.pipe == nil {
		s.err = errNoPipe
		return true
	}
	s.n, s.err = s.pipe.Fill(fd, splice.Size)
	if s.n > 0 {
		return true
	}
	s.pipe.Put()
	s.pipe = nil
	if s.err == syscall.EAGAIN && s.again {
		s.err = errNoPipe // what is there cannot be spliced, as what is urgent (tcp(7))
	}
	s.again = true
	return s.err != syscall.EAGAIN
}

// out hands on what in took, and returns false when the socket is full.
func (s *sockets) out(fd uintptr) bool {
	var n int
	if s.pipe != nil {
		n, s.err = s.pipe.Drain(fd)
	} else {
		n, s.err = s.writeRest(fd)
	}
	s.n -= n
	s.m.Moved.Add(int64(n))
	return s.n == 0 || s.err != nil
}

func (s *sockets) writeRest(fd uintptr) (n int, err error) {
	for len(s.rest) > 0 {
		m, err := nonblock.Send(fd, s.rest)
		n += m
		s.rest = s.rest[m:]
		if err == syscall.EAGAIN {
			break
		}
		if err != nil {
			return n, wrap("write", err)
		}
	}
	return n, nil
}

// wrap leaves nil and EAGAIN, which is the pump's, as they are.
func wrap(call string, err error) error {
	if err == syscall.EAGAIN {
		return err
	}
	return os.NewSyscallError(call, err)
}
