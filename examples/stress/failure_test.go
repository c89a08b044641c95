package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/tcptest"
)

// runUntilFailed runs clients until one of them connects again, which it does after a
// failure.
func runUntilFailed(t *testing.T, p *params) *report {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var dials atomic.Int64
	dial := p.dial
	p.dial = func(ctx context.Context) (conn, error) {
		if dials.Add(1) > int64(p.clients) {
			cancel()
		}
		return dial(ctx)
	}
	r := run(ctx, p, &progress{w: t.Output(), mode: p.mode})
	if ctx.Err() != context.Canceled {
		t.Error("no failure made a client connect again")
	}
	return r
}

// checkErrors fails the test unless there are errors, all of one kind.
func checkErrors(t *testing.T, r *report, k kind, text string) {
	t.Helper()
	if n := r.Errors.ByKind[k.String()]; n == 0 || n != r.Totals.Errors {
		t.Errorf("%d errors, and of them %s %d: %+v", r.Totals.Errors, k, n, r.Errors)
	}
	var failed int64
	for _, s := range r.Series {
		failed += s.Errors
	}
	if failed != r.Totals.Errors {
		t.Errorf("%d errors in the series, of %d", failed, r.Totals.Errors)
	}
	for _, e := range r.Errors.First {
		if e.Kind != k.String() || !strings.Contains(e.Message, text) {
			t.Errorf("%+v, expected %s: %s", e, k, text)
		}
	}
	if len(r.Errors.First) == 0 {
		t.Error("no error is told")
	}
}

// flip sends everything back, but one byte.
func flip(at int64) func(conn) {
	return func(c conn) {
		io.CopyN(c, c, at)
		var b [1]byte
		if _, err := io.ReadFull(c, b[:]); err == nil {
			b[0] ^= 0x40
			c.Write(b[:])
		}
		io.Copy(c, c)
	}
}

// endEarly half-closes after some bytes, and goes on reading.
func endEarly(at int64) func(conn) {
	return func(c conn) {
		io.CopyN(c, c, at)
		c.CloseWrite()
		io.Copy(io.Discard, c)
	}
}

// abort resets the client after some bytes.
func abort(at int64) func(conn) {
	return func(c conn) {
		io.CopyN(c, c, at)
		c.(interface{ SetLinger(int) error }).SetLinger(0)
	}
}

// addByte sends everything back and a byte more.
func addByte(c conn) {
	io.Copy(c, c)
	c.Write([]byte{0})
}

// TestMisbehaving has each mode find out what is wrong with a service. Those behind a relay
// show that it passes such things on.
func TestMisbehaving(t *testing.T) {
	all := []mode{roundTrips, bulk, connections}
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	silent := func(c conn) {
		io.Copy(io.Discard, c)
		<-over
	}
	for _, of := range []struct {
		name    string
		serve   func(conn)
		modes   []mode
		timeout time.Duration
		kind    kind
		text    string
	}{
		{"first byte flipped", flip(0), all, patience, wrongByte, "byte 0 of the connection is"},
		{"byte flipped", flip(1234), all, patience, wrongByte, "byte 1234 of the connection is"},
		{"byte of the second message flipped", flip(3001), []mode{roundTrips, bulk}, patience, wrongByte, "byte 3001 of the connection is"},
		{"closed early", endEarly(1234), all, patience, earlyEOF, "receiving byte 1234 of the connection"},
		{"closed at once", endEarly(0), all, patience, earlyEOF, "receiving byte 0 of the connection"},
		{"reset", abort(1), all, patience, reset, ""},
		{"one byte more", addByte, []mode{connections}, patience, extraByte, "a byte more, 0x00, than the 3000"},
		{"silent", silent, all, 50 * time.Millisecond, timedOut, "i/o timeout"},
	} {
		for _, mode := range of.modes {
			for _, relayed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/relayed=%v", of.name, mode, relayed), func(t *testing.T) {
					t.Parallel()
					addr := ""
					if relayed {
						addr = behindRelay(t, plain, of.serve)
					} else {
						addr = directly(t, of.serve)
					}
					p := paramsFor(addr, mode)
					p.timeout = of.timeout
					checkErrors(t, runUntilFailed(t, p), of.kind, of.text)
				})
			}
		}
	}
}

