package memnet

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay/internal/tcptest"
)

// An end is what *net.TCPConn and *Conn have in common.
type end interface {
	net.Conn
	CloseWrite() error
	SetLinger(sec int) error
}

var _, _ end = (*net.TCPConn)(nil), (*Conn)(nil)

func skipUnlessLinux(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("what memnet does is what Linux does")
	}
}

// memPair returns the ends of a connection, the dialed one first. They are closed at
// the end of the test, when nothing may be left of the network.
func memPair(t *testing.T) (a, b *Conn) {
	t.Helper()
	n := New()
	ln := listen(t, n, "127.0.0.1:0")
	a = dial(t, n, ln.Addr().String())
	b = accept(t, ln)
	if a.Peer() != b || b.Peer() != a {
		t.Error("the ends are not each other's peers")
	}
	ln.Close()
	t.Cleanup(func() {
		a.Close()
		b.Close()
		if got := n.Conns(); len(got) != 0 {
			t.Errorf("%d connections are left", len(got))
		}
		for _, p := range []*pipe{a.in, a.out} {
			if len(p.way) > 0 || p.buf.Cap() > 0 {
				t.Errorf("left: %d parcels, a buffer of %d", len(p.way), p.buf.Cap())
			}
		}
	})
	return a, b
}

// conduct is what holds for both kinds of connection. Each function gets a fresh one,
// and settle, which returns when all that was started waits; over TCP, where that
// cannot be known, at once. So the functions hold in either case.
var conduct = []struct {
	name string
	f    func(t *testing.T, a, b end, settle func())
}{
	{"addresses", testAddresses},
	{"empty reads and writes", testEmpty},
	{"half-close and bulk both ways", testBulk},
	{"writes take turns", testTurns},
	{"close wakes waiting calls", testCloseWakes},
	{"CloseWrite wakes a waiting Write", testCloseWriteWakes},
	{"a reset wakes waiting calls", testResetWakes},
	{"bytes that arrived outlive the reset", testResetBehindBytes},
	{"close with unread bytes resets", testCloseUnread},
	{"a closed peer answers with a reset", testWriteToClosed},
	{"deadlines", testDeadlines},
	{"deadlines move while calls wait", testMovedDeadlines},
	{"a Write is cut short by its deadline", testPartialWrite},
	{"after Close", testAfterClose},
}

func TestConduct(t *testing.T) {
	for _, tt := range conduct {
		t.Run(tt.name, func(t *testing.T) {
			t.Run("tcp", func(t *testing.T) {
				skipUnlessLinux(t)
				a, b := tcptest.Pair(t)
				tt.f(t, a, b, func() {})
			})
			t.Run("memnet", func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					a, b := memPair(t)
					tt.f(t, a, b, synctest.Wait)
				})
			})
			t.Run("memnet sliced and slow", func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					a, b := memPair(t)
					b.SetSlice(1000)
					b.SetLatency(time.Millisecond)
					tt.f(t, a, b, synctest.Wait)
				})
			})
		})
	}
}

// A result is what a call returned.
type result struct {
	n   int
	err error
}

func goRead(c net.Conn, size int) <-chan result {
	ch := make(chan result, 1)
	go func() {
		n, err := c.Read(make([]byte, size))
		ch <- result{n, err}
	}()
	return ch
}

func goWrite(c net.Conn, size int) <-chan result {
	ch := make(chan result, 1)
	go func() {
		n, err := c.Write(make([]byte, size))
		ch <- result{n, err}
	}()
	return ch
}

// tooMuch is more than the buffers of a TCP connection hold.
const tooMuch = 64 << 20

func write(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if n, err := c.Write([]byte(s)); n != len(s) || err != nil {
		t.Fatalf("Write: %d, %v", n, err)
	}
}

// expect reads just the string s.
func expect(t *testing.T, c net.Conn, s string) {
	t.Helper()
	b := make([]byte, len(s))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != s {
		t.Fatalf("read %q, %v; want %q", b[:n], err, s)
	}
}

