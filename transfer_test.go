package relay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/memnet"
)

// What a transfer owes, whatever the network does, and what these tests hold it to:
//
//   - What one end reads is what the other wrote, from its first byte on: nothing is
//     missing in between, doubled, or another transfer's.
//   - An end reads a clean end only behind all that the other wrote, and only if that
//     one half-closed or closed in order. Everything else is an error.
//   - Every transfer ends with an acknowledgement of the application's: of a request the
//     app's answer, which it begins when it has read the request to its end, and of a
//     dialogue the client's last byte, which it sends when it has all of the app's. So
//     if the client says that all went well, so does the app; and if the app says so, the
//     client has sent everything, and in a dialogue has read everything. What is left is
//     what no protocol can do away with: an app that has handed its last bytes and its
//     end to the system may be content where the client has an error.
//   - No app has a client that another app has had.

// noise is what transfers carry. No two pieces of it are alike.
var noise = sync.OnceValue(func() []byte { return randomBytes(4 << 20) })

// A flow is what one end of a transfer sends to the other.
type flow struct {
	all  []byte
	sent atomic.Int64 // bytes given to Write, before it is called
	over atomic.Bool  // set before the end in order
}

// A foul is an error that must not be.
type foul string

func (f foul) Error() string { return string(f) }

// A habit is how the ends of a transfer talk.
type habit int

const (
	request  habit = iota // all of it, and a half-close; then the answer
	dialogue              // one after the other, without a half-close
	duplex                // both at once
	pingPong              // little by little
	habits
)

func (h habit) String() string { return [...]string{"request", "dialogue", "duplex", "ping-pong"}[h] }

// A vice is what an end of a transfer does wrong.
type vice int

const (
	none   vice = iota
	resets      // in the middle
	quits       // closes in the middle, in order
	stalls      // stops reading for a while, in which the other loses patience
	vices
)

func (v vice) String() string { return [...]string{"virtuous", "resets", "quits", "stalls"}[v] }

// A transfer is an exchange between a client and an app. Both ends know what is to be
// sent.
type transfer struct {
	book     *book
	id       int
	habit    habit
	vice     vice
	sinner   string // "client" or "app"
	at       int    // the byte of the sinner's at which it sins
	up, down flow   // from the client, and from the app
	meet     func() // if not nil, called by a client when only its last byte is to come

	mu         sync.Mutex
	taken      bool // by an app
	client     error
	app        error
	clientOver bool
	appOver    bool
	clientDone bool // it has all that the app's success is to mean
}

func (x *transfer) String() string {
	s := fmt.Sprintf("transfer %d (%v, %d up, %d down", x.id, x.habit, len(x.up.all), len(x.down.all))
	if x.vice != none {
		s += fmt.Sprintf(", the %s %v at %d", x.sinner, x.vice, x.at)
	}
	return s + ")"
}

// A book knows all transfers of a test by the clients' addresses.
type book struct {
	t        testing.TB
	n        *memnet.Network
	seed     uint64
	pause    func(time.Duration) // of who stalls
	stall    time.Duration
	patience time.Duration // of the other end, if one stalls

	dialing sync.Mutex // held while coming dials
	coming  *transfer

	mu      sync.Mutex
	at      map[string]*transfer   // of a client's address, the last
	pending map[*transfer]struct{} // those of which not both ends are over
	live    int                    // ends of apps
	made    int
	figures map[string]int
}

func newBook(t testing.TB, n *memnet.Network, seed uint64) *book {
	return &book{
		t: t, n: n, seed: seed,
		at: make(map[string]*transfer), pending: make(map[*transfer]struct{}), figures: make(map[string]int),
	}
}

func (b *book) count(what string) { b.counts(what, 1) }

func (b *book) counts(what string, n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.figures[what] += n
}

// transfer makes a new one.
func (b *book) transfer(h habit, up, down int) *transfer {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.made++
	rnd := rand.New(rand.NewPCG(b.seed, uint64(b.made)))
	piece := func(n int) []byte {
		at := rnd.IntN(len(noise()) - n)
		return noise()[at : at+n]
	}
	x := &transfer{book: b, id: b.made, habit: h}
	x.up.all, x.down.all = piece(up), piece(down)
	b.pending[x] = struct{}{}
	return x
}

// dialed is for the network's OnConn: it books the transfer whose client dials.
func (b *book) dialed(c *memnet.Conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.at[c.LocalAddr().String()] = b.coming
}

// visit is the client's end of a transfer. It returns nil if all went well.
func (b *book) visit(x *transfer, addr string, patience time.Duration) error {
	b.dialing.Lock()
	b.coming = x
	conn, err := b.n.DialFrom("10.2.0.1")(context.Background(), "tcp", addr)
	b.dialing.Unlock()
	if err != nil {
		x.over("client", err)
		return err
	}
	e := x.end("client", conn.(*memnet.Conn))
	conn.SetDeadline(time.Now().Add(patience))
	err = e.asClient()
	e.close(err)
	x.over("client", err)
	return err
}

