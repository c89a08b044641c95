//go:build linux

package mux

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/splice"
)

// openPipes counts the ends of pipes that this process has open.
func openPipes(t testing.TB) (n int) {
	t.Helper()
	files, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if to, err := os.Readlink(f); err == nil && strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

// offered waits until a Read of st has room for what comes.
func offered(t testing.TB, st *Stream) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Microsecond) {
		if _, read := st.wantsStraight(); read {
			return
		}
		if time.Now().After(end) {
			t.Fatal("no Read offers its room")
		}
	}
}

// What comes for a Read that waits is read straight into its room, behind what has been
// read already; and not if it is little, nobody waits, or something else is to be read
// first.
func TestReadStraight(t *testing.T) {
	c1, c2 := net.Pipe()
	s, _ := sessionPair(t, c1, c2, Config{})
	st := openStream(t, s)
	from, to := tcpPair(t)
	var in input
	in.init(to, nil, func() {})
	defer in.close()
	const size = 100_000
	want := pattern(1, size)
	from.Write(want[:1000])
	if _, err := in.next(500); err != nil { // a header, say; the others are read with it
		t.Fatal(err)
	}
	if n, err := in.pass(st, size); n != 0 || err != nil {
		t.Errorf("with nobody waiting: %d, %v", n, err)
	}
	read := make(chan result)
	room := make([]byte, size)
	startRead := func(room []byte) {
		go func() {
			n, err := st.Read(room)
			read <- result{n: int64(n), err: err}
		}()
	}
	startRead(room)
	offered(t, st)
	if n, err := in.pass(st, 500+splice.Least-1); n != 0 || err != nil {
		t.Errorf("of little: %d, %v", n, err)
	}
	from.Write(want[1000:])
	got := 500
	for got < size {
		n, err := in.pass(st, size-got)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break // there is little left
		}
		r := await(t, read, "the Read")
		if r.err != nil || r.n != int64(n) || !bytes.Equal(room[:n], want[got:got+n]) {
			t.Fatalf("Read: %+v, and %d were passed", r, n)
		}
		got += n
		startRead(room)
		offered(t, st)
	}
	if size-got >= splice.Least {
		t.Errorf("%d bytes were not passed", size-got)
	}
	st.Close()
	if r := await(t, read, "the Read"); r.n != 0 || r.err != net.ErrClosed {
		t.Errorf("Read of a closed stream: %+v", r)
	}
	if n, err := in.pass(st, size); n != 0 || err != nil {
		t.Errorf("when it is closed: %d, %v", n, err)
	}
}

// Reads of all sizes, with deadlines that pass, get every byte of frames of all sizes, in
// order.
func TestReadStraightMixed(t *testing.T) {
	c1, c2 := tcpPair(t)
	client, server := sessionPair(t, c1, c2, Config{})
	var all sync.WaitGroup
	for seed := range 4 {
		w, r := streamPair(t, client, server)
		const total = 30 << 20
		all.Go(func() {
			from := &patternReader{seed, 0}
			for from.at < total {
				n := 1 + rand.Int64N(1+rand.Int64N(400_000))
				if rand.IntN(2) == 0 {
					w.ReadFrom(io.LimitReader(from, n))
				} else {
					b := make([]byte, n)
					from.Read(b)
					w.Write(b)
				}
			}
			w.CloseWrite()
		})
		all.Go(func() {
			want := &patternReader{seed, 0}
			buf, wantBuf := make([]byte, 300_000), make([]byte, 300_000)
			for {
				size := 1 + rand.IntN(len(buf))
				if rand.IntN(10) == 0 {
					r.SetReadDeadline(time.Now().Add(time.Duration(rand.IntN(100)) * time.Microsecond))
				}
				n, err := r.Read(buf[:size])
				want.Read(wantBuf[:n])
				if !bytes.Equal(buf[:n], wantBuf[:n]) {
					t.Errorf("other bytes than were sent, before %d", want.at)
					return
				}
				if errors.Is(err, os.ErrDeadlineExceeded) {
					r.SetReadDeadline(time.Time{})
				} else if err == io.EOF {
					break
				} else if err != nil {
					t.Error(err)
					break
				}
			}
			if sent, _ := w.Counts(); want.at != sent {
				t.Errorf("%d of %d bytes", want.at, sent)
			}
		})
	}
	all.Wait()
}