// wantErr checks that err is target, and unless that is io.EOF, that it is an OpError
// of op as package net's.
func wantErr(t *testing.T, err error, op string, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Fatalf("%s: %v; want %v", op, err, target)
	}
	if target == io.EOF {
		if err != io.EOF {
			t.Fatalf("%s: %v is wrapped", op, err)
		}
		return
	}
	oe, ok := err.(*net.OpError)
	if !ok || oe.Op != op || oe.Net != "tcp" {
		t.Fatalf("%#v is no OpError of %s", err, op)
	}
	if oe.Timeout() != (target == os.ErrDeadlineExceeded) {
		t.Fatalf("%v: Timeout %t", err, oe.Timeout())
	}
}

// wantReset checks that err tells of a reset: ECONNRESET for the first to meet it,
// and after that what is left.
func wantReset(t *testing.T, err error, op string) {
	t.Helper()
	if errors.Is(err, syscall.ECONNRESET) {
		wantErr(t, err, op, syscall.ECONNRESET)
		return
	}
	wantErr(t, err, op, map[string]error{"read": io.EOF, "write": syscall.EPIPE}[op])
}

func testAddresses(t *testing.T, a, b end, _ func()) {
	for _, addr := range []net.Addr{a.LocalAddr(), a.RemoteAddr(), b.LocalAddr(), b.RemoteAddr()} {
		if tcp, ok := addr.(*net.TCPAddr); !ok || !tcp.IP.IsLoopback() || tcp.Port == 0 || addr.Network() != "tcp" {
			t.Errorf("address %#v", addr)
		}
	}
	if a.LocalAddr().String() != b.RemoteAddr().String() || a.RemoteAddr().String() != b.LocalAddr().String() {
		t.Errorf("%v to %v, but %v from %v", a.LocalAddr(), a.RemoteAddr(), b.LocalAddr(), b.RemoteAddr())
	}
}

func testEmpty(t *testing.T, a, b end, _ func()) {
	write(t, a, "")
	if n, err := b.Read(nil); n != 0 || err != nil {
		t.Errorf("empty Read: %d, %v", n, err)
	}
	write(t, a, "x")
	expect(t, b, "x")
	a.CloseWrite()
	_, err := b.Read(make([]byte, 1))
	wantErr(t, err, "read", io.EOF)
	if n, err := b.Read(nil); n != 0 || err != nil {
		t.Errorf("empty Read at the end: %d, %v", n, err)
	}
	_, err = a.Write(nil)
	wantErr(t, err, "write", syscall.EPIPE)
}

func testBulk(t *testing.T, a, b end, _ func()) {
	const size = 1 << 20
	done := make(chan error, 4)
	for i, c := range []end{a, b} {
		go func() {
			src := io.LimitReader(rand.NewChaCha8([32]byte{byte(i)}), size)
			_, err := io.Copy(struct{ io.Writer }{c}, src)
			done <- errors.Join(err, c.CloseWrite())
		}()
		go func() {
			got, err := io.ReadAll(c)
			want := make([]byte, size)
			rand.NewChaCha8([32]byte{byte(1 - i)}).Read(want)
			if err == nil && !bytes.Equal(got, want) {
				err = fmt.Errorf("end %d got %d bytes, other than were sent", i, len(got))
			}
			done <- err
		}()
	}
	for range 4 {
		if err := await(t, done, "end of the exchange"); err != nil {
			t.Error(err)
		}
	}
}

func testTurns(t *testing.T, a, b end, _ func()) {
	const writers, size = 4, 200_000
	done := make(chan error, writers)
	for i := range writers {
		go func() {
			_, err := a.Write(bytes.Repeat([]byte{byte(i)}, size))
			done <- err
		}()
	}
	got := make([]byte, writers*size)
	if _, err := io.ReadFull(b, got); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(got); i += size {
		if block := got[i : i+size]; bytes.Count(block, block[:1]) != size {
			t.Errorf("block %d is a mix of writes", i/size)
		}
	}
	for range writers {
		if err := await(t, done, "end of a Write"); err != nil {
			t.Error(err)
		}
	}
}

