package peers

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/mux"
)

// TestStockPeer has sessions of internal/mux and of the stock libraries talk to
// each other, in both roles, over streams opened by either.
func TestStockPeer(t *testing.T) {
	cases := []struct {
		name string
		run  func(t *testing.T, p *stockPair)
	}{
		{"Echo", peerEcho},
		{"Bulk", peerBulk},
		{"ManyStreams", peerManyStreams},
		{"OurHalfClose", peerOurHalfClose},
		{"TheirHalfClose", peerTheirHalfClose},
		{"OurClose", peerOurClose},
		{"OurCloseBig", peerOurCloseBig},
		{"TheirClose", peerTheirClose},
		{"OurReset", peerOurReset},
		{"StoppedReader", peerStoppedReader},
		{"GoAway", func(t *testing.T, p *stockPair) { peerGoAway(t, p, "") }},
		{"GoAwayText", func(t *testing.T, p *stockPair) { peerGoAway(t, p, "bye") }},
		{"GoAwayLongText", func(t *testing.T, p *stockPair) { peerGoAway(t, p, strings.Repeat("good bye ", 10_000)) }},
		{"OurSessionClose", peerOurSessionClose},
		{"TheirSessionClose", peerTheirSessionClose},
		{"TransportLost", peerTransportLost},
	}
	for _, lib := range stockLibraries {
		for _, role := range []string{"ourClient", "ourServer"} {
			for _, opener := range []string{"weOpen", "theyOpen"} {
				for _, c := range cases {
					t.Run(strings.Join([]string{lib.name, role, opener, c.name}, "/"), func(t *testing.T) {
						c.run(t, newStockPair(t, lib, role == "ourClient", opener == "weOpen", 0))
					})
				}
			}
			t.Run(strings.Join([]string{lib.name, role, "weOpen", "BacklogFull"}, "/"), func(t *testing.T) {
				peerTheirBacklogFull(t, newStockPair(t, lib, role == "ourClient", true, 1))
			})
			t.Run(strings.Join([]string{lib.name, role, "theyOpen", "BacklogFull"}, "/"), func(t *testing.T) {
				peerOurBacklogFull(t, newStockPair(t, lib, role == "ourClient", false, 1))
			})
		}
	}
}

// stockPair is a session of ours and one of a stock library, connected.
type stockPair struct {
	ours      *mux.Session
	theirs    *stockSession
	transport net.Conn // their end
	weOpen    bool
}

func newStockPair(t *testing.T, lib stockLibrary, ourClient, weOpen bool, backlog int) *stockPair {
	t.Helper()
	a, b, err := tcpPair()
	if err != nil {
		t.Fatal(err)
	}
	start := mux.Server
	if ourClient {
		start = mux.Client
	}
	p := &stockPair{
		ours:      start(a, mux.Config{Backlog: backlog}),
		theirs:    lib.start(b, !ourClient, uint32(backlog)),
		transport: b,
		weOpen:    weOpen,
	}
	stop := func() {
		p.theirs.close()
		p.ours.Close()
	}
	watchdog := time.AfterFunc(patience, stop) // not all stock streams have deadlines
	t.Cleanup(func() {
		watchdog.Stop()
		stop()
	})
	return p
}

// stream returns the two ends of a new stream.
func (p *stockPair) stream(t *testing.T) (*mux.Stream, stockStream) {
	t.Helper()
	if !p.weOpen {
		return p.streamTheyOpen(t)
	}
	our, err := p.ours.Open(nil)
	if err != nil {
		t.Fatal("our Open:", err)
	}
	their, err := p.theirs.accept()
	if err != nil {
		t.Fatal("their Accept:", err)
	}
	return our, their
}

func (p *stockPair) streamTheyOpen(t *testing.T) (*mux.Stream, stockStream) {
	t.Helper()
	their, err := p.theirs.open()
	if err != nil {
		t.Fatal("their Open:", err)
	}
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(their, "SYN") // it takes a write for us to hear of it
		sent <- err
	}()
	our, err := p.ours.Accept()
	if err != nil {
		t.Fatal("our Accept:", err)
	}
	got := make([]byte, 3)
	if _, err := io.ReadFull(our, got); string(got) != "SYN" {
		t.Fatalf("our first Read: %q, %v", got, err)
	}
	if err := <-sent; err != nil {
		t.Fatal("their first Write:", err)
	}
	return our, their
}

// wantAll reads r to its clean end and checks that it held n bytes of seed.
func wantAll(t *testing.T, who string, r io.Reader, seed uint64, n int64) {
	t.Helper()
	if sum, got, err := digest(r); err != nil || sum != testDigest(seed, n) {
		t.Errorf("%s read %d bytes, SHA-256 %s, %v, want %d, %s", who, got, sum, err, n, testDigest(seed, n))
	}
}

