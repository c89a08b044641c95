package mux

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay/internal/leak"
)

// TestCloseSession says goodbye to a peer that listens, behind what was queued, at
// once, and leaves no goroutine behind.
func TestCloseSession(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		st := openStream(t, s)
		p.send(synFrame(r.theirs(1), ""))
		accept(t, s)
		accepted, read := make(chan error, 1), goReadAll(st)
		go func() {
			_, err := s.Accept()
			accepted <- err
		}()
		data := pattern(1, 100_000)
		st.Write(data)
		start := time.Now()
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		checkNoGoroutines(t)
		if took := time.Since(start); took != 0 {
			t.Errorf("Close took %v", took)
		}
		if err := sessionError(t, s); err.Code != NoError || err.Remote || !errors.Is(err, net.ErrClosed) {
			t.Errorf("the session ended with %+v", err)
		}
		if err := <-accepted; err != s.Err() {
			t.Errorf("the Accept under way: %v", err)
		}
		if got := <-read; got.err != s.Err() {
			t.Errorf("the Read under way: %v", got.err)
		}
		<-p.done
		frames := p.took()
		if !bytes.Equal(payload(frames, st.ID()), data) {
			t.Error("what was written before Close did not arrive")
		}
		if last := frames[len(frames)-1]; !last.is(goAwayFrame(r.theirs(1), NoError, "")) || p.err != io.EOF {
			t.Errorf("the session ended with %v, and %v", last, p.err)
		}
		for range 2 { // again, and at once
			var all sync.WaitGroup
			for range 3 {
				all.Go(func() { s.Close() })
			}
			all.Wait()
		}
	})
}

// checkNoGoroutines fails the test if the session of the bubble has any left.
func checkNoGoroutines(t *testing.T) {
	t.Helper()
	for _, stack := range leak.Stacks() {
		if strings.Contains(stack, "mux.(*Session).readFrames(") || strings.Contains(stack, "mux.(*writer).run(") {
			t.Errorf("a goroutine is left:\n%s", stack)
		}
	}
}

// TestCloseStuckSession closes a session whose transport takes nothing, which cannot
// take longer than goodbyeTime, and one whose transport hangs in Close too, as that
// of TLS does when it wants to say goodbye itself.
func TestCloseStuckSession(t *testing.T) {
	for _, test := range []struct {
		name string
		wrap func(net.Conn) net.Conn
	}{
		{"plain", func(c net.Conn) net.Conn { return c }},
		{"hanging", func(c net.Conn) net.Conn { return &hangingConn{Conn: c, gone: make(chan struct{})} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				c1, c2 := net.Pipe()
				defer c2.Close()
				s := r.start(test.wrap(c1), Config{})
				st := openStream(t, s)
				calls := startStuckCalls(st)
				start := time.Now()
				closed := make(chan struct{})
				go func() {
					s.Close()
					checkNoGoroutines(t)
					close(closed)
				}()
				synctest.Wait()
				if s.Err() == nil {
					t.Error("the session goes on")
				}
				calls.check(t, s.Err(), s.Err()) // these need not wait for the goodbye
				<-closed
				if took := time.Since(start); took > goodbyeTime {
					t.Errorf("Close took %v", took)
				}
			})
		})
	}
}

// hangingConn sends something when it is closed, like a tls.Conn, which nobody takes.
type hangingConn struct {
	net.Conn
	gone chan struct{}
	once sync.Once
}

func (c *hangingConn) Close() error {
	<-c.gone
	return nil
}

func (c *hangingConn) NetConn() net.Conn { return hangingInner{c} }

type hangingInner struct{ *hangingConn }

func (c hangingInner) Close() error {
	c.once.Do(func() { close(c.gone) })
	return c.Conn.Close()
}

// TestCloseWithError tells the peer the code, and the streams the reason.
func TestCloseWithError(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		s.CloseWithError(EnhanceYourCalm, io.ErrNoProgress)
		checkNoGoroutines(t)
		if err := sessionError(t, s); err.Code != EnhanceYourCalm || err.Remote || !errors.Is(err, io.ErrNoProgress) {
			t.Errorf("the session ended with %+v", err)
		}
		<-p.done
		if f := p.takeOne(); !f.is(goAwayFrame(0, EnhanceYourCalm, "")) {
			t.Errorf("the session sent %v", f)
		}
	})
}