// serve is the app's end of all transfers whose clients come out of ln. It returns
// Accept's error.
func (b *book) serve(ln net.Listener) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go b.answer(c.(conn))
	}
}

func (b *book) answer(c conn) {
	b.mu.Lock()
	x := b.at[c.RemoteAddr().String()]
	b.mu.Unlock()
	if x == nil {
		b.t.Errorf("a client at %v that nobody knows", c.RemoteAddr())
		c.Close()
		return
	}
	x.mu.Lock()
	again := x.taken
	x.taken = true
	x.mu.Unlock()
	if again {
		b.t.Errorf("%v has two apps", x)
		c.Close()
		return
	}
	b.lives(1)
	defer b.lives(-1)
	e := x.end("app", c)
	err := e.asApp()
	e.close(err)
	x.over("app", err)
}

func (b *book) lives(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.live += n
}

// quiet reports that no app's end is under way.
func (b *book) quiet() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.live == 0
}

// over notes how an end of the transfer ended.
func (x *transfer) over(who string, err error) {
	b := x.book
	if f, ok := errors.AsType[foul](err); ok {
		b.t.Errorf("%v: the %s: %v", x, who, f)
	}
	if err == nil {
		b.count(who + " content")
	} else {
		b.count(who + " failed")
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if who == "client" {
		x.client, x.clientOver = err, true
	} else {
		x.app, x.appOver = err, true
		if err == nil && !x.clientDone {
			b.t.Errorf("%v: the app is content, and the client was not done", x)
		}
	}
	if x.clientOver && x.appOver {
		x.judgeLocked()
		b.mu.Lock()
		delete(b.pending, x)
		b.mu.Unlock()
	}
}

// judgeLocked compares what the two ends say.
func (x *transfer) judgeLocked() {
	switch {
	case !x.clientOver || x.taken && !x.appOver:
		x.book.t.Errorf("%v: an end is not over", x)
	case x.client == nil && !x.taken:
		x.book.t.Errorf("%v: the client is content without an app", x)
	case x.client == nil && x.app != nil:
		x.book.t.Errorf("%v: the client is content, and the app has %v", x, x.app)
	}
}

// close judges the transfers of which no end is under way any more.
func (b *book) close() {
	b.mu.Lock()
	left := slices.Collect(maps.Keys(b.pending))
	b.mu.Unlock()
	for _, x := range left {
		x.mu.Lock()
		x.judgeLocked()
		x.mu.Unlock()
	}
}

// A party is one of the two ends of a transfer.
type party struct {
	x           *transfer
	who         string
	c           conduit
	out, in     *flow
	sin         vice       // none unless it is the one that sins
	rnd         *rand.Rand // the writer's
	wrote, read int
	buf         []byte // the reader's
	stalled     bool   // it has
}

// A conduit is what the connections of clients and of apps have in common.
type conduit interface {
	net.Conn
	CloseWrite() error
	SetLinger(int) error
}

func (x *transfer) end(who string, c conduit) *party {
	e := &party{x: x, who: who, c: c, out: &x.up, in: &x.down}
	stream := uint64(x.id) << 1
	if who == "app" {
		e.out, e.in = e.in, e.out
		stream++
	}
	if x.sinner == who {
		e.sin = x.vice
	} else if x.vice == stalls {
		c.SetWriteDeadline(time.Now().Add(x.book.patience))
	}
	e.rnd = rand.New(rand.NewPCG(x.book.seed, stream))
	e.buf = make([]byte, e.size())
	return e
}

// size draws the size of a Read or Write: small ones are as likely as large ones.
func (e *party) size() int { return 1 + e.rnd.IntN(1<<e.rnd.IntN(18)) }

func (e *party) asClient() error {
	up, down := len(e.out.all), len(e.in.all)
	err := errors.New("no habit")
	switch e.x.habit {
	case request:
		if err = e.write(up); err == nil {
			e.done()
			err = e.finish()
		}
		if err != nil {
			return err
		}
		return e.readEnd()
	case dialogue:
		if err = e.write(up - 1); err == nil {
			err = e.readTo(down)
		}
	case duplex:
		err = e.both(up-1, down)
	case pingPong:
		err = e.turns(up-1, down, true)
	}
	if err != nil {
		return err
	}
	if e.x.meet != nil {
		e.x.meet()
	}
	e.done()
	if err = e.write(up); err == nil {
		err = e.finish()
	}
	if err != nil {
		return err
	}
	return e.readEnd()
}

// done notes that the client has all that it has to have before the app may be content.
func (e *party) done() {
	e.x.mu.Lock()
	defer e.x.mu.Unlock()
	e.x.clientDone = true
}

func (e *party) asApp() error {
	up, down := len(e.in.all), len(e.out.all)
	err := errors.New("no habit")
	switch e.x.habit {
	case request:
		if err = e.readEnd(); err == nil {
			err = e.write(down)
		}
		return err
	case dialogue:
		if err = e.readTo(up - 1); err == nil {
			err = e.write(down)
		}
	case duplex:
		err = e.both(down, up-1)
	case pingPong:
		err = e.turns(down, up-1, false)
	}
	if err != nil {
		return err
	}
	return e.readEnd()
}

func (e *party) both(wrote, read int) error {
	writing := make(chan error, 1)
	go func() {
		err := e.write(wrote)
		if err != nil {
			e.abort() // so that the reading ends too
		}
		writing <- err
	}()
	err := e.readTo(read)
	if err != nil {
		e.abort()
	}
	return errors.Join(err, <-writing)
}

func (e *party) turns(wrote, read int, mine bool) error {
	const rounds = 8
	for i := 1; i <= rounds; i++ {
		for range 2 {
			var err error
			if mine {
				err = e.write(wrote * i / rounds)
			} else {
				err = e.readTo(read * i / rounds)
			}
			if err != nil {
				return err
			}
			mine = !mine
		}
	}
	return nil
}

var errSinned = errors.New("broke it off")

// write writes up to byte to.
func (e *party) write(to int) error {
	sins := (e.sin == resets || e.sin == quits) && e.x.at <= to
	if sins {
		to = e.x.at
	}
	if r, ok := e.c.(io.ReaderFrom); ok && !sins && e.x.id%3 == 0 {
		_, err := r.ReadFrom(&source{e, to})
		return err
	}
	for e.wrote < to {
		p := e.out.all[e.wrote:to]
		p = p[:min(len(p), e.size())]
		e.out.sent.Add(int64(len(p)))
		n, err := e.c.Write(p)
		e.wrote += n
		if err != nil {
			return err
		}
		if n != len(p) {
			return foul(fmt.Sprintf("a Write of %d bytes gave %d and no error", len(p), n))
		}
	}
	switch {
	case !sins:
		return nil
	case e.sin == quits:
		e.out.over.Store(true)
		e.c.Close()
	default:
		e.abort()
	}
	return errSinned
}

// A source is what is left for an end to write.
type source struct {
	e  *party
	to int
}

func (s *source) Read(p []byte) (int, error) {
	e := s.e
	if e.wrote == s.to {
		return 0, io.EOF
	}
	n := copy(p, e.out.all[e.wrote:s.to])
	e.out.sent.Add(int64(n))
	e.wrote += n
	return n, nil
}

// finish half-closes.
func (e *party) finish() error {
	e.out.over.Store(true)
	return e.c.CloseWrite()
}

// readTo reads up to byte to.
func (e *party) readTo(to int) error {
	for e.read < to {
		if e.sin == stalls && e.read >= e.x.at && !e.stalled {
			e.stalled = true
			e.x.book.pause(e.x.book.stall)
		}
		n, err := e.c.Read(e.buf[:min(len(e.buf), to-e.read)])
		if _, err := e.Write(e.buf[:n]); err != nil {
			return err
		}
		if err == io.EOF {
			return e.ended()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readEnd reads all that is left, and wants the end behind it.
func (e *party) readEnd() error {
	if w, ok := e.c.(io.WriterTo); ok && e.sin != stalls && e.x.id%3 == 1 {
		if _, err := w.WriteTo(e); err != nil {
			return err
		}
		return e.ended()
	}
	return e.readTo(len(e.in.all) + 1)
}

// Write takes what was read and checks it.
func (e *party) Write(p []byte) (int, error) {
	if want := e.in.all[e.read:]; !bytes.HasPrefix(want, p) {
		return 0, foul(fmt.Sprintf("from byte %d of %d on, other bytes than were sent: %.20x, want %.20x", e.read, len(e.in.all), p, want))
	}
	e.read += len(p)
	if sent := e.in.sent.Load(); int64(e.read) > sent {
		return 0, foul(fmt.Sprintf("%d bytes of %d sent", e.read, sent))
	}
	return len(p), nil
}

// ended judges the end that Read saw.
func (e *party) ended() error {
	if r, ok := e.c.(interface{ WasReset() bool }); ok && r.WasReset() {
		return syscall.ECONNRESET // which a Write has reported
	}
	sent, over := e.in.sent.Load(), e.in.over.Load()
	switch {
	case !over:
		return foul(fmt.Sprintf("a clean end behind byte %d, where there was none; %d were sent", e.read, sent))
	case int64(e.read) != sent:
		return foul(fmt.Sprintf("a clean end behind byte %d of %d", e.read, sent))
	case e.read != len(e.in.all):
		return io.ErrUnexpectedEOF // the other one quit
	}
	return nil
}

func (e *party) abort() {
	e.c.SetLinger(0)
	e.c.Close()
}

// close ends the end: in order if all went well.
func (e *party) close(err error) {
	if err != nil {
		e.abort()
		return
	}
	e.out.over.Store(true)
	e.c.Close()
}
