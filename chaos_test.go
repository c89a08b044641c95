package relay_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
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

// A cutter is a network on which the next connection of a kind is cut after some bytes.
type cutter struct {
	*memnet.Network
	*book
	slice     int
	transport *memnet.Conn // the app's end of the newest
	dials     int          // of transports
	cutDial   int64        // the next transport is cut after that many bytes; negative: it is not
	cutClient int64        // so is the next client
	client    *memnet.Conn // the newest
}

func newCutter(t testing.TB, n *memnet.Network) *cutter {
	k := &cutter{Network: n, book: newBook(t, n, 1), cutDial: -1, cutClient: -1}
	n.OnConn(func(c, _ *memnet.Conn) {
		c.SetSlice(k.slice)
		if c.RemoteAddr().String() == relayAddr {
			k.transport = c
			k.dials++
			c.CutAfter(k.cutDial)
			k.cutDial = -1
			return
		}
		k.client = c
		c.CutAfter(k.cutClient)
		k.cutClient = -1
		k.dialed(c)
	})
	return k
}

// wasCut reports that a connection ended by a reset.
func wasCut(c *memnet.Conn) bool { return c.WasReset() || c.Peer().WasReset() }

// register registers an app with the identity of a token.
func (k *cutter) register(ctx context.Context, opts ...relay.RegisterOption) (*relay.Listener, error) {
	return relay.Register(ctx, relayAddr, append([]relay.RegisterOption{
		relay.WithDialer(k.DialFrom("10.1.0.1")), relay.WithBackoff(100*time.Millisecond, time.Second),
	}, opts...)...)
}

// expectServed fails the test unless a transfer goes well, for client and app.
func (k *cutter) expectServed(ln net.Listener) {
	k.t.Helper()
	x := k.book.transfer(dialogue, 100, 100)
	if err := k.visit(x, ln.Addr().String(), time.Hour); err != nil {
		k.t.Errorf("%v: %v", x, err)
	}
	synctest.Wait()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.app != nil || !x.appOver {
		k.t.Errorf("%v: the app: %v", x, x.app)
	}
}

// namedTLS trusts the relay whatever its address.
func namedTLS() *tls.Config {
	config := clientTLS()
	config.ServerName = "relay.example"
	return config
}

// A registration that is cut at any byte fails with an error that says so or succeeds;
// with WithWait it always succeeds. It leaves nothing behind but a lease for its time,
// which the same identity can take up at once.
func TestCutRegistration(t *testing.T) {
	token := []relay.ServerOption{relay.WithTokens("of one identity")}
	for _, tt := range []struct {
		name   string
		server []relay.ServerOption
		app    []relay.RegisterOption
		slice  int
		every  int // offset
		codes  []relay.Code
		again  relay.RegisterOption // what the next one needs to succeed
	}{
		{name: "plain", every: 1},
		{name: "name and port", app: []relay.RegisterOption{relay.WithName("web"), relay.WithPort(8000)}, again: relay.WithWait(), every: 1},
		{name: "shared", app: []relay.RegisterOption{relay.WithName("web"), relay.WithShared()}, every: 1},
		{name: "single bytes", app: []relay.RegisterOption{relay.WithPort(8000)}, again: relay.WithWait(), slice: 1, every: 1},
		{name: "token", server: token, every: 1, app: []relay.RegisterOption{
			relay.WithToken("of one identity"), relay.WithName("web"), relay.WithPort(8000)}},
		{name: "TLS", every: figure(1, 13, 101), codes: []relay.Code{relay.CodeTLS},
			server: []relay.ServerOption{relay.WithTLSConfig(relayTLS())},
			app:    []relay.RegisterOption{relay.WithTLSConfig(namedTLS()), relay.WithPort(8000)}, again: relay.WithWait()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, wait := range []bool{false, true} {
				failed, whole := 0, false
				for n := 0; !whole; n += tt.every {
					inMemory(t, func(t *testing.T, net *memnet.Network) {
						r := startOn(t, net, append(tt.server, relay.WithLogger(nil), relay.WithLease(10*time.Second))...)
						k := newCutter(t, net)
						k.slice = tt.slice
						k.cutDial = int64(n)
						var f bool
						f, whole = k.cutRegistration(r, n, wait, tt.codes, tt.app, tt.again)
						if f {
							failed++
						}
					})
					if t.Failed() {
						return
					}
				}
				if !wait && failed < 100/tt.every {
					t.Errorf("only %d registrations failed", failed)
				}
				t.Logf("wait %v: %d registrations failed", wait, failed)
			}
		})
	}
}