// What ends a Read that waits for bulk ends it at once, and nothing is written to its room
// when it has returned; which the race detector sees.
func TestReadStraightEnds(t *testing.T) {
	for _, end := range []struct {
		name string
		do   func(*Stream, *Session)
		want error
	}{
		{"Close", func(r *Stream, _ *Session) { r.Close() }, net.ErrClosed},
		{"deadline", func(r *Stream, _ *Session) { r.SetReadDeadline(time.Unix(1, 0)) }, os.ErrDeadlineExceeded},
		{"reset", func(r *Stream, _ *Session) { r.SetLinger(0); r.Close() }, net.ErrClosed},
		{"session", func(_ *Stream, s *Session) { s.CloseWithError(InternalError, errEnough) }, errEnough},
	} {
		t.Run(end.name, func(t *testing.T) {
			for range 20 {
				c1, c2 := tcpPair(t)
				client, server := sessionPair(t, c1, c2, Config{})
				w, r := streamPair(t, client, server)
				go func() {
					b := make([]byte, 300_000)
					for {
						if _, err := w.Write(b); err != nil {
							return
						}
					}
				}()
				var got error
				read := make(chan struct{})
				go func() {
					defer close(read)
					b := make([]byte, 200_000)
					for {
						n, err := r.Read(b)
						clear(b[:n])
						clear(b) // races with who still writes to it
						if got = err; err != nil {
							return
						}
					}
				}()
				time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond) // somewhere within
				end.do(r, server)
				await(t, read, "the end of Read")
				if !errors.Is(got, end.want) {
					t.Fatalf("Read: %v, want %v", got, end.want)
				}
				client.Close()
				server.Close()
			}
		})
	}
}

// piped carries what is written to in, a socket, over a stream to out, another one.
func piped(t testing.TB, client, server *Session) (in, out *net.TCPConn, w, r *Stream, ends chan error) {
	t.Helper()
	a, from := tcpPair(t)
	to, b := tcpPair(t)
	w, r = streamPair(t, client, server)
	ends = make(chan error, 2)
	go func() {
		_, err := w.ReadFrom(from)
		w.CloseWrite()
		ends <- err
	}()
	r.StartWriteTo(to, func(_ int64, err error) {
		to.(*net.TCPConn).CloseWrite()
		ends <- err
	})
	return a.(*net.TCPConn), b.(*net.TCPConn), w, r, ends
}

// closeWithoutPipes closes sessions, after which there are no more pipes than before them.
func closeWithoutPipes(t *testing.T, before int, client, server *Session) {
	t.Helper()
	client.Close()
	server.Close()
	if n := openPipes(t); n != before {
		t.Fatalf("%d ends of pipes are left, and there were %d", n, before)
	}
}