// sendAll writes n bytes of seed to w and then calls end.
func sendAll(t *testing.T, who string, w io.Writer, seed uint64, n int64, end func() error) {
	t.Helper()
	if _, err := io.Copy(w, testData(seed, n)); err != nil {
		t.Errorf("%s sent: %v", who, err)
	}
	if err := end(); err != nil {
		t.Errorf("%s ended: %v", who, err)
	}
}

// alongside starts f and returns what waits for its end: a goroutine that may fail
// the test must not outlive it.
func alongside(f func()) (wait func()) {
	var wg sync.WaitGroup
	wg.Go(f)
	return wg.Wait
}

func peerEcho(t *testing.T, p *stockPair) {
	our, their := p.stream(t)
	for i := range 100 {
		wantExchange(t, our, their, fmt.Sprint("ping ", i))
		wantExchange(t, their, our, fmt.Sprint("pong ", i))
	}
}

// bothWays sends n bytes each way at once and half-closes both.
func bothWays(t *testing.T, our *mux.Stream, their stockStream, seed uint64, n int64) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { sendAll(t, "we", our, seed, n, our.CloseWrite) })
	wg.Go(func() { sendAll(t, "they", their, seed+1, n, their.CloseWrite) })
	wg.Go(func() { wantAll(t, "we", our, seed+1, n) })
	wg.Go(func() { wantAll(t, "they", their, seed, n) })
}

func peerBulk(t *testing.T, p *stockPair) {
	our, their := p.stream(t)
	bothWays(t, our, their, 30, 8<<20)
}

func peerManyStreams(t *testing.T, p *stockPair) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for i := range uint64(32) {
		our, their := p.stream(t)
		wg.Go(func() { bothWays(t, our, their, 2*i, 300_000) })
	}
}

func peerOurHalfClose(t *testing.T, p *stockPair) {
	our, their := p.stream(t)
	defer alongside(func() { sendAll(t, "we", our, 31, 1<<20, our.CloseWrite) })()
	wantAll(t, "they", their, 31, 1<<20)
	defer alongside(func() { sendAll(t, "they", their, 32, 1<<20, their.CloseWrite) })()
	wantAll(t, "we", our, 32, 1<<20)
	if _, err := our.Write([]byte("more")); err == nil {
		t.Error("a Write after CloseWrite succeeded")
	}
}

func peerTheirHalfClose(t *testing.T, p *stockPair) {
	our, their := p.stream(t)
	defer alongside(func() { sendAll(t, "they", their, 33, 1<<20, their.CloseWrite) })()
	wantAll(t, "we", our, 33, 1<<20)
	defer alongside(func() { sendAll(t, "we", our, 34, 1<<20, our.CloseWrite) })()
	wantAll(t, "they", their, 34, 1<<20)
}

// peerOurClose closes before the peer has read anything. What was written stands.
func peerOurClose(t *testing.T, p *stockPair) {
	our, their := p.stream(t)
	sendAll(t, "we", our, 35, 200_000, our.Close)
	wantAll(t, "they", their, 35, 200_000)
}

func peerOurCloseBig(t *testing.T, p *stockPair) {
	our, their := p.stream(t)
	defer alongside(func() { sendAll(t, "we", our, 36, 8<<20, our.Close) })()
	wantAll(t, "they", their, 36, 8<<20)
}

// peerTheirClose closes the stock end before ours has read anything, and then sends
// to it.
func peerTheirClose(t *testing.T, p *stockPair) {
	our, their := p.stream(t)
	sendAll(t, "they", their, 37, 200_000, their.Close)
	wantAll(t, "we", our, 37, 200_000)
	_, err := io.Copy(our, testData(38, 1<<40))
	wantReset(t, err, mux.StreamClosed)
}

// wantReset checks that err is that of a stream that the peer reset with code.
func wantReset(t *testing.T, err error, code mux.Code) {
	t.Helper()
	reset, ok := errors.AsType[*mux.StreamError](err)
	if !ok || reset.Code != code || !reset.Remote || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a reset by the peer with code %v", err, code)
	}
}

func peerOurReset(t *testing.T, p *stockPair) {
	our, their := p.stream(t)
	wantExchange(t, our, their, "before")
	our.SetLinger(0)
	our.Close()
	_, err := io.ReadAll(their)
	if code := p.theirs.code(err); code != mux.StreamReset {
		t.Errorf("their Read ended with %v, code %v, want %v", err, code, mux.StreamReset)
	}
	_, err = io.Copy(their, testData(39, 1<<40))
	if code := p.theirs.code(err); code != mux.StreamReset {
		t.Errorf("their Write ended with %v, code %v, want %v", err, code, mux.StreamReset)
	}
}