func (k *cutter) cutRegistration(r *memRelay, n int, wait bool, codes []relay.Code, opts []relay.RegisterOption, again relay.RegisterOption) (failed, whole bool) {
	t := k.t
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	first := opts
	if wait {
		first = append(slices.Clip(opts), relay.WithWait())
	}
	l, err := k.register(ctx, first...)
	synctest.Wait()
	if err != nil {
		if wait {
			t.Fatalf("cut after %d bytes: %v", n, err)
		}
		re, ok := err.(*relay.RegisterError)
		if !ok || re.Code != relay.CodeNotRelay && !slices.Contains(codes, re.Code) {
			t.Errorf("cut after %d bytes: %#v", n, err)
		}
		// Whatever the relay has made of it, the app can be had again.
		if l, err = k.register(ctx, append(slices.Clip(opts), again)...); err != nil {
			t.Fatalf("again, after a cut after %d bytes: %v", n, err)
		}
	}
	failed, whole = k.dials > 1, k.dials == 1 && !wasCut(k.transport)
	k.transport.CutAfter(-1) // it is about registering
	served := make(chan error, 1)
	go func() { served <- k.serve(l) }()
	k.expectServed(l)
	if l.Close() != nil || !errors.Is(<-served, net.ErrClosed) {
		t.Errorf("cut after %d bytes: Close or Accept", n)
	}
	<-l.Done()
	time.Sleep(time.Minute) // more than a lease
	synctest.Wait()
	if s := r.Services(); len(s) != 0 || k.Listeners() != 1 || len(k.Conns()) != 0 {
		t.Errorf("cut after %d bytes: left are the services %+v, %d listeners, %d connections", n, s, k.Listeners(), len(k.Conns()))
	}
	if err := listens(k.Network, l.Addr()); err != nil {
		t.Errorf("cut after %d bytes: the port is not free: %v", n, err)
	}
	k.book.close()
	return failed, whole
}

// An app that comes back is cut at any byte of that too, and is back in the end, at its
// address.
func TestCutReturn(t *testing.T) {
	inMemory(t, func(t *testing.T, net *memnet.Network) {
		startOn(t, net, relay.WithLogger(nil))
		k := newCutter(t, net)
		l, err := k.register(t.Context(), relay.WithName("web"))
		if err != nil {
			t.Fatal(err)
		}
		go k.serve(l)
		addr := l.Addr().String()
		for n, whole := 0, false; !whole && !t.Failed(); n++ {
			dials := k.dials
			k.cutDial = int64(n)
			k.transport.Cut()
			time.Sleep(5 * time.Second)
			synctest.Wait()
			whole = k.dials == dials+1
			k.transport.CutAfter(-1)
			k.expectServed(l)
			if got := l.Addr().String(); got != addr {
				t.Errorf("cut after %d bytes: it is at %s and was at %s", n, got, addr)
			}
		}
		if s := l.Stats(); s.Reconnects < 200 || !s.Connected {
			t.Errorf("the app's figures: %+v", s)
		}
		l.Close()
		<-l.Done()
		k.book.close()
	})
}

// A transfer that is cut at any byte, of the app's connection to the relay or of the
// client's, is whole at an end or that end has an error; and the next one at the same
// address goes well.
func TestCutTransfer(t *testing.T) {
	for _, tt := range []struct {
		name     string
		habit    habit
		up, down int
		client   bool // it is the client's connection that is cut
		slice    int
		every    int // offset
	}{
		{name: "a request's session", habit: request, up: 3000, down: 3000, every: figure(1, 3, 31)},
		{name: "a dialogue's session", habit: dialogue, up: 3000, down: 3000, every: figure(1, 5, 31)},
		{name: "a short request's session", habit: request, up: 100, down: 100, every: 1},
		{name: "a short dialogue's session, in single bytes", habit: dialogue, up: 100, down: 100, slice: 1, every: 1},
		{name: "a long request's session", habit: request, up: 600_000, down: 600_000, every: figure(499, 9973, 99991)},
		{name: "a request's client", habit: request, up: 3000, down: 3000, client: true, every: figure(1, 3, 31)},
		{name: "a duplex's client", habit: duplex, up: 3000, down: 3000, client: true, every: figure(1, 5, 31)},
		{name: "a short request's client", habit: request, up: 100, down: 100, client: true, every: 1},
		{name: "a short dialogue's client, in single bytes", habit: dialogue, up: 100, down: 100, client: true, slice: 1, every: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, net *memnet.Network) {
				r := startOn(t, net, relay.WithLogger(nil))
				k := newCutter(t, net)
				k.slice = tt.slice
				l, err := k.register(t.Context(), relay.WithName("web"))
				if err != nil {
					t.Fatal(err)
				}
				go k.serve(l)
				addr := l.Addr().String()
				k.expectServed(l)
				failed, n := 0, 0
				for whole := false; !whole && !t.Failed(); n += tt.every {
					cut := k.transport
					if tt.client {
						k.cutClient = int64(n)
					} else {
						cut.CutAfter(int64(n))
					}
					x := k.book.transfer(tt.habit, tt.up, tt.down)
					if k.visit(x, addr, time.Hour) != nil {
						failed++
					}
					synctest.Wait()
					if !k.quiet() {
						t.Fatalf("%v, cut after %d bytes, is not over at the app", x, n)
					}
					if tt.client {
						cut = k.client
					}
					whole = !wasCut(cut)
					cut.CutAfter(-1)
					k.expectServed(l)
					if got := l.Addr().String(); got != addr {
						t.Fatalf("it is at %s and was at %s", got, addr)
					}
				}
				if least := (tt.up + tt.down) / tt.every; failed < least {
					t.Errorf("%d transfers failed, want %d at least", failed, least)
				}
				t.Logf("cut up to byte %d, %d transfers failed", n, failed)
				if s := r.service(t); len(s.Clients) != 0 || s.Waiting != 0 {
					t.Errorf("left are clients: %+v", s)
				}
				l.Close()
				<-l.Done()
				k.book.close()
			})
		})
	}
}