// TestByteMoreAtTheEnd is what only a client that half-closes after many messages finds.
func TestByteMoreAtTheEnd(t *testing.T) {
	ctx, echo := echoOf(t, 10_000)
	p := paramsFor(directly(t, func(c conn) {
		echo.serve(c)
		c.Write([]byte{0x5a})
	}), bulk)
	checkErrors(t, run(ctx, p, &progress{w: t.Output(), mode: p.mode}), extraByte, "a byte more, 0x5a, than the")
}

// TestBytesOfOthers has a service send each of two clients the bytes of the other.
func TestBytesOfOthers(t *testing.T) {
	t.Parallel()
	for _, mode := range []mode{roundTrips, bulk, connections} {
		var clients atomic.Int64
		first, over := make(chan conn), make(chan struct{})
		p := paramsFor(directly(t, func(c conn) {
			switch clients.Add(1) {
			case 1:
				first <- c
				<-over
			case 2:
				other := <-first
				var back sync.WaitGroup
				back.Go(func() { io.Copy(c, other) })
				io.Copy(other, c)
				back.Wait()
				close(over)
			}
		}), mode)
		p.clients = 2
		if r := runUntilFailed(t, p); r.Errors.ByKind["wrong_byte"] == 0 {
			t.Errorf("%s: %+v", mode, r.Errors)
		}
	}
}

func TestNobodyListens(t *testing.T) {
	t.Parallel()
	// A port that is in use, and not for listening.
	c, _ := tcptest.Pair(t)
	for _, mode := range []mode{roundTrips, bulk, connections} {
		r := runUntilFailed(t, paramsFor(c.LocalAddr().String(), mode))
		checkErrors(t, r, connectRefused, "connecting: dial tcp")
		if r.Totals.Connections != 0 || r.Errors.First[0].LocalAddress != "" {
			t.Errorf("%+v, %+v", r.Totals, r.Errors.First)
		}
	}
}

// TestFirstOfEachKind keeps some errors of each kind, however many there are.
func TestFirstOfEachKind(t *testing.T) {
	m := newMeter(1)
	for range 10 {
		m.fail(0, "", io.EOF)
	}
	m.fail(4, "here", &connectError{errors.New("\x1b[2J")})
	if len(m.first) != keptErrors+1 || m.failures() != 11 {
		t.Fatalf("%d errors, kept %+v", m.failures(), m.first)
	}
	last := m.first[keptErrors]
	if last.Kind != "connect_failed" || last.Client != 4 || last.LocalAddress != "here" || last.Message != "connecting: \uFFFD[2J" {
		t.Errorf("%+v", last)
	}
}

func TestKinds(t *testing.T) {
	timeout := &net.OpError{Op: "dial", Err: context.DeadlineExceeded}
	for _, of := range []struct {
		err  error
		want kind
	}{
		{&connectError{&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}}, connectRefused},
		{&connectError{&net.OpError{Op: "dial", Err: windowsRefused}}, connectRefused},
		{&connectError{&net.OpError{Op: "dial", Err: syscall.EMFILE}}, connectFailed},
		{&connectError{&net.DNSError{Err: "no such host"}}, connectFailed},
		{&connectError{syscall.ECONNRESET}, connectFailed},
		{&connectError{timeout}, timedOut},
		{fmt.Errorf("sending: %w", timeout), timedOut},
		{fmt.Errorf("sending: %w", syscall.EPIPE), reset},
		{fmt.Errorf("receiving: %w", syscall.ECONNRESET), reset},
		{fmt.Errorf("receiving: %w", windowsReset), reset},
		{fmt.Errorf("half-closing: %w", syscall.ENOTCONN), reset},
		{fmt.Errorf("receiving: %w", io.EOF), earlyEOF},
		{fmt.Errorf("receiving: %w", io.ErrUnexpectedEOF), earlyEOF},
		{fmt.Errorf("receiving: %w", &wrongByteError{}), wrongByte},
		{&extraByteError{}, extraByte},
		{errors.New("what"), otherFailure},
	} {
		if got := kindOf(of.err); got != of.want {
			t.Errorf("%v is %s, not %s", of.err, got, of.want)
		}
	}
}

