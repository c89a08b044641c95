package main

import (
	"errors"
	"net"
	"runtime"
	"strings"
	"testing"

	"github.com/tcprelay/relay"
)

// accepting counts the goroutines that are in acceptors.accept.
func accepting() int {
	buf := make([]byte, 1<<20)
	return strings.Count(string(buf[:runtime.Stack(buf, true)]), "(*acceptors).accept(")
}

// However many targets hang, the next client is taken; when they do no longer, a few wait.
func TestAcceptors(t *testing.T) {
	addr, _ := startRelay(t, "127.0.0.1:0")
	ln, err := relay.Register(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	const clients = 5 * maxWaiting
	taken, release := make(chan struct{}, clients), make(chan struct{})
	a := acceptors{ln: ln, failed: make(chan error, 1), carry: func(c *relay.Conn) {
		taken <- struct{}{}
		<-release
		c.Close()
	}}
	a.start()
	for range clients {
		dial(t, ln.Addr().String())
		<-taken
	}
	eventually(t, "one more than there are clients", func() bool { return accepting() == clients+1 })
	close(release)
	eventually(t, "few that wait", func() bool { return accepting() == maxWaiting })
	for range 3 * clients {
		dial(t, ln.Addr().String())
		<-taken
	}
	eventually(t, "few that wait", func() bool { return accepting() <= maxWaiting && accepting() > 0 })
	ln.Close()
	if err := <-a.failed; !errors.Is(err, net.ErrClosed) {
		t.Errorf("ended with %v", err)
	}
	eventually(t, "none", func() bool { return accepting() == 0 })
}

// No more are counted than may wait, also for a moment.
func TestAcceptorsWait(t *testing.T) {
	var a acceptors
	for n := range int32(maxWaiting) {
		if !a.wait() || a.waiting.Load() != n+1 {
			t.Errorf("the %dth may not wait", n+1)
		}
	}
	if a.wait() || a.waiting.Load() != maxWaiting {
		t.Error("one too many may wait")
	}
	if a.waiting.Add(-1); !a.wait() {
		t.Error("nobody may wait where one has gone")
	}
}