func testCloseWakes(t *testing.T, a, b end, settle func()) {
	r, w, w2 := goRead(a, 1), goWrite(a, tooMuch), goWrite(a, tooMuch)
	settle()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	wantErr(t, await(t, r, "end of Read").err, "read", net.ErrClosed)
	for _, ch := range []<-chan result{w, w2} {
		got := await(t, ch, "end of Write")
		wantErr(t, got.err, "write", net.ErrClosed)
		if got.n == tooMuch {
			t.Error("wrote all, and yet failed")
		}
	}
	if _, err := io.Copy(io.Discard, b); err != nil {
		t.Errorf("the peer read to %v", err)
	}
}

func testCloseWriteWakes(t *testing.T, a, b end, settle func()) {
	w := goWrite(a, tooMuch)
	settle()
	for range 2 {
		if err := a.CloseWrite(); err != nil {
			t.Error(err)
		}
	}
	got := await(t, w, "end of Write")
	wantErr(t, got.err, "write", syscall.EPIPE)
	if n, err := io.Copy(io.Discard, b); err != nil || n != int64(got.n) {
		t.Errorf("the peer read %d bytes to %v; written were %d", n, err, got.n)
	}
}

func testResetWakes(t *testing.T, a, b end, settle func()) {
	r, w := goRead(a, 1), goWrite(a, tooMuch)
	settle()
	b.SetLinger(0)
	b.Close()
	rerr, werr := await(t, r, "end of Read").err, await(t, w, "end of Write").err
	wantReset(t, rerr, "read")
	wantReset(t, werr, "write")
	if errors.Is(rerr, syscall.ECONNRESET) == errors.Is(werr, syscall.ECONNRESET) {
		t.Errorf("the reset was told not once: %v; %v", rerr, werr)
	}
	wantErr(t, a.CloseWrite(), "close", syscall.ENOTCONN)
}