// A client that takes nothing and whose connection is then reset, which may show in a
// write to it first, is not taken by the app for one that is done.
func TestCutWhileBothWait(t *testing.T) {
	for name, limits := range map[string]relay.Limits{"plain": {}, "throttled": {ClientBytesPerSecond: 1 << 40}} {
		t.Run(name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, net *memnet.Network) {
				startOn(t, net, relay.WithLogger(nil), relay.WithLimits(limits))
				k := newCutter(t, net)
				l, err := k.register(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				for range figure(5000, 500, 200) { // it takes some to hit the moment
					c := client(t, net, l.Addr())
					app, err := l.Accept()
					if err != nil {
						t.Fatal(err)
					}
					go app.Write(make([]byte, 128<<10)) // more than the client's buffers hold
					c.Write([]byte("not all"))
					read := make(chan error)
					go func() {
						_, err := io.Copy(io.Discard, app)
						read <- err
					}()
					synctest.Wait()
					c.Cut()
					if err := <-read; !isReset(err) {
						t.Fatalf("the app reads %v", err)
					}
					app.Close()
					c.Close()
				}
			})
		})
	}
}

// A climate is what a chaos lives in: how long things take, on average or at most.
type climate struct {
	lasts time.Duration

	// The relay and the apps. Zero is the default that it stands for.
	interval, dead       time.Duration // heartbeat
	lease                time.Duration
	backoff, backoffMost time.Duration
	limits               relay.Limits

	// The load.
	clients  int
	pause    time.Duration // between two transfers of a client
	patience time.Duration // of a client
	stall    time.Duration // of a reader, and:
	annoyed  time.Duration // the patience of the one that writes to it
	life     time.Duration // of an app that comes and goes
	reign    time.Duration // of a relay; 0: for ever
	grace    time.Duration // of Shutdown, and what it takes to start again

	// The gremlin.
	act     time.Duration // between two faults
	latency time.Duration
	fault   time.Duration // of one that passes
	mild    bool          // nothing that breaks a connection

	recovery time.Duration // bounds the wait for all to be well when nothing is wrong any more
}

// A chaos is a relay, apps and clients on a network with a gremlin in it.
type chaos struct {
	*book
	climate climate
	stop    chan struct{}  // closed when the load is to end
	load    sync.WaitGroup // all that ends then
	closing chan struct{}  // closed when apps need not be there any more
	stay    sync.WaitGroup // apps that end then
	streams atomic.Uint64  // of random numbers

	tls   bool       // between the apps and the relay
	state sync.Mutex // guards what follows
	srv   *relay.Server
	ended chan error        // what its Serve returned
	apps  []*relay.Listener // all that there ever were
}

// The public ports of the apps that are there all the time. The relay gives out others
// from the same range, so that after a restart they may find theirs taken for a while.
const (
	firstKeeper = 8001 // these never close their listener
	firstCloser = 8004 // these do, and register again
	firstShared = 8006 // these have two members, which are replaced in turn
	lastShared  = 8007
	lastPublic  = 8100
)

func publicAddr(port int) string { return fmt.Sprint("10.0.0.1:", port) }

