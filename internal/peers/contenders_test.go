package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/peers/rivals"
)

// A contender is one way of doing the same small job: a public TCP listener on
// loopback whose clients reach an app's handler. All but the plain proxy carry
// them through one multiplexed session that the app's side dialled, so that what
// differs between two contenders is the multiplexer and the code that joins it
// to the client's socket.
type contender struct {
	name string
	// start runs the job until the tunnel is closed. handle serves one client in
	// a goroutine of its own; its conn is closed when it returns.
	start func(handle func(net.Conn)) (*tunnel, error)
}

// contenders are listed in the order of the table's columns.
var contenders = []contender{
	{"plain", startPlain},
	{"yamux", startRival("yamux")},
	{"smux", startRival("smux")},
	{"muxado", startRival("muxado")},
	{"ours", startOurs},
}

// tunnel is a running contender.
type tunnel struct {
	addr  string // of the public listener
	close func() // ends every conn and waits for the app's handlers
}

// startPlain is the measure that the others are held against: a TCP proxy
// without any multiplexing, which dials the app's own listener once per client.
func startPlain(handle func(net.Conn)) (*tunnel, error) {
	app, err := newDoor(func(c net.Conn) {
		defer c.Close()
		handle(c)
	})
	if err != nil {
		return nil, err
	}
	public, err := newDoor(func(client net.Conn) {
		defer client.Close()
		backend, err := net.Dial("tcp", app.addr())
		if err != nil {
			return
		}
		rivals.Join(client.(*net.TCPConn), backend.(*net.TCPConn), rivals.Splice)
	})
	if err != nil {
		app.close()
		return nil, err
	}
	return &tunnel{public.addr(), func() {
		public.close()
		app.close()
	}}, nil
}

// startOurs is a relay and a service as any program would have them.
func startOurs(handle func(net.Conn)) (*tunnel, error) {
	server, err := relay.NewServer()
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	var wg sync.WaitGroup
	wg.Go(func() { server.Serve(ln) })
	public, err := relay.Register(context.Background(), ln.Addr().String())
	if err != nil {
		server.Close()
		wg.Wait()
		return nil, err
	}
	wg.Go(func() { serveAccepted(public.Accept, handle, &wg) })
	return &tunnel{public.Addr().String(), func() {
		public.Close()
		server.Close()
		wg.Wait()
	}}, nil
}

// startRival is the smallest relay and agent around someone's multiplexer: the
// agent dials the relay, the relay opens a stream per public client, and the
// agent hands each stream to the app.
func startRival(name string) func(handle func(net.Conn)) (*tunnel, error) {
	return func(handle func(net.Conn)) (*tunnel, error) {
		rival, ok := rivals.Named(name)
		if !ok {
			return nil, fmt.Errorf("no rival is named %q", name)
		}
		agentSide, relaySide, err := tcpPair()
		if err != nil {
			return nil, err
		}
		open, near, err := rival.Open(relaySide)
		if err != nil {
			relaySide.Close()
			agentSide.Close()
			return nil, err
		}
		accept, far, err := rival.Accept(agentSide)
		if err != nil {
			near.Close()
			agentSide.Close()
			return nil, err
		}
		public, err := newDoor(func(client net.Conn) {
			defer client.Close()
			stream, err := open()
			if err != nil {
				return
			}
			rivals.Join(client.(*net.TCPConn), stream, rivals.Copy)
		})
		if err != nil {
			near.Close()
			far.Close()
			return nil, err
		}
		var app sync.WaitGroup
		app.Go(func() { serveAccepted(accept, handle, &app) })
		return &tunnel{public.addr(), func() {
			near.Close()
			far.Close()
			public.close()
			app.Wait()
		}}, nil
	}
}

// serveAccepted hands every accepted conn to the app until accept fails.
func serveAccepted(accept rivals.Accepter, handle func(net.Conn), wg *sync.WaitGroup) {
	for {
		c, err := accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer c.Close()
			handle(c)
		})
	}
}

// door is a TCP listener on loopback that serves each conn in a goroutine and,
// unlike a bare listener, ends them all when it is closed.
type door struct {
	ln net.Listener
	wg sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

func newDoor(serve func(net.Conn)) (*door, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	d := &door{ln: ln, conns: make(map[net.Conn]struct{})}
	d.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if !d.enter(c) {
				c.Close()
				return
			}
			d.wg.Go(func() {
				defer d.leave(c)
				serve(c)
			})
		}
	})
	return d, nil
}

func (d *door) addr() string { return d.ln.Addr().String() }

func (d *door) enter(c net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		d.conns[c] = struct{}{}
	}
	return !d.closed
}

func (d *door) leave(c net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.conns, c)
}

func (d *door) close() {
	d.ln.Close()
	d.mu.Lock()
	d.closed = true
	for c := range d.conns {
		c.Close()
	}
	d.mu.Unlock()
	d.wg.Wait()
}

// TestContenders checks what the benchmarks take for granted and are too busy to
// look at: that every contender brings each client the app's answer to its own
// bytes, unharmed, and that closing a tunnel ends it.
func TestContenders(t *testing.T) {
	const clients, size = 8, 1 << 20
	for _, c := range contenders {
		t.Run(c.name, func(t *testing.T) {
			tun, err := c.start(echoAll)
			if err != nil {
				t.Fatal(err)
			}
			defer tun.close()
			var wg sync.WaitGroup
			for i := range clients {
				wg.Go(func() {
					if err := echoOnce(tun.addr, uint64(i), size); err != nil {
						t.Errorf("client %d: %v", i, err)
					}
				})
			}
			wg.Wait()
		})
	}
}

// echoOnce sends size bytes made from seed while it reads them back. It does not
// half-close before it has the answer: not every contender brings one after that.
func echoOnce(addr string, seed uint64, size int64) error {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	want := testBytes(seed, size)
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(want)
		sent <- err
	}()
	got := make([]byte, size)
	n, err := io.ReadFull(conn, got)
	if err != nil {
		conn.Close() // the writer must not outlive us
		return errors.Join(fmt.Errorf("after %d of %d bytes: %w", n, size, err), <-sent)
	}
	if !bytes.Equal(got, want) {
		return errors.New("the bytes that came back are not those sent")
	}
	return <-sent
}