// TestPayload has each thing that may happen to bytes be found where it happens.
func TestPayload(t *testing.T) {
	sent := make([]byte, 20_000)
	all := newPayload(1, 2, 3)
	all.read(sent)
	whole := func(b []byte) error {
		p := newPayload(1, 2, 3)
		return p.check(b)
	}
	if err := whole(sent); err != nil {
		t.Fatal(err)
	}
	// In whatever pieces they come.
	for _, n := range []int{1, 2, 3, 7, 8, 9, 4095, 4096, 4097} {
		p := newPayload(1, 2, 3)
		for b := sent; len(b) > 0; b = b[min(n, len(b)):] {
			if err := p.check(b[:min(n, len(b))]); err != nil {
				t.Fatalf("in pieces of %d: %v", n, err)
			}
		}
	}
	other := make([]byte, len(sent))
	p := newPayload(1, 3, 3)
	p.read(other)
	for _, of := range []struct {
		name string
		got  []byte
		at   uint64
	}{
		{"lost", join(sent[:5000], sent[5001:]), 5000},
		{"doubled", join(sent[:5001], sent[5000:]), 5001},
		{"a block swapped", join(sent[:4096], sent[8192:12288], sent[4096:8192], sent[12288:]), 4096},
		{"a block of another client", join(sent[:8192], other[8192:]), 8192},
		{"the last changed", join(sent[:19_999], []byte{^sent[19_999]}), 19_999},
	} {
		// A neighbour may have the same value, so that the difference comes later.
		at := of.at
		for of.got[at] == sent[at] {
			at++
		}
		var wrong *wrongByteError
		if err := whole(of.got[:min(len(of.got), len(sent))]); !errors.As(err, &wrong) || *wrong != (wrongByteError{at, of.got[at], sent[at]}) {
			t.Errorf("%s: %v, expected at %d", of.name, err, at)
		}
		if at > of.at+4 {
			t.Errorf("%s at %d, and the bytes are the same until %d", of.name, of.at, at)
		}
	}
}

// TestPayloadsDiffer compares the bytes of connections that are close to each other.
func TestPayloadsDiffer(t *testing.T) {
	seen := make(map[[8]byte]string)
	for seed := range uint64(4) {
		for client := range 8 {
			for n := range 8 {
				p := newPayload(seed, client, n)
				for range 64 {
					var word [8]byte
					at := fmt.Sprintf("seed %d, client %d, connection %d, byte %d", seed, client, n, p.offset)
					p.read(word[:])
					if before, ok := seen[word]; ok {
						t.Fatalf("the same at %s and %s", before, at)
					}
					seen[word] = at
				}
			}
		}
	}
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// A reset that the system has told who sends is none the less one for who receives, and
// sees the end of the connection.
func TestResetToldOnce(t *testing.T) {
	told := &net.OpError{Op: "write", Err: os.NewSyscallError("write", syscall.ECONNRESET)}
	behindEnd := &net.OpError{Op: "write", Err: os.NewSyscallError("write", syscall.EPIPE)}
	for _, tt := range []struct {
		sends error
		want  kind
	}{{told, reset}, {behindEnd, earlyEOF}, {net.ErrClosed, earlyEOF}, {nil, earlyEOF}} {
		a, b := tcptest.Pair(t)
		defer b.Close()
		l := &link{conn: a}
		seen := make(chan struct{})
		err := l.duplex(t.Context(), func(ctx context.Context) error {
			<-ctx.Done() // when the other one has seen its end
			close(seen)
			return tt.sends
		}, func() error { return fmt.Errorf("receiving: %w", io.EOF) })
		<-seen
		if got := kindOf(err); got != tt.want {
			t.Errorf("sending ended with %v: %v is %v, not %v", tt.sends, err, got, tt.want)
		}
	}
}
