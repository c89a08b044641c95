package join

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/tcptest"
)

// eavesdropped is a connection whose reset a write of somebody else's takes, before
// the reader of this one looks.
type eavesdropped struct {
	*net.TCPConn
	reset chan struct{} // closed when it is to be taken
	taken atomic.Bool
}

func (c *eavesdropped) Read(p []byte) (int, error) {
	<-c.reset
	for {
		if _, err := c.TCPConn.Write([]byte("x")); err != nil {
			c.taken.Store(errors.Is(err, syscall.ECONNRESET))
			break
		}
	}
	return c.TCPConn.Read(p)
}

// notes is a stream that notes whether it was finished.
type notes struct {
	*mux.Stream
	finished atomic.Bool
}

func (s *notes) CloseWrite() error {
	s.finished.Store(true)
	return s.Stream.CloseWrite()
}

// A reset that a write has met is no end to the reader, who sees one.
func TestResetTakenByWrite(t *testing.T) {
	near, far := tcptest.Pair(t)
	c := &eavesdropped{TCPConn: near, reset: make(chan struct{})}
	relay, service := sessions(t, pairs["pipe"], mux.Config{})
	a, err := relay.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := service.Accept()
	if err != nil {
		t.Fatal(err)
	}
	st := &notes{Stream: a}
	done := goJoin(c, st)
	far.SetLinger(0)
	far.Close()
	close(c.reset)
	err = wait(t, done)
	if !c.taken.Load() {
		t.Skip("this system gave the write another error, so that nothing is to be seen here")
	}
	if !errors.Is(err, syscall.ECONNRESET) || st.finished.Load() {
		t.Errorf("Join: %v, finished %v: a reset was taken for the end", err, st.finished.Load())
	}
	if n, err := b.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("the other side read %d, %v", n, err)
	}
}
