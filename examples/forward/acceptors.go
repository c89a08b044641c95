package main

import (
	"sync/atomic"

	"github.com/tcprelay/relay"
)

// acceptors are goroutines that wait for clients and join each to the target. One that has
// a client sees to it that another waits, and comes back for more when it is done: so there
// are as many as targets take their time, and a goroutine is not started for each client,
// whose stack would have to grow for dialling. All end when the listener is closed, those
// that carry a client when it is joined or turned away.
type acceptors struct {
	ln      *relay.Listener
	carry   func(*relay.Conn)
	waiting atomic.Int32
	failed  chan error // what ended Accept
}

// maxWaiting is how many wait at most.
const maxWaiting = 8

func (a *acceptors) start() {
	a.waiting.Add(1)
	go a.accept()
}

func (a *acceptors) accept() {
	for {
		c, err := a.ln.Accept()
		if err != nil {
			select {
			case a.failed <- err:
			default: // all get the same
			}
			return
		}
		if a.waiting.Add(-1) == 0 {
			a.start()
		}
		a.carry(c.(*relay.Conn))
		if !a.wait() {
			return
		}
	}
}

// wait counts a goroutine among those that wait, unless there are enough.
func (a *acceptors) wait() bool {
	for {
		n := a.waiting.Load()
		if n >= maxWaiting {
			return false
		}
		if a.waiting.CompareAndSwap(n, n+1) {
			return true
		}
	}
}
