package link

import (
	"context"
	"net"
	"syscall"
)

// segment is TCP's on Ethernet. With the 64 KiB of loopback, a sender's socket would start
// out with a buffer of megabytes: a queue in front of the line that no real link has.
const segment = 1448

// Listen returns a listener on a free port of loopback, whose conns are for CarryTo.
func (l *Link) Listen() (net.Listener, error) {
	config := net.ListenConfig{Control: l.control}
	return config.Listen(context.Background(), "tcp", "127.0.0.1:0")
}

// CarryTo carries a conn that came from Listen to an address, as Carry does.
func (l *Link) CarryTo(near *net.TCPConn, to string) {
	dialer := net.Dialer{Control: l.control}
	far, err := dialer.Dial("tcp", to)
	if err != nil {
		reset(near)
		return
	}
	l.Carry(near, far.(*net.TCPConn))
}

// control keeps what the kernel holds of a conn small beside what is in flight. It has to
// be told before a conn is made.
func (l *Link) control(_, _ string, raw syscall.RawConn) error {
	var err error
	set := func(fd uintptr, level, option, value int) {
		if err == nil {
			err = syscall.SetsockoptInt(int(fd), level, option, value)
		}
	}
	if failed := raw.Control(func(fd uintptr) {
		set(fd, syscall.SOL_SOCKET, syscall.SO_RCVBUF, l.buffer)
		set(fd, syscall.SOL_SOCKET, syscall.SO_SNDBUF, 256<<10)
		set(fd, syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, segment)
	}); failed != nil {
		return failed
	}
	return err
}