func testResetBehindBytes(t *testing.T, a, b end, _ func()) {
	write(t, a, "hello")
	expect(t, b, "he")
	a.SetLinger(5)
	a.SetLinger(0)
	a.Close()
	expect(t, b, "llo")
	_, err := b.Read(make([]byte, 1))
	wantErr(t, err, "read", syscall.ECONNRESET)
	_, err = b.Read(make([]byte, 1))
	wantErr(t, err, "read", io.EOF)
	_, err = b.Write([]byte("x"))
	wantErr(t, err, "write", syscall.EPIPE)
	_, err = b.Write(nil)
	wantErr(t, err, "write", syscall.EPIPE)
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

func testCloseUnread(t *testing.T, a, b end, _ func()) {
	write(t, a, "answer")
	write(t, b, "question")
	expect(t, a, "que")
	a.Close()
	got, err := io.ReadAll(b)
	if string(got) != "answer" {
		t.Errorf("read %q", got)
	}
	wantErr(t, err, "read", syscall.ECONNRESET)
}

func testWriteToClosed(t *testing.T, a, b end, _ func()) {
	write(t, a, "bye")
	a.Close()
	_, err := b.Write([]byte("x"))
	for ; err == nil; time.Sleep(time.Millisecond) { // until the answer is here
		_, err = b.Write([]byte("x"))
	}
	wantErr(t, err, "write", syscall.EPIPE)
	if got, err := io.ReadAll(b); string(got) != "bye" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
}

func testDeadlines(t *testing.T, a, b end, _ func()) {
	write(t, b, "x")
	past := time.Now().Add(-time.Second)
	a.SetDeadline(past)
	_, err := a.Read(make([]byte, 1))
	wantErr(t, err, "read", os.ErrDeadlineExceeded)
	for _, s := range []string{"", "x"} {
		_, err = a.Write([]byte(s))
		wantErr(t, err, "write", os.ErrDeadlineExceeded)
	}
	a.SetWriteDeadline(time.Time{})
	write(t, a, "y")
	_, err = a.Read(make([]byte, 1))
	wantErr(t, err, "read", os.ErrDeadlineExceeded)
	a.SetDeadline(time.Time{})
	expect(t, a, "x")
	a.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	_, err = a.Read(make([]byte, 1))
	wantErr(t, err, "read", os.ErrDeadlineExceeded)
	a.SetReadDeadline(time.Now().Add(patience))
	write(t, b, "z")
	expect(t, a, "z")
	expect(t, b, "y")
}

func testMovedDeadlines(t *testing.T, a, b end, settle func()) {
	// Moved to earlier.
	a.SetDeadline(time.Now().Add(time.Hour))
	r, w := goRead(a, 1), goWrite(a, tooMuch)
	settle()
	a.SetDeadline(time.Now().Add(-1))
	wantErr(t, await(t, r, "end of Read").err, "read", os.ErrDeadlineExceeded)
	got := await(t, w, "end of Write")
	wantErr(t, got.err, "write", os.ErrDeadlineExceeded)

	// Set while calls wait that had none.
	a.SetDeadline(time.Time{})
	r, w = goRead(a, 1), goWrite(a, tooMuch)
	settle()
	a.SetDeadline(time.Now().Add(10 * time.Millisecond))
	wantErr(t, await(t, r, "end of Read").err, "read", os.ErrDeadlineExceeded)
	more := await(t, w, "end of Write")
	wantErr(t, more.err, "write", os.ErrDeadlineExceeded)

	// Cleared while calls wait.
	a.SetDeadline(time.Now().Add(time.Hour))
	r = goRead(a, 1)
	settle()
	a.SetDeadline(time.Time{})
	write(t, b, "x")
	if got := await(t, r, "end of Read"); got.n != 1 || got.err != nil {
		t.Errorf("Read: %v", got)
	}
	a.CloseWrite()
	if n, err := io.Copy(io.Discard, b); err != nil || n != int64(got.n+more.n) {
		t.Errorf("the peer read %d bytes to %v; written were %d and %d", n, err, got.n, more.n)
	}
}

func testPartialWrite(t *testing.T, a, b end, settle func()) {
	w := goWrite(a, tooMuch)
	expect(t, b, "\x00")
	settle()
	a.SetWriteDeadline(time.Now())
	got := await(t, w, "end of Write")
	wantErr(t, got.err, "write", os.ErrDeadlineExceeded)
	if got.n == 0 || got.n == tooMuch {
		t.Errorf("%d bytes were written", got.n)
	}
	if _, err := io.ReadFull(b, make([]byte, got.n-1)); err != nil {
		t.Error(err)
	}
	a.SetWriteDeadline(time.Time{})
	write(t, a, "more")
	expect(t, b, "more")
}

func testAfterClose(t *testing.T, a, _ end, _ func()) {
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	for _, b := range [][]byte{nil, {1}} {
		_, err := a.Read(b)
		wantErr(t, err, "read", net.ErrClosed)
		_, err = a.Write(b)
		wantErr(t, err, "write", net.ErrClosed)
	}
	wantErr(t, a.Close(), "close", net.ErrClosed)
	wantErr(t, a.CloseWrite(), "close", net.ErrClosed)
	wantErr(t, a.SetLinger(0), "set", net.ErrClosed)
	wantErr(t, a.SetDeadline(time.Time{}), "set", net.ErrClosed)
	wantErr(t, a.SetReadDeadline(time.Now()), "set", net.ErrClosed)
	wantErr(t, a.SetWriteDeadline(time.Now()), "set", net.ErrClosed)
}