// TestFinish ends a session that has all the time it needs: to say what is queued on
// a transport that is stuck for long, and to wait until the peer has closed it.
func TestFinish(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		c1, c2 := newLine(lineConfig{room: 1})
		s, p := r.start(c1, Config{}), newRawPeer(t, c2)
		st := openStream(t, s)
		data := pattern(1, 100_000)
		st.Write(data)
		st.CloseWrite()
		read := goReadAll(st)
		finished := make(chan struct{})
		go func() {
			s.Finish()
			checkNoGoroutines(t)
			close(finished)
		}()
		time.Sleep(time.Hour)
		if err := sessionError(t, s); err.Code != NoError || err.Remote || !errors.Is(err, net.ErrClosed) {
			t.Errorf("the session ended with %+v", err)
		}
		if got := <-read; got.err != s.Err() {
			t.Errorf("the Read under way: %v", got.err)
		}
		p.listen()
		<-p.done
		frames := p.took()
		if !bytes.Equal(payload(frames, st.ID()), data) {
			t.Error("what was written before Finish did not arrive")
		}
		if last := frames[len(frames)-1]; !last.is(goAwayFrame(0, NoError, "")) || p.err != io.EOF {
			t.Errorf("the session ended with %v, and %v", last, p.err)
		}
		// Whatever the peer has still under way is passed over.
		p.sendSlowly(slices.Concat(synFrame(r.theirs(1), "late"), dataFrame(r.theirs(1), []byte("late"), fin),
			dataFrame(st.ID(), []byte("late"), fin), wndIncFrame(st.ID(), 1), rstFrame(st.ID(), StreamReset)))
		time.Sleep(time.Hour)
		select {
		case <-finished:
			t.Error("Finish did not wait for the peer")
		default:
		}
		c2.Close()
		<-finished
	})
}

// TestFinishCutShort ends the patience of Finish in its three ways, on a transport that
// is stuck and on one where only the peer's end is waited for.
func TestFinishCutShort(t *testing.T) {
	for _, listens := range []bool{false, true} {
		for _, test := range []struct {
			name   string
			end    func(*Session, *rawPeer)
			within time.Duration
		}{
			{"Close", func(s *Session, _ *rawPeer) { go s.Close() }, goodbyeTime},
			{"CloseWithError", func(s *Session, _ *rawPeer) { go s.CloseWithError(InternalError, io.ErrNoProgress) }, goodbyeTime},
			{"loss of the transport", func(_ *Session, p *rawPeer) { p.conn.Close() }, goodbyeTime},
		} {
			t.Run(fmt.Sprintf("listens=%v/%s", listens, test.name), func(t *testing.T) {
				inBubble(t, func(t *testing.T, r role) {
					c1, c2 := newLine(lineConfig{room: 1})
					s, p := r.start(c1, Config{}), newRawPeer(t, c2)
					defer c2.Close()
					if listens {
						p.listen()
					}
					openStream(t, s)
					finished := make(chan struct{})
					go func() {
						s.Finish()
						close(finished)
					}()
					time.Sleep(time.Hour)
					start := time.Now()
					test.end(s, p)
					<-finished
					if took := time.Since(start); took > test.within {
						t.Errorf("it took %v", took)
					}
					if err := sessionError(t, s); !errors.Is(err, net.ErrClosed) {
						t.Errorf("the session ended with %+v", err)
					}
				})
			})
		}
	}
}

// TestFailedWriteHidesNothing has a transport whose Write fails while the peer's last
// frames are still under way. They count, and so does what they say of the end.
func TestFailedWriteHidesNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		c1, c2 := net.Pipe()
		s, p := r.start(&brokenConn{Conn: c1, write: io.ErrClosedPipe}, Config{}), newRawPeer(t, c2)
		st := openStream(t, s)
		read := goReadAll(st)
		time.Sleep(goodbyeTime / 2)
		p.send(dataFrame(st.ID(), []byte("last words"), fin), goAwayFrame(st.ID(), EnhanceYourCalm, ""))
		c2.Close()
		<-s.Done()
		if got := <-read; string(got.b) != "last words" || got.err != nil {
			t.Errorf("read %q, %v", got.b, got.err)
		}
		if err := sessionError(t, s); err.Code != EnhanceYourCalm || !err.Remote {
			t.Errorf("the session ended with %+v", err)
		}
		s.Close()
	})
}