// Bulk between sockets goes through pipes, to readers that keep up and to those that pause,
// and comes as it was sent. Once the sessions are gone there is no pipe.
func TestPiped(t *testing.T) {
	before := openPipes(t)
	c1, c2 := tcpPair(t)
	client, server := sessionPair(t, c1, c2, Config{})
	const total = 32 << 20
	var all sync.WaitGroup
	most := 0
	for seed := range 4 {
		in, out, _, _, ends := piped(t, client, server)
		all.Go(func() {
			io.CopyN(in, &patternReader{seed, 0}, total)
			in.CloseWrite()
		})
		all.Go(func() {
			want := &patternReader{seed, 0}
			buf, wantBuf := make([]byte, 200_000), make([]byte, 200_000)
			for {
				n, err := out.Read(buf[:1+rand.IntN(len(buf))])
				want.Read(wantBuf[:n])
				if !bytes.Equal(buf[:n], wantBuf[:n]) {
					t.Errorf("other bytes than were sent, before %d", want.at)
					return
				}
				if err != nil {
					break
				}
				if seed%2 == 1 && rand.IntN(50) == 0 {
					time.Sleep(time.Millisecond) // a reader that pauses
				}
				if seed == 0 {
					most = max(most, openPipes(t))
				}
			}
			if want.at != total {
				t.Errorf("%d of %d bytes", want.at, total)
			}
			for range 2 {
				if err := await(t, ends, "the end"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if most <= before {
		t.Error("there was no pipe: is anything spliced?")
	}
	closeWithoutPipes(t, before, client, server)
}

// Bulk that came by a pipe and finds less window than there was, because a Write took it,
// is cut into frames like any other.
func TestPipedBesideWrites(t *testing.T) {
	c1, c2 := tcpPair(t)
	client, server := sessionPair(t, c1, c2, Config{MaxWindow: Window})
	in, out, w, _, ends := piped(t, client, server)
	const total, writes = 16 << 20, 300
	go func() {
		b := make([]byte, total)
		for i := range b {
			b[i] = byte(i % 127) // those of Write are 127 and more
		}
		in.Write(b)
	}()
	var all sync.WaitGroup
	all.Go(func() {
		for i := range writes {
			b := bytes.Repeat([]byte{127 + byte(i%128)}, 20_000)
			if n, err := w.Write(b); n != len(b) || err != nil {
				t.Errorf("%d, %v", n, err)
			}
		}
	})
	buf := make([]byte, 50_000)
	at, run, last := 0, 0, byte(0)
	for got := 0; got < total+writes*20_000; {
		n, err := out.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got += n
		for _, b := range buf[:n] {
			if b < 127 {
				if int(b) != at%127 || run%20_000 != 0 {
					t.Fatalf("byte %d is %d, behind %d of a Write", at, b, run)
				}
				at++
				continue
			}
			if run%20_000 != 0 && b != last {
				t.Fatalf("within one Write another, after %d", run)
			}
			run, last = run+1, b
		}
	}
	all.Wait()
	in.CloseWrite()
	for range 2 {
		if err := await(t, ends, "the end"); err != nil {
			t.Error(err)
		}
	}
}

// A session that is lost while bulk waits in pipes leaves none, and both ends learn.
func TestPipedLost(t *testing.T) {
	before := openPipes(t)
	for _, end := range []func(w, r *Stream, client, server *Session){
		func(_, _ *Stream, client, _ *Session) { client.Close() },
		func(_, _ *Stream, _, server *Session) { server.Close() },
		func(w, r *Stream, client, server *Session) { w.SetLinger(0); w.Close(); client.Close() },
		func(w, r *Stream, client, server *Session) { r.SetLinger(0); r.Close(); server.Close() },
	} {
		c1, c2 := tcpPair(t)
		client, server := sessionPair(t, c1, c2, Config{})
		type line struct {
			in, out *net.TCPConn
			w, r    *Stream
			ends    chan error
		}
		var lines []line
		for range 8 {
			in, out, w, r, ends := piped(t, client, server)
			lines = append(lines, line{in, out, w, r, ends})
			go in.Write(make([]byte, 64<<20)) // nobody reads
		}
		for end := time.Now().Add(time.Minute); openPipes(t) <= before; time.Sleep(100 * time.Microsecond) {
			if time.Now().After(end) {
				t.Fatal("no pipe")
			}
		}
		for _, l := range lines {
			end(l.w, l.r, client, server)
		}
		for _, l := range lines {
			l.in.SetLinger(0)
			l.in.Close()
			l.out.SetLinger(0)
			l.out.Close()
			failed := 0
			for range 2 {
				if await(t, l.ends, "the end") != nil {
					failed++
				}
			}
			if failed == 0 {
				t.Error("nobody was told")
			}
		}
		closeWithoutPipes(t, before, client, server)
	}
}

// What is urgent cannot be spliced, and does not hold up what comes behind it.
func TestPipedUrgent(t *testing.T) {
	c1, c2 := tcpPair(t)
	client, server := sessionPair(t, c1, c2, Config{})
	in, out, _, _, ends := piped(t, client, server)
	buf := make([]byte, 4<<20)
	for range 3 {
		go in.Write(buf) // so that it is spliced
		if _, err := io.ReadFull(out, make([]byte, len(buf))); err != nil {
			t.Fatal(err)
		}
		raw, err := in.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Write(func(fd uintptr) bool {
			err = syscall.Sendto(int(fd), []byte("!"), syscall.MSG_OOB, nil)
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
		behind := pattern(1, 30_000)
		in.Write(behind)
		out.SetReadDeadline(time.Now().Add(time.Minute))
		got := make([]byte, len(behind))
		if n, err := io.ReadFull(out, got); err != nil || !bytes.Equal(got, behind) {
			t.Fatalf("behind what is urgent came %d bytes, %v", n, err)
		}
	}
	in.CloseWrite()
	for range 2 {
		if err := await(t, ends, "the end"); err != nil {
			t.Error(err)
		}
	}
}

// The next read is as large as the last one was full, and takes a pipe only after bulk.
func TestNextSize(t *testing.T) {
	size := chunkSizes[0]
	for _, want := range []int{chunkSizes[1], chunkSizes[2], headerSize + maxPiped, headerSize + maxPiped} {
		if size = nextSize(size, size-headerSize, size-headerSize); size != want {
			t.Errorf("behind a full read: %d, want %d", size, want)
		}
	}
	for _, test := range []struct{ n, want int }{
		{maxPiped / 2, headerSize + maxPiped}, {splice.Least, headerSize + maxPiped},
		{splice.Least - 1, chunkSizes[1]}, {100, chunkSizes[0]},
	} {
		if got := nextSize(size, test.n, maxPiped); got != test.want {
			t.Errorf("behind %d bytes: %d, want %d", test.n, got, test.want)
		}
	}
}

// A Write of much that meets a full socket keeps nothing of what it was given, and what it
// says that it wrote is all that comes, in order and in whole frames; it goes on from there.
func TestWriteDirect(t *testing.T) {
	c1, c2 := tcpPair(t)
	c1.(*net.TCPConn).SetWriteBuffer(100_000)
	c2.(*net.TCPConn).SetReadBuffer(100_000)
	s := Client(c1, Config{})
	defer s.Close()
	st := openStream(t, s)
	p := newRawPeer(t, c2)
	p.send(wndIncFrame(st.ID(), 1<<30))
	var want []byte
	for i := range 20 {
		size := leastDirect + rand.IntN(2<<20)
		b := pattern(i, size)
		st.SetWriteDeadline(time.Now().Add(time.Duration(rand.IntN(3000)) * time.Microsecond))
		n, err := st.Write(b)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) || err == nil && n != size {
			t.Fatalf("Write: %d of %d, %v", n, size, err)
		}
		want = append(want, b[:n]...)
		clear(b)
		if i == 0 {
			continue // the socket fills up
		}
		if i == 1 {
			p.listen()
		}
		if i%3 == 0 {
			b := pattern(100+i, 100)
			st.SetWriteDeadline(time.Time{})
			if _, err := st.Write(b); err != nil { // behind what is left of a frame
				t.Fatal(err)
			}
			want = append(want, b...)
		}
	}
	st.CloseWrite()
	var frames []wireFrame
	for end := time.Now().Add(time.Minute); len(frames) == 0 || frames[len(frames)-1].flags&fin == 0; {
		if time.Now().After(end) {
			t.Fatal("no FIN")
		}
		time.Sleep(time.Millisecond)
		frames = append(frames, p.took()...)
	}
	if got := payload(frames, st.ID()); !bytes.Equal(got, want) {
		t.Errorf("%d bytes came that are not the %d written", len(got), len(want))
	}
	if sent, _ := st.Counts(); sent != int64(len(want)) {
		t.Errorf("%d bytes are counted, %d were written", sent, len(want))
	}
}

// The more waits to be sent, the less a frame carries: what is in memory counts at once,
// and what is in pipes early only on a slow transport.
func TestRoom(t *testing.T) {
	const small, smallest = 16<<10 - headerSize, 2<<10 - headerSize
	for _, test := range []struct {
		bulk, piped, unsent, frames, want, room int
	}{
		{want: maxPiped, room: maxPiped},
		{want: 100, room: 100},
		{frames: streamFrames, want: 100, room: 0},
		{bulk: 512<<10 - 1, want: maxPiped, room: maxPiped},
		{bulk: 512 << 10, want: maxPiped, room: small},
		{bulk: 512 << 10, want: 100, room: 100},
		{piped: 4<<20 - 1, want: maxPiped, room: maxPiped},
		{piped: 4 << 20, want: maxPiped, room: smallest},
		{bulk: 2 << 20, piped: 2 << 20, want: maxPiped, room: smallest},
		{unsent: leastUnsent, want: maxPiped, room: maxPayload},
		{unsent: leastUnsent, piped: 512 << 10, want: maxPiped, room: small},
		{unsent: mostUnsent, piped: 512 << 10, want: maxPiped, room: small},
	} {
		w := writer{bulk: test.bulk, piped: test.piped, unsent: test.unsent}
		if got := w.room(&Stream{frames: test.frames}, test.want); got != test.room {
			t.Errorf("%+v: room for %d", test, got)
		}
	}
}

// In a crowd the system holds little that it cannot send, and otherwise what the pace of
// the transport allows.
func TestCrowdUnsent(t *testing.T) {
	conn, _ := tcpPair(t)
	var w writer
	w.init(conn, nil)
	now := w.wrote.time()
	for _, step := range []struct {
		messages     int
		unsent, want int
	}{
		{leastMessages, 0, crowdUnsent},
		{0, 0, 0},
		{leastMessages, leastUnsent, leastUnsent},
		{0, leastUnsent, leastUnsent},
		{leastMessages, mostUnsent, crowdUnsent},
		{0, mostUnsent, mostUnsent},
	} {
		w.unsent = step.unsent
		w.crowd = crowd{here: w.crowd.here, messages: step.messages, bulk: true, since: now.Add(-crowdTurn)}
		w.lookLocked()
		if got := sockopt(t, conn, syscall.IPPROTO_TCP, notSentLowat); got != step.want {
			t.Errorf("%+v: %d", step, got)
		}
	}
}

const notSentLowat = 25 // TCP_NOTSENT_LOWAT, tcp(7)

func sockopt(t *testing.T, conn net.Conn, level, name int) (value int) {
	t.Helper()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { value, err = syscall.GetsockoptInt(int(fd), level, name) })
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// A session has the system hold little that it has not read of a peer on this machine.
func TestUnread(t *testing.T) {
	c1, c2 := tcpPair(t)
	sessionPair(t, c1, c2, Config{})
	for _, c := range []net.Conn{c1, c2} {
		if got := sockopt(t, c, syscall.SOL_SOCKET, syscall.SO_RCVBUF); got != 2*mostUnread { // socket(7)
			t.Errorf("room for %d", got)
		}
	}
}