func startChaos(t testing.TB, n *memnet.Network, c climate, seed uint64) *chaos {
	w := &chaos{book: newBook(t, n, seed), climate: c, stop: make(chan struct{}), closing: make(chan struct{})}
	w.tls = seed%2 == 1
	if seed%4 > 1 {
		w.climate.limits.ClientBytesPerSecond = 4 << 20
	}
	w.book.stall, w.book.patience = c.stall, c.annoyed
	w.book.pause = func(d time.Duration) { w.passes(d) }
	n.OnConn(w.connects)
	w.startRelay()
	srv, _ := w.relay()
	for p := firstKeeper; p < firstCloser; p++ {
		w.begin(&w.load, func(rnd *rand.Rand) {
			w.register(rnd, "", relay.WithName(fmt.Sprint("keeper ", p)), relay.WithPort(p))
		})
	}
	for p := firstCloser; p < firstShared; p++ {
		w.begin(&w.stay, func(rnd *rand.Rand) { w.comeAndGo(rnd, fmt.Sprint("closer ", p), p) })
	}
	for p := firstShared; p <= lastShared; p++ {
		for range 2 {
			w.begin(&w.load, func(rnd *rand.Rand) { w.replace(rnd, fmt.Sprint("shared ", p), p) })
		}
	}
	w.await("the apps that stay", func() bool {
		here := 0
		for _, info := range srv.Services() {
			if !strings.HasPrefix(info.Name, "closer ") {
				here++
			}
		}
		return here == firstCloser-firstKeeper+lastShared-firstShared+1
	})
	for range c.clients {
		w.begin(&w.load, w.visits)
	}
	w.begin(&w.load, w.plague)
	if c.reign > 0 {
		w.begin(&w.load, w.restart)
	}
	if !c.mild {
		w.begin(&w.load, w.passBy)
		w.begin(&w.load, w.disturb)
		w.begin(&w.load, w.disconnect)
	}
	return w
}

// begin starts a part of it all.
func (w *chaos) begin(wg *sync.WaitGroup, f func(rnd *rand.Rand)) {
	rnd := rand.New(rand.NewPCG(w.seed, 1<<40+w.streams.Add(1)))
	wg.Go(func() { f(rnd) })
}

// passes waits for d, and reports whether the load goes on.
func (w *chaos) passes(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-w.stop:
		return false
	}
}

// upTo draws a time.
func upTo(rnd *rand.Rand, d time.Duration) time.Duration {
	return 1 + time.Duration(rnd.Int64N(int64(d)))
}

