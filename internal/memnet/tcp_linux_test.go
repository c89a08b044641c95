package memnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/tcprelay/relay/internal/tcptest"
)

// TestSameAsLinux does the same random things to a connection of memnet and to one of
// the kernel, and wants the same results, down to the errors and to what is unread.
func TestSameAsLinux(t *testing.T) {
	for seed := range uint64(300) {
		d := &duo{rnd: rand.New(rand.NewPCG(seed, 0))}
		d.tcp[0], d.tcp[1] = tcptest.Pair(t)
		d.mem[0], d.mem[1] = memPair(t)
		for range 30 {
			if err := errors.Join(d.step(), d.settle()); err != nil {
				t.Fatalf("seed %d: %v after\n%s", seed, err, strings.Join(d.log, "\n"))
			}
		}
		d.tcp[0].Close()
		d.tcp[1].Close()
	}
}

type duo struct {
	rnd *rand.Rand
	tcp [2]*net.TCPConn
	mem [2]*Conn
	log []string
}

// step makes one call, on the same end of both connections.
func (d *duo) step() error {
	i, size := d.rnd.IntN(2), d.rnd.IntN(12)
	payload := make([]byte, size)
	for k := range payload {
		payload[k] = byte(d.rnd.Uint32())
	}
	read := func(c end) string {
		b := make([]byte, size)
		n, err := c.Read(b)
		return fmt.Sprintf("%x, %s", b[:n], describe(err))
	}
	ops := []struct {
		name   string
		weight int
		do     func(end) string
	}{
		{"write", 8, func(c end) string {
			n, err := c.Write(payload)
			return fmt.Sprintf("%d, %s", n, describe(err))
		}},
		{"read", 8, func(c end) string {
			if wouldWait(d.mem[i]) && size > 0 {
				return "nothing to read"
			}
			return read(c)
		}},
		{"read too late", 1, func(c end) string {
			c.SetReadDeadline(time.Unix(1, 0))
			defer c.SetReadDeadline(time.Time{})
			return read(c)
		}},
		{"write too late", 1, func(c end) string {
			c.SetWriteDeadline(time.Unix(1, 0))
			defer c.SetWriteDeadline(time.Time{})
			n, err := c.Write(payload)
			return fmt.Sprintf("%d, %s", n, describe(err))
		}},
		{"close-write", 2, func(c end) string { return describe(c.CloseWrite()) }},
		{"close", 1, func(c end) string { return describe(c.Close()) }},
		{"linger", 1, func(c end) string { return describe(c.SetLinger(size%3 - 1)) }},
		{"deadline", 1, func(c end) string { return describe(c.SetDeadline(time.Time{})) }},
	}
	var deck []int
	for k, op := range ops {
		deck = append(deck, slices.Repeat([]int{k}, op.weight)...)
	}
	op := ops[deck[d.rnd.IntN(len(deck))]]
	// The kernel's first: whether a Read would wait is asked of memnet before its own.
	want := op.do(d.tcp[i])
	got := op.do(d.mem[i])
	d.log = append(d.log, fmt.Sprintf("end %d: %s of %d: %s", i, op.name, size, want))
	if got != want {
		return fmt.Errorf("memnet gave %s", got)
	}
	return nil
}

// settle waits until the kernel's ends are in the state of memnet's.
func (d *duo) settle() error {
	for i, m := range d.mem {
		want, open := memState(m)
		if !open {
			continue
		}
		for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Microsecond) {
			got, err := tcpState(d.tcp[i])
			if err != nil {
				return err
			}
			if got == want {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("end %d is in state %+v; in memnet %+v", i, got, want)
			}
		}
	}
	return nil
}

// A state is that of an open end. The names are those of RFC 9293.
type state struct {
	name   string
	unread int
}

func memState(c *Conn) (s state, open bool) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	s.unread = c.in.arrived
	switch {
	case c.over():
		s.name = "closed"
	case c.eof:
		s.name = "close-wait"
	case c.shut:
		s.name = "fin-wait"
	default:
		s.name = "established"
	}
	return s, !c.closed
}

func wouldWait(c *Conn) bool {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	return !c.closed && c.in.arrived == 0 && !c.eof && !c.dead
}

// tcpState asks the kernel.
func tcpState(c *net.TCPConn) (s state, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return s, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var v int
		if v, err = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO); err != nil {
			return
		}
		var info [4]byte // the state is the first byte
		binary.NativeEndian.PutUint32(info[:], uint32(v))
		s.name = map[byte]string{1: "established", 4: "fin-wait", 5: "fin-wait", 7: "closed", 8: "close-wait"}[info[0]]
		var unread int32
		if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCINQ, uintptr(unsafe.Pointer(&unread))); e != 0 {
			err = e
		}
		s.unread = int(unread)
	})
	return s, errors.Join(cerr, err)
}

// describe tells an error in words that do not hold the port.
func describe(err error) string {
	var oe *net.OpError
	switch {
	case err == nil:
		return "ok"
	case err == io.EOF:
		return "EOF"
	case errors.As(err, &oe):
		return fmt.Sprintf("%s (from: %t, to: %t): %v", oe.Op, oe.Source != nil, oe.Addr != nil, oe.Err)
	}
	return fmt.Sprintf("%T %v", err, err)
}