// TestBothEndsLearn ends one end of a session and looks at the other.
func TestBothEndsLearn(t *testing.T) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			c1, c2 := tr.pair(t)
			client, server := sessionPair(t, c1, c2, Config{})
			streamPair(t, client, server)
			server.CloseWithError(InternalError, io.ErrNoProgress)
			await(t, client.Done(), "end of the client")
			if err := sessionError(t, client); err.Code != InternalError || !err.Remote {
				t.Errorf("the client ended with %+v", err)
			}
		})
	}
}

// TestTransportErrors ends the session with what the transport's Read or Write
// returned.
func TestTransportErrors(t *testing.T) {
	broken := errors.New("broken")
	for _, test := range []struct {
		name string
		conn func(net.Conn) *brokenConn
		do   func(*Session)
	}{
		{"Read", func(c net.Conn) *brokenConn { return &brokenConn{Conn: c, read: broken} }, func(*Session) {}},
		{"Write", func(c net.Conn) *brokenConn { return &brokenConn{Conn: c, write: broken} }, func(s *Session) { s.Open(nil) }},
		{"empty Reads", func(c net.Conn) *brokenConn { return &brokenConn{Conn: c, empty: true} }, func(*Session) {}},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				c1, c2 := net.Pipe()
				defer c2.Close()
				s := r.start(test.conn(c1), Config{})
				newRawPeer(t, c2).listen()
				test.do(s)
				<-s.Done()
				want := broken
				if test.name == "empty Reads" {
					want = io.ErrNoProgress
				}
				if err := sessionError(t, s); err.Code != NoError || err.Remote || !errors.Is(err, want) {
					t.Errorf("the session ended with %+v, want %v", err, want)
				}
				s.Close()
				checkNoGoroutines(t)
				if !errors.Is(s.Err(), want) {
					t.Errorf("Close changed the error to %v", s.Err())
				}
			})
		})
	}
}

// TestPeerSpeaksTLS has a peer that answers our frames with a TLS alert, which is
// shorter than a frame, and hangs up. Less than the start of a record says nothing.
func TestPeerSpeaksTLS(t *testing.T) {
	for sent, want := range map[string]bool{
		"\x15\x03\x01\x00\x02\x02\x0a": true,
		"\x14\x03":                     true,
		"\x15":                         false,
		"\x13\x03\x01":                 false,
		"\x18\x03\x01":                 false,
	} {
		t.Run(fmt.Sprintf("%q", sent), func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				s, p := rawSession(t, r, Config{})
				openStream(t, s)
				synctest.Wait()
				p.send([]byte(sent))
				p.conn.Close()
				<-s.Done()
				err := sessionError(t, s)
				if errors.Is(err, ErrTLS) != want || !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), fmt.Sprintf("%q", sent)) {
					t.Errorf("the session ended with %v", err)
				}
			})
		})
	}
	inBubble(t, func(t *testing.T, r role) { // what comes later is no start
		s, p := rawSession(t, r, Config{})
		p.send(synFrame(r.theirs(1), ""), []byte("\x16\x03\x01\x02\x00\x01\x00\x01"))
		<-s.Done()
		if err := sessionError(t, s); errors.Is(err, ErrTLS) {
			t.Errorf("the session ended with %v", err)
		}
	})
}

type brokenConn struct {
	net.Conn
	read, write error
	empty       bool
}

func (c *brokenConn) Read(p []byte) (int, error) {
	switch {
	case c.read != nil:
		return 0, c.read
	case c.empty:
		return 0, nil
	}
	return c.Conn.Read(p)
}

func (c *brokenConn) Write(p []byte) (int, error) {
	if c.write != nil {
		return 0, c.write
	}
	return c.Conn.Write(p)
}

// TestFirstErrorWins ends a session for many reasons at once. There is one error
// everywhere, and it is there before Done is closed.
func TestFirstErrorWins(t *testing.T) {
	for i := range 50 {
		c1, c2 := tcpPair(t)
		client, server := sessionPair(t, c1, c2, Config{})
		a, b := streamPair(t, client, server)
		var all sync.WaitGroup
		var seen [6]error
		for i := range seen {
			all.Go(func() {
				switch i % 3 {
				case 0:
					<-client.Done()
					seen[i] = client.Err()
				case 1:
					_, seen[i] = a.Read(make([]byte, 1))
				case 2:
					_, seen[i] = client.Accept()
				}
			})
		}
		for _, end := range []func(){
			func() { client.CloseWithError(InternalError, io.ErrNoProgress) },
			func() { client.CloseWithError(FlowControlError, io.ErrShortWrite) },
			func() { client.Close() },
			func() { server.CloseWithError(ProtocolError, io.ErrShortBuffer) },
			func() { c1.Close() },
			func() { c2.Write(bytes.Repeat([]byte{0xff}, 100)) },
		} {
			all.Go(end)
		}
		all.Wait()
		for j, err := range seen {
			if err == nil || err != client.Err() {
				t.Errorf("round %d: observer %d saw %v, the session ended with %v", i, j, err, client.Err())
			}
		}
		a.Close()
		b.Close()
		server.Close()
	}
}