// connects is for every new connection, before its ends get it.
func (w *chaos) connects(dialed, _ *memnet.Conn) {
	if dialed.RemoteAddr().String() != relayAddr {
		w.dialed(dialed)
	}
	if !isClosed(w.stop) {
		dialed.SetLatency(w.climate.latency / 10)
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// await is eventually with the climate's patience.
func (w *chaos) await(what string, is func() bool) {
	w.t.Helper()
	giveUp := time.Now().Add(w.climate.recovery)
	for !is() {
		if time.Now().After(giveUp) {
			w.t.Fatalf("never: %s\n\n%s", what, stacks())
		}
		<-time.After(max(w.climate.recovery/10_000, time.Millisecond))
	}
}

// awaitAll waits for all of a group to end.
func (w *chaos) awaitAll(what string, wg *sync.WaitGroup) {
	w.t.Helper()
	ended := make(chan struct{})
	go func() {
		wg.Wait()
		close(ended)
	}()
	w.await(what, func() bool { return isClosed(ended) })
}

// The relay.

func (w *chaos) startRelay() {
	opts := []relay.ServerOption{
		relay.WithListen(w.n.Listen), relay.WithLease(w.climate.lease), relay.WithLimits(w.climate.limits),
		relay.WithTokens("chaos"), relay.WithPorts(firstKeeper, lastPublic),
		relay.WithHeartbeat(w.climate.interval, w.climate.dead), relay.WithEvents(w.relayTells),
	}
	if w.tls {
		opts = append(opts, relay.WithTLSConfig(relayTLS()))
	}
	srv, err := relay.NewServer(opts...)
	if err != nil {
		w.t.Error(err)
		return
	}
	ln, err := w.n.Listen(context.Background(), "tcp", relayAddr)
	if err != nil {
		w.t.Error(err)
		return
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(ln) }()
	w.state.Lock()
	defer w.state.Unlock()
	w.srv, w.ended = srv, ended
}

func (w *chaos) relayTells(ev relay.Event) {
	w.count("relay: " + string(ev.Kind))
	if ev.Kind != relay.EventClientLeft || ev.Err != nil {
		return
	}
	// Both sides ended in order, it says.
	w.book.mu.Lock()
	x := w.at[ev.Remote]
	w.book.mu.Unlock()
	if sent := x.down.sent.Load(); !x.down.over.Load() || ev.BytesOut != sent {
		w.t.Errorf("%v: %d bytes from the app, which sent %d, went well for the relay", x, ev.BytesOut, sent)
	}
	if x.vice == quits && x.sinner == "app" {
		return // what the client sent then is of no use
	}
	if sent := x.up.sent.Load(); !x.up.over.Load() || ev.BytesIn != sent {
		w.t.Errorf("%v: %d bytes from the client, which sent %d, went well for the relay", x, ev.BytesIn, sent)
	}
}

// relay returns the relay of the time, and what tells that its Serve has returned.
func (w *chaos) relay() (*relay.Server, <-chan error) {
	w.state.Lock()
	defer w.state.Unlock()
	return w.srv, w.ended
}

// stopRelay ends the relay, and returns when the next one can listen.
func (w *chaos) stopRelay(way string, grace time.Duration) {
	srv, ended := w.relay()
	w.count("relay: " + way)
	end := func() {
		ctx, cancel := context.WithTimeout(context.Background(), grace)
		defer cancel()
		if way == "close" {
			srv.Close()
		} else if srv.Shutdown(ctx) != nil {
			w.count("relay: shutdown cut short")
		}
		for kind, n := range srv.Refusals() {
			w.counts("refused: "+kind, int(n))
		}
		if s := srv.Services(); len(s) != 0 {
			w.t.Errorf("after %s there are services: %+v", way, s)
		}
	}
	if way == "succession" {
		w.load.Go(end)
	} else {
		end()
	}
	if err := <-ended; err != relay.ErrServerClosed {
		w.t.Errorf("Serve: %v", err)
	}
}

// restart ends one relay after the other.
func (w *chaos) restart(rnd *rand.Rand) {
	for w.passes(w.climate.reign/2 + upTo(rnd, w.climate.reign)) {
		w.stopRelay([]string{"close", "shutdown", "succession"}[rnd.IntN(3)], upTo(rnd, w.climate.grace))
		if rnd.IntN(2) == 0 {
			w.passes(upTo(rnd, w.climate.grace))
		}
		w.startRelay()
	}
}

// disconnect is a harsh operator.
func (w *chaos) disconnect(rnd *rand.Rand) {
	for w.passes(upTo(rnd, 4*w.climate.life)) {
		srv, _ := w.relay()
		switch err := srv.Disconnect(fmt.Sprint("closer ", firstCloser+rnd.IntN(firstShared-firstCloser))); err {
		case nil:
			w.count("relay: disconnected an app")
		case relay.ErrNoService:
		default:
			w.t.Errorf("Disconnect: %v", err)
		}
	}
}

// The apps.

func (w *chaos) options(rnd *rand.Rand, opts ...relay.RegisterOption) []relay.RegisterOption {
	if w.tls {
		opts = append(opts, relay.WithTLSConfig(namedTLS()))
	}
	return append(opts,
		relay.WithDialer(w.n.DialFrom(fmt.Sprint("10.1.0.", 1+rnd.IntN(200)))), relay.WithToken("chaos"),
		relay.WithHeartbeat(w.climate.interval, w.climate.dead), relay.WithBackoff(w.climate.backoff, w.climate.backoffMost),
		relay.WithEvents(func(ev relay.Event) { w.count("app: " + string(ev.Kind)) }))
}

// register registers an app for as long as that takes, and serves its clients. Its
// Accept fails after Close alone, or with the given code.
func (w *chaos) register(rnd *rand.Rand, mayEnd relay.Code, opts ...relay.RegisterOption) *relay.Listener {
	ctx, cancel := context.WithTimeout(context.Background(), w.climate.lasts+w.climate.recovery)
	defer cancel()
	l, err := relay.Register(ctx, relayAddr, w.options(rnd, append(opts, relay.WithWait())...)...)
	if err != nil {
		w.t.Errorf("an app that waits: %v", err)
		return nil
	}
	w.serves(l, mayEnd)
	return l
}

func (w *chaos) serves(l *relay.Listener, mayEnd relay.Code) {
	w.state.Lock()
	w.apps = append(w.apps, l)
	w.state.Unlock()
	go func() {
		err := w.serve(l)
		if !errors.Is(err, net.ErrClosed) && (mayEnd == "" || code(err) != mayEnd) {
			w.t.Errorf("Accept at %v: %v", l.Addr(), err)
		}
	}()
}

// comeAndGo is an app that closes its listener and registers again, which it also does
// when it was disconnected.
func (w *chaos) comeAndGo(rnd *rand.Rand, name string, port int) {
	for {
		l := w.register(rnd, relay.CodeDisconnected, relay.WithName(name), relay.WithPort(port))
		if l == nil {
			return
		}
		over := time.After(upTo(rnd, w.climate.life))
		if isClosed(w.stop) {
			over = nil
		}
		select {
		case <-over:
			w.count("app: closes")
			l.Close()
		case <-l.Done():
			w.count("app: was disconnected")
		case <-w.closing:
			return
		}
	}
}

// replace is a member of a shared name. Its successor is there before it goes.
func (w *chaos) replace(rnd *rand.Rand, name string, port int) {
	var last *relay.Listener
	for {
		l := w.register(rnd, "", relay.WithName(name), relay.WithPort(port), relay.WithShared())
		if last != nil {
			w.count("app: was replaced")
			last.Close()
		}
		if last = l; l == nil || !w.passes(upTo(rnd, w.climate.life)) {
			return
		}
	}
}

// passBy is an app that takes what address it gets, for some clients, if it gets one
// before its patience ends.
func (w *chaos) passBy(rnd *rand.Rand) {
	for w.passes(upTo(rnd, w.climate.life/4)) {
		ctx, cancel := context.WithTimeout(context.Background(), upTo(rnd, w.climate.life/4))
		l, err := relay.Register(ctx, relayAddr, w.options(rnd)...)
		cancel()
		if err != nil {
			if code(err) == "" {
				w.t.Errorf("an app that does not wait: %v", err)
			}
			w.count("app: could not register: " + string(code(err)))
			continue
		}
		w.count("app: passes by")
		w.serves(l, "")
		for range 1 + rnd.IntN(3) {
			w.visit(w.random(rnd), l.Addr().String(), w.climate.patience)
		}
		l.Close()
	}
}

// disturb is somebody who knocks at the relay's door and has nothing to say, or
// nothing that makes sense.
func (w *chaos) disturb(rnd *rand.Rand) {
	for w.passes(upTo(rnd, w.climate.life/4)) {
		c, err := w.n.DialFrom("10.3.0.1")(context.Background(), "tcp", relayAddr)
		if err != nil {
			continue
		}
		c.SetDeadline(time.Now().Add(w.climate.patience))
		at := rnd.IntN(len(noise()))
		c.Write(noise()[at:min(len(noise()), at+rnd.IntN(100))])
		w.passes(upTo(rnd, w.climate.grace))
		c.Close()
	}
}

// The clients.

// random makes a transfer of any kind.
func (w *chaos) random(rnd *rand.Rand) *transfer {
	size := func() int { return 1 + rnd.IntN(1<<rnd.IntN(21)) }
	x := w.transfer(habit(rnd.IntN(int(habits))), size(), size())
	if rnd.IntN(4) > 0 {
		return x
	}
	x.vice = vice(rnd.IntN(int(vices)))
	sins, listens := &x.up, &x.down
	if x.sinner = "client"; rnd.IntN(2) == 0 {
		x.sinner = "app"
		sins, listens = listens, sins
	}
	if x.vice == stalls {
		sins = listens
	}
	x.at = rnd.IntN(len(sins.all))
	return x
}

func (w *chaos) visits(rnd *rand.Rand) {
	for w.passes(upTo(rnd, w.climate.pause)) {
		port := firstKeeper + rnd.IntN(lastShared-firstKeeper+1)
		if w.climate.mild && firstCloser <= port && port < firstShared {
			continue // nobody may be there
		}
		x := w.random(rnd)
		err := w.visit(x, publicAddr(port), w.climate.patience)
		result := "failed"
		if err == nil {
			result = "went well"
		}
		w.count(fmt.Sprintf("%v, %v: %s", x.habit, x.vice, result))
		// An app that is replaced may refuse a client that has sent more than the relay
		// keeps for another app.
		refusable := port >= firstShared && len(x.up.all) > 64<<10
		if err != nil && w.climate.mild && x.vice == none && !refusable {
			w.t.Errorf("%v: the client: %v", x, err)
		}
	}
}

// The gremlin.

// A fault befalls a connection. What it returns, if anything, ends it.
type fault struct {
	name  string
	harsh bool
	do    func(w *chaos, rnd *rand.Rand, c *memnet.Conn) (undo func())
}

var faults = []fault{
	{"latency", false, func(w *chaos, rnd *rand.Rand, c *memnet.Conn) func() {
		c.SetLatency(upTo(rnd, w.climate.latency))
		return nil
	}},
	{"slices", false, func(_ *chaos, rnd *rand.Rand, c *memnet.Conn) func() {
		c.SetSlice(1 + rnd.IntN(1<<rnd.IntN(10)))
		return func() { c.SetSlice(0) }
	}},
	{"small buffer", false, func(_ *chaos, rnd *rand.Rand, c *memnet.Conn) func() {
		c.SetBuffer(1 + rnd.IntN(1<<rnd.IntN(14)))
		return func() { c.SetBuffer(0) }
	}},
	{"freeze", false, func(_ *chaos, _ *rand.Rand, c *memnet.Conn) func() {
		c.Freeze()
		return c.Thaw
	}},
	{"frozen for good", true, func(_ *chaos, _ *rand.Rand, c *memnet.Conn) func() {
		c.Freeze()
		return nil
	}},
	{"cut", true, func(_ *chaos, _ *rand.Rand, c *memnet.Conn) func() {
		c.Cut()
		return nil
	}},
	{"cut later", true, func(_ *chaos, rnd *rand.Rand, c *memnet.Conn) func() {
		c.CutAfter(rnd.Int64N(1 << rnd.IntN(20)))
		return nil
	}},
	{"dialer vanishes", true, func(_ *chaos, rnd *rand.Rand, c *memnet.Conn) func() { return vanish(rnd, c, c) }},
	{"relay vanishes", true, func(_ *chaos, rnd *rand.Rand, c *memnet.Conn) func() { return vanish(rnd, c, c.Peer()) }},
}

// vanish has an end of c go away without a word to the other, which at most gets a
// reset later.
func vanish(rnd *rand.Rand, c, end *memnet.Conn) (undo func()) {
	c.Freeze()
	end.SetLinger(0)
	end.Close()
	if rnd.IntN(2) == 0 {
		return c.Thaw
	}
	return nil
}

func (w *chaos) plague(rnd *rand.Rand) {
	for w.passes(upTo(rnd, w.climate.act)) {
		kind := "client"
		if rnd.IntN(3) == 0 {
			kind = "session"
		}
		conns := slices.DeleteFunc(w.n.Conns(), func(c *memnet.Conn) bool {
			return (c.RemoteAddr().String() == relayAddr) != (kind == "session")
		})
		f := faults[rnd.IntN(len(faults))]
		if len(conns) == 0 || f.harsh && w.climate.mild {
			continue
		}
		w.count("fault: " + kind + ", " + f.name)
		if undo := f.do(w, rnd, conns[rnd.IntN(len(conns))]); undo != nil {
			d := upTo(rnd, w.climate.fault)
			w.load.Go(func() {
				w.passes(d)
				undo()
			})
		}
	}
}

// heal undoes all faults.
func (w *chaos) heal() {
	for _, c := range w.n.Conns() {
		c.CutAfter(-1)
		c.SetLatency(0)
		c.SetSlice(0)
		c.SetBuffer(0)
		c.Thaw()
	}
}

// run lets it go on for its time. Then it wants all to be well without the gremlin, and
// nothing left when all is closed.
func (w *chaos) run() {
	w.passes(w.climate.lasts)
	close(w.stop)
	w.heal()
	w.awaitAll("the end of the load", &w.load)
	w.heal() // the last that the gremlin did

	for p := firstKeeper; p <= lastShared; p++ {
		w.await("a client served at "+publicAddr(p), func() bool {
			return w.visit(w.transfer(dialogue, 1000, 1000), publicAddr(p), w.climate.patience) == nil
		})
	}
	w.await("room for a crowd", w.crowd)

	close(w.closing)
	w.awaitAll("the end of the apps", &w.stay)
	for _, l := range w.apps {
		l.Close()
	}
	for _, l := range w.apps {
		w.await("Done", func() bool { return isClosed(l.Done()) })
		s := l.Stats()
		if s.Live != 0 || s.Connected {
			w.t.Errorf("an app when it is over: %+v", s)
		}
		w.counts("app: reconnects", int(s.Reconnects))
	}
	srv, _ := w.relay()
	w.await("the end of all services", func() bool { return len(srv.Services()) == 0 })
	w.await("the end of all of the apps' clients", w.quiet)
	w.stopRelay("close", 0)
	w.await("no connections and listeners", func() bool { return len(w.n.Conns()) == 0 && w.n.Listeners() == 0 })
	w.book.close()
	for _, what := range slices.Sorted(maps.Keys(w.figures)) {
		w.t.Logf("%7d %s", w.figures[what], what)
	}
}

// crowd has as many clients served at once as the relay takes, and reports whether all
// were: those who have left are not counted.
func (w *chaos) crowd() bool {
	size := w.climate.limits.Clients
	var came, failed atomic.Int64
	all := make(chan struct{})
	come := func() {
		if int(came.Add(1)) == size {
			close(all)
		}
	}
	var clients sync.WaitGroup
	for i := range size {
		x := w.transfer(dialogue, 10, 10)
		met := false
		x.meet = func() {
			met = true
			come()
			<-all
		}
		clients.Go(func() {
			addr := publicAddr(firstKeeper + i%(lastShared-firstKeeper+1))
			if w.visit(x, addr, w.climate.recovery) != nil {
				failed.Add(1)
			}
			if !met {
				come()
			}
		})
	}
	clients.Wait()
	return failed.Load() == 0
}

// chaosSeed returns RELAY_SEED, or else another number each time.
func chaosSeed(t testing.TB) uint64 {
	seed := rand.Uint64()
	if s := os.Getenv("RELAY_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("RELAY_SEED=%d", seed)
	return seed
}

// expectAll fails the test unless everything that can happen did.
func (w *chaos) expectAll() {
	w.t.Helper()
	var all []string
	for h := range habits {
		all = append(all, fmt.Sprintf("%v, %v: went well", h, none))
		for v := range vices {
			all = append(all, fmt.Sprintf("%v, %v: failed", h, v))
		}
	}
	for _, f := range faults {
		all = append(all, "fault: client, "+f.name, "fault: session, "+f.name)
	}
	for _, k := range []relay.EventKind{relay.EventRegistered, relay.EventLost, relay.EventResumed, relay.EventRefused, relay.EventEnded} {
		all = append(all, "app: "+string(k), "relay: "+string(k))
	}
	for _, k := range []relay.EventKind{relay.EventClient, relay.EventClientLeft, relay.EventClientRefused} {
		all = append(all, "relay: "+string(k))
	}
	all = append(all, "app: draining", "app: closes", "app: was disconnected", "app: was replaced", "app: passes by",
		"app: reconnects", "relay: close", "relay: shutdown", "relay: succession", "relay: shutdown cut short")
	for _, what := range all {
		if w.figures[what] == 0 {
			w.t.Errorf("never: %s", what)
		}
	}
}

// Under random load and random faults every transfer is whole or fails at both ends; and
// in the end all are back and nothing is left. RELAY_LONG has it go on for minutes.
func TestChaos(t *testing.T) {
	check := nothingLeft(t)
	w := startChaos(t, memnet.New(), climate{
		lasts:    time.Duration(figure(180, 5, 2)) * time.Second,
		interval: 200 * time.Millisecond, dead: 600 * time.Millisecond,
		lease:   2 * time.Second,
		backoff: 5 * time.Millisecond, backoffMost: 100 * time.Millisecond,
		limits: relay.Limits{
			Clients: 100, HandshakeTime: time.Second, WaitTime: time.Second, IdleTime: 1500 * time.Millisecond,
			StallTime: time.Second, LingerTime: 1200 * time.Millisecond,
		},
		clients: 16, pause: 40 * time.Millisecond, patience: 3 * time.Second,
		stall: 700 * time.Millisecond, annoyed: 300 * time.Millisecond,
		life: time.Second, reign: 3 * time.Second, grace: 200 * time.Millisecond,
		act: 20 * time.Millisecond, latency: 10 * time.Millisecond, fault: 500 * time.Millisecond,
		recovery: 30 * time.Second,
	}, chaosSeed(t))
	w.run()
	check()
	if long() {
		w.expectAll()
	}
}

// The same on a fake clock, for hours, and with the times that are the defaults.
func TestChaosForHours(t *testing.T) {
	seed := chaosSeed(t)
	theCerts() // which on the fake clock would not last
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		w := startChaos(t, n, climate{
			lasts:   time.Duration(figure(3*60, 10, 5)) * time.Minute,
			limits:  relay.Limits{Clients: 100, IdleTime: 2 * time.Minute},
			clients: 16, pause: 10 * time.Second, patience: 4 * time.Minute,
			stall: 6 * time.Minute, annoyed: time.Minute,
			life: 5 * time.Minute, reign: 20 * time.Minute, grace: 20 * time.Second,
			act: 5 * time.Second, latency: 500 * time.Millisecond, fault: time.Minute,
			recovery: time.Hour,
		}, seed)
		w.run()
		if long() {
			w.expectAll()
		}
	})
}

// Where nothing breaks, and apps are only replaced, every transfer goes well.
func TestRoughWeather(t *testing.T) {
	seed := chaosSeed(t)
	theCerts() // which on the fake clock would not last
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		w := startChaos(t, n, climate{
			lasts:   time.Duration(figure(3*60, 10, 5)) * time.Minute,
			limits:  relay.Limits{Clients: 100},
			clients: 16, pause: 10 * time.Second, patience: time.Hour,
			stall: 4 * time.Minute, annoyed: time.Minute,
			life: 5 * time.Minute,
			// What is frozen for longer than half a heartbeat may be taken for dead when a
			// client comes.
			act: time.Second, latency: 200 * time.Millisecond, fault: 2 * time.Second,
			mild:     true,
			recovery: 10 * time.Hour,
		}, seed)
		w.run()
		for _, what := range []string{"app: was replaced", "fault: session, freeze"} {
			if w.figures[what] == 0 {
				t.Errorf("never: %s", what)
			}
		}
	})
}