// peerStoppedReader fills the window of a stream that the peer does not read. Others
// go on; and what the Write that timed out said it had written, the peer reads.
func peerStoppedReader(t *testing.T, p *stockPair) {
	our, their := p.stream(t)
	data := testBytes(40, 1<<20)
	n := 0
	for n < mux.Window {
		our.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		sent, err := our.Write(data[n:])
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("Write to a peer that does not read: %d, %v, want a timeout", sent, err)
		}
		n += sent
	}
	if n > mux.Window {
		t.Errorf("%d bytes went into a window of %d", n, mux.Window)
	}
	other, others := p.stream(t)
	bothWays(t, other, others, 41, 1<<20)

	our.SetWriteDeadline(time.Time{})
	defer alongside(func() {
		if _, err := our.Write(data[n:]); err != nil {
			t.Error("Write after the deadline was cleared:", err)
		}
		our.CloseWrite()
	})()
	if got, err := io.ReadAll(their); err != nil || !bytes.Equal(got, data) {
		t.Errorf("they read %d bytes, %v, want the %d that we wrote", len(got), err, len(data))
	}
}

// peerTheirBacklogFull opens more streams than the peer takes.
func peerTheirBacklogFull(t *testing.T, p *stockPair) {
	first, err := p.ours.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	second, err := p.ours.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = second.Read(make([]byte, 1))
	wantReset(t, err, mux.AcceptQueueFull)
	their, err := p.theirs.accept()
	if err != nil {
		t.Fatal(err)
	}
	wantExchange(t, first, their, "the first is unharmed")
}

// peerOurBacklogFull has the peer open more streams than we take.
func peerOurBacklogFull(t *testing.T, p *stockPair) {
	var streams []stockStream
	for range 2 {
		their, err := p.theirs.open()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(their, "SYN"); err != nil {
			t.Fatal(err)
		}
		streams = append(streams, their)
	}
	_, err := streams[1].Read(make([]byte, 1))
	if code := p.theirs.code(err); code != mux.AcceptQueueFull {
		t.Errorf("their Read ended with %v, code %v, want %v", err, code, mux.AcceptQueueFull)
	}
	our, err := p.ours.Accept()
	if err != nil {
		t.Fatal(err)
	}
	wantExchange(t, our, streams[0], "the first is unharmed")
	wantExchange(t, streams[0], bytesAfter(our, "SYN"), "and both ways")
}

// bytesAfter returns r without the text that it starts with.
func bytesAfter(r io.Reader, text string) io.Reader {
	io.ReadFull(r, make([]byte, len(text)))
	return r
}

// peerGoAway has the peer say that it takes no more streams, with a text that must
// be consumed exactly. The streams that there are go on, and the peer may open more.
func peerGoAway(t *testing.T, p *stockPair, text string) {
	our, their := p.stream(t)
	if err := p.theirs.goAway(text); err != nil {
		t.Fatal(err)
	}
	wantExchange(t, their, our, "behind the GOAWAY")
	if _, err := p.ours.Open(nil); err != mux.ErrGoneAway {
		t.Errorf("our Open returned %v, want ErrGoneAway", err)
	}
	another, theirs := p.streamTheyOpen(t)
	bothWays(t, another, theirs, 42, 1<<20)
	bothWays(t, our, their, 44, 1<<20)
}

func peerOurSessionClose(t *testing.T, p *stockPair) {
	our, their := p.stream(t)
	wantExchange(t, our, their, "before")
	p.ours.Close()
	// 255 would be a clean io.EOF.
	if _, err := their.Read(make([]byte, 1)); err == nil || p.theirs.code(err) == 255 {
		t.Errorf("their Read after our session's end: %v", err)
	}
	if _, err := p.theirs.accept(); err == nil {
		t.Error("their Accept after our session's end succeeded")
	}
	if _, err := our.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("our Read after our session's end: %v", err)
	}
}

func peerTheirSessionClose(t *testing.T, p *stockPair) {
	sessionLost(t, p, func() { p.theirs.close() })
}

func peerTransportLost(t *testing.T, p *stockPair) {
	sessionLost(t, p, func() { p.transport.Close() })
}

// sessionLost checks what our open streams and our session return when the session
// ends by way of end: an error, which is no end of file.
func sessionLost(t *testing.T, p *stockPair, end func()) {
	our, their := p.stream(t)
	wantExchange(t, our, their, "before")
	end()
	got, err := io.ReadAll(our)
	if lost, ok := errors.AsType[*mux.SessionError](err); len(got) > 0 || !ok || errors.Is(err, io.EOF) {
		t.Errorf("our Read returned %q, %v (%v), want a SessionError", got, err, lost)
	}
	await(t, p.ours.Done(), "our session to end")
	if err := p.ours.Err(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("our session ended with %v", err)
	}
	for what, err := range map[string]error{
		"Write":  errOf(our.Write([]byte("x"))),
		"Open":   errOf(p.ours.Open(nil)),
		"Accept": errOf(p.ours.Accept()),
	} {
		if _, ok := errors.AsType[*mux.SessionError](err); !ok {
			t.Errorf("our %s returned %v, want a SessionError", what, err)
		}
	}
}

func errOf[T any](_ T, err error) error { return err }