// TestOnEnd calls the function of OnEnd once when the sending side ends by the peer
// or with the session, at once if it has, and never for what was done here.
func TestOnEnd(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		var calls [5]atomic.Int32
		var errs [5]error
		watch := func(i int, st *Stream) {
			st.OnEnd(func(err error) { errs[i] = err; calls[i].Add(1) })
		}
		var streams [5]*Stream
		for i := range streams {
			streams[i] = openStream(t, s)
			watch(i, streams[i])
		}
		p.send(rstFrame(streams[0].ID(), StreamCancelled), rstFrame(streams[0].ID(), StreamCancelled))
		p.send(finFrame(streams[1].ID())) // no end of the sending side
		streams[2].Close()
		streams[3].SetLinger(0)
		streams[3].Close()
		synctest.Wait()
		for i, want := range []int32{1, 0, 0, 0, 0} {
			if got := calls[i].Load(); got != want {
				t.Errorf("stream %d: %d calls, want %d", i, got, want)
			}
		}
		streams[0].Close()
		s.Close()
		for i, want := range []int32{1, 1, 0, 0, 1} {
			if got := calls[i].Load(); got != want {
				t.Errorf("stream %d: %d calls in the end, want %d", i, got, want)
			}
		}
		if want := (&StreamError{StreamCancelled, true}); !sameError(errs[0], want) {
			t.Errorf("OnEnd got %v, want %v", errs[0], want)
		}
		if errs[1] != s.Err() || errs[4] != s.Err() {
			t.Errorf("OnEnd got %v and %v, want %v", errs[1], errs[4], s.Err())
		}
		watch(4, streams[4]) // another function
		if got := calls[4].Load(); got != 2 {
			t.Errorf("OnEnd of a stream that has ended did not call at once")
		}
	})
}

// tlsPair returns a TLS connection over TCP.
func tlsPair(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	cert, roots := tlsCert(t)
	c1, c2 := tcpPair(t)
	client := tls.Client(c1, &tls.Config{RootCAs: roots, ServerName: "test"})
	server := tls.Server(c2, &tls.Config{Certificates: []tls.Certificate{cert}})
	shaken := make(chan error, 1)
	go func() { shaken <- server.Handshake() }()
	if err := errors.Join(client.Handshake(), <-shaken); err != nil {
		t.Fatal(err)
	}
	return client, server
}

func tlsCert(t testing.TB) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"test"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(parsed)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
}

// TestLastWords closes a session right behind the last bytes of its streams, while
// the peer sends without end. What was said before Close arrives, and its end.
func TestLastWords(t *testing.T) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			c1, c2 := tr.pair(t)
			client, server := sessionPair(t, c1, c2, Config{})
			noise, noiseB := streamPair(t, server, client)
			go noise.ReadFrom(zeros{})
			go noiseB.WriteTo(io.Discard)
			a, b := streamPair(t, client, server)
			read := goReadAll(b)
			words := pattern(9, Window)
			if n, err := a.Write(words); n != len(words) || err != nil {
				t.Fatalf("Write: %d, %v", n, err)
			}
			a.CloseWrite()
			client.Close()
			if got := await(t, read, "end of the stream"); !bytes.Equal(got.b, words) || got.err != nil {
				t.Errorf("the last words: %d bytes of %d, or other ones: %v", len(got.b), len(words), got.err)
			}
		})
	}
}

