package relay_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

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
	l, err := signUp(ctx, relayAddr, w.options(rnd, append(opts, relay.WithWait())...)...)
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
		l, err := signUp(ctx, relayAddr, w.options(rnd)...)
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
		// Who was connected when a session was lost may be closed a little later.
		w.await("no clients", func() bool { return l.Stats().Live == 0 })
		s := l.Stats()
		if s.Connected {
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
