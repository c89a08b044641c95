package mux

import (
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/tcprelay/relay/internal/socket"
	"github.com/tcprelay/relay/internal/splice"
)

// minRead is the least room in a chunk that is worth a read of the transport
// while streams still hold other parts of it.
const minRead = chunkSize / 4

// mostUnread is what the system may hold unread of a peer's on this machine, and twice that
// with what it takes to keep it (socket(7)). Less costs bulk some of its rate.
const mostUnread = 192 << 10

// input reads the transport into chunks and hands the bytes out by reference.
// The session's reader owns it.
type input struct {
	src   io.Reader // the transport
	raw   *rawInput // that, if it is a plain socket
	heard stamp     // the last read that brought something
	// beforeWait is called before each read of the transport, which may wait.
	beforeWait func()

	c    *chunk // holds a reference of ours; nil before the first read
	r, w int    // c.buf[r:w] is still to be handed out

	// straight: the last bytes went to where they were wanted, and did not come through
	// memory of ours. Those of the next frame may too, so no more is read than its header.
	// For the same reason no more of what follows a large frame is read with the frame.
	straight bool

	first  [8]byte // what the peer began with, for an error that helps
	firsts int
}

// init makes conn the transport, of which head has been read already.
func (in *input) init(conn net.Conn, head []byte, beforeWait func()) {
	in.src, in.beforeWait = conn, beforeWait
	socket.LimitUnread(conn, mostUnread)
	if in.raw = newRawInput(conn); in.raw != nil {
		in.src = in.raw
	}
	in.heard.start()
	if len(head) > 0 {
		in.c = getChunk(chunkSize)
		in.took(copy(in.c.buf, head))
	}
}

// Read copies: the codec reads headers and fixed bodies through it.
func (in *input) Read(p []byte) (int, error) {
	b, err := in.next(len(p))
	return copy(p, b), err
}

// next returns at least one and at most limit of the bytes that follow. They stay
// in in.c; whoever keeps them retains it.
func (in *input) next(limit int) ([]byte, error) {
	if in.r == in.w {
		if err := in.fill(limit); err != nil {
			return nil, err
		}
	}
	b := in.c.buf[in.r:min(in.r+limit, in.w)]
	in.r += len(b)
	return b, nil
}

// errNotStraight says that the bytes that come next have to come by next.
var errNotStraight = errors.New("no pipe, or nobody waits")

// pass hands up to n of the bytes that follow to st without a way through our memory, if
// that is possible: to the socket of its sink, or to a Read that waits. It returns how many
// it was, and 0 if they have to come by next.
func (in *input) pass(st *Stream, n int) (int, error) {
	if in.raw == nil || n-(in.w-in.r) < splice.Least {
		return 0, nil
	}
	sinks, offers := st.wantsStraight()
	if !sinks && !offers || sinks && in.r < in.w {
		return 0, nil
	}
	in.beforeWait()
	var err error
	if sinks {
		var pipe *splice.Pipe
		if pipe, err = in.raw.fill(n); err == nil {
			n = pipe.Held()
			st.deliverPiped(pipe)
			pipe.Put()
		}
	} else {
		var head int
		n, head, err = in.raw.give(st, n, in.c.buf[in.r:in.w])
		in.r += head
	}
	if err != nil {
		if err == errNotStraight {
			err = nil
		}
		return 0, err
	}
	in.heard.now()
	in.straight = true
	return n, nil
}

// skip passes over n bytes.
func (in *input) skip(n int) error {
	for n > 0 {
		b, err := in.next(n)
		if err != nil {
			return err
		}
		n -= len(b)
	}
	return nil
}

// fill reads what the transport has, of which limit bytes are wanted now.
func (in *input) fill(limit int) error {
	in.beforeWait()
	switch {
	case in.c == nil:
		in.c = getChunk(chunkSize)
	case in.c.refs.Load() == 1: // no stream holds a part of it any more
		in.r, in.w = 0, 0
	case len(in.c.buf)-in.w < minRead:
		in.c.release()
		in.c = getChunk(chunkSize)
		in.r, in.w = 0, 0
	}
	most := chunkSize
	switch {
	case in.raw == nil:
	case limit >= splice.Least:
		most = limit + headerSize
	case in.straight:
		most = limit
	}
	in.straight = false
	for range 100 {
		n, err := in.src.Read(in.c.buf[in.w:min(in.w+most, len(in.c.buf))])
		if n > 0 {
			in.heard.now()
			in.took(n)
			return nil
		}
		if err != nil {
			return err
		}
	}
	return io.ErrNoProgress
}

// took counts n bytes that came to in.c.
func (in *input) took(n int) {
	in.firsts += copy(in.first[in.firsts:], in.c.buf[in.w:in.w+n])
	in.w += n
}

// strange adds to err, which the first frame led to, what the peer began with.
func (in *input) strange(err error) error {
	first := in.first[:in.firsts]
	if len(first) >= 2 && 0x14 <= first[0] && first[0] <= 0x17 && first[1] == 3 { // a record's type and version
		return fmt.Errorf("%w: %w (the peer began with %q)", ErrTLS, err, first)
	}
	return fmt.Errorf("%w (the peer began with %q)", err, first)
}

// close gives the chunk back.
func (in *input) close() {
	if in.c != nil {
		in.c.release()
		in.c = nil
	}
}