// TestEverythingAtOnce calls everything of two sessions from many goroutines, for the
// race detector, and because none may hang or leave anything behind.
func TestEverythingAtOnce(t *testing.T) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			c1, c2 := tr.pair(t)
			client, server := sessionPair(t, c1, c2, Config{Backlog: 4, MaxStreams: 40, MaxUnread: 1 << 20})
			var all sync.WaitGroup
			for i, s := range []*Session{client, server} {
				all.Go(func() {
					for st := range acceptedBy(s) {
						all.Go(func() { useStream(st, 7+i) })
					}
				})
				for j := range 8 {
					all.Go(func() {
						for k := range 30 {
							st, err := s.Open([]byte("opening"))
							if err == nil {
								useStream(st, i+j+k)
							}
							if j > 0 {
								continue
							}
							switch k { // in the midst of it
							case 5:
								s.EnableStop()
							case 15:
								client.RefuseStreams()
							case 20:
								server.ForbidStreams()
							case 25:
								s.Close()
							}
						}
					})
				}
				all.Go(func() {
					for range 100 {
						s.Refused()
						s.LastHeard()
						s.LastSent()
						s.OpensLeft()
						s.Err()
						s.LocalAddr()
						s.RemoteAddr()
					}
				})
			}
			all.Wait()
			for _, s := range []*Session{client, server} {
				if n := s.unread.Load(); n < 0 {
					t.Errorf("%d bytes are unread", n)
				}
			}
		})
	}
}

// acceptedBy yields the streams that s accepts.
func acceptedBy(s *Session) func(func(*Stream) bool) {
	return func(yield func(*Stream) bool) {
		for {
			if st, err := s.Accept(); err != nil || !yield(st) {
				return
			}
		}
	}
}

// useStream calls everything of st at once and returns when all calls have.
func useStream(st *Stream, seed int) {
	var all sync.WaitGroup
	for _, call := range []func(){
		func() { io.CopyN(io.Discard, st, 10_000) },
		func() { st.WriteTo(io.Discard) },
		func() { st.Peek(make([]byte, 100)) },
		func() { st.Write(make([]byte, 100)) },
		func() { st.Write(make([]byte, 70_000)) },
		func() { st.ReadFrom(bytes.NewReader(make([]byte, 70_000))) },
		func() {
			st.Counts()
			st.Unread()
			st.Progress()
			st.Session()
			st.ID()
			st.Ended()
			st.LocalAddr()
			st.RemoteAddr()
		},
		func() { st.OnEnd(func(error) {}) },
		func() { st.Keep(seed % 2 * 100_000); st.Kept() },
		func() { st.SetReadDeadline(time.Now().Add(time.Millisecond)) },
		func() { st.SetWriteDeadline(time.Now().Add(time.Millisecond)) },
		func() { st.CloseWrite() },
		func() { st.SetLinger(seed % 2) },
		func() { st.Refuse() },
		func() { st.Close() },
		func() { st.Close() },
	} {
		all.Go(call)
	}
	all.Wait()
}

// TestCodes prints what the errors say, which users see in their logs.
func TestCodes(t *testing.T) {
	for want, err := range map[string]error{
		"stream reset by peer: stream refused":             &StreamError{StreamRefused, true},
		"stream reset: enhance your calm":                  &StreamError{EnhanceYourCalm, false},
		"stream reset by peer: code 77":                    &StreamError{Code(77), true},
		"session ended: EOF":                               &SessionError{Err: io.EOF},
		"session ended by peer: protocol error: EOF":       &SessionError{ProtocolError, true, io.EOF},
		"session ended: flow control error: short write":   &SessionError{FlowControlError, false, io.ErrShortWrite},
		"session ended by peer: accept queue full: closed": &SessionError{AcceptQueueFull, true, errors.New("closed")},
	} {
		if got := fmt.Sprint(err); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	for code := range EnhanceYourCalm + 1 { // muxado's numbers
		if got := code.String(); got == "" || got != codeNames[code] {
			t.Errorf("code %d is %q", code, got)
		}
	}
}

// TestConfigDefaults fills in what a Config leaves out, and keeps what it says.
func TestConfigDefaults(t *testing.T) {
	queue := make(chan *Stream, 1)
	def := Config{nil, 128, nil, 1 << 16, 1<<30 - 1, 40 << 20, 256 << 20}
	for _, test := range []struct{ cfg, want Config }{
		{Config{}, def},
		{Config{nil, -1, nil, -1, -1, -1, -1}, def},
		{Config{nil, 1, queue, 2, 4, Window + 1, 3}, Config{nil, 1, queue, 2, 4, Window + 1, 3}},
		{Config{MaxWindow: Window - 1, MaxOpens: 1 << 30}, Config{nil, 128, nil, 1 << 16, 1<<30 - 1, Window, 256 << 20}},
	} {
		got := test.cfg
		got.setDefaults()
		if !reflect.DeepEqual(got, test.want) {
			t.Errorf("%+v became %+v, want %+v", test.cfg, got, test.want)
		}
	}
}
