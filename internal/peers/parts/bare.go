package parts

import (
	"bufio"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/tcprelay/relay/internal/localdial"
	"github.com/tcprelay/relay/internal/socket"
)

// A bare is the least that one end of a relay can be in Go: the bytes of its clients in
// frames over one connection, and a goroutine for each that reads them. There are no
// windows, so that a client who does not read stops all, no limits and no accounts, and
// nobody is told of what goes wrong. What it costs anything of this shape costs.
type bare struct {
	conn *net.TCPConn

	mu         sync.Mutex
	ends       map[uint32]*bareEnd
	out, spare []byte
	writing    bool
}

// A bareEnd is a client, or at the agent the connection to the app that is for it.
type bareEnd struct {
	id    uint32
	going atomic.Int32 // directions

	mu    sync.Mutex
	conn  *net.TCPConn // nil until it is there
	early []byte       // came before
	ended bool         // and so did the end
}

// What frames are. The header has that, the length in two bytes, and the client's number
// in four.
const (
	bareOpen = iota
	bareData
	bareEndOfData

	bareHeader = 8
	bareRoom   = 2 << 10
)

func newBare(c net.Conn) *bare {
	return &bare{conn: c.(*net.TCPConn), ends: make(map[uint32]*bareEnd)}
}

// send sends a frame, together with those that others send meanwhile.
func (b *bare) send(kind byte, id uint32, p []byte) {
	var header [bareHeader]byte
	header[0] = kind
	binary.BigEndian.PutUint16(header[1:], uint16(len(p)))
	binary.BigEndian.PutUint32(header[4:], id)
	b.mu.Lock()
	b.out = append(append(b.out, header[:]...), p...)
	b.mu.Unlock()
	runtime.Gosched()
	b.mu.Lock()
	defer b.mu.Unlock()
	for !b.writing && len(b.out) > 0 {
		out := b.out
		b.out, b.writing = b.spare[:0], true
		b.mu.Unlock()
		b.conn.Write(out) // the reader hears of an error
		b.mu.Lock()
		b.spare, b.writing = out, false
	}
}

func (b *bare) add(id uint32, conn *net.TCPConn) *bareEnd {
	e := &bareEnd{id: id, conn: conn}
	e.going.Store(2)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ends[id] = e
	return e
}

// read sends what an end has to say.
func (b *bare) read(e *bareEnd) {
	var room [bareRoom]byte
	for {
		n, err := e.conn.Read(room[:])
		if n > 0 {
			b.send(bareData, e.id, room[:n])
		}
		if err != nil {
			b.send(bareEndOfData, e.id, nil)
			b.done(e)
			return
		}
	}
}

func (b *bare) done(e *bareEnd) {
	if e.going.Add(-1) == 0 {
		b.mu.Lock()
		delete(b.ends, e.id)
		b.mu.Unlock()
		e.conn.Close()
	}
}

// take gives an end what has come for it.
func (b *bare) take(e *bareEnd, p []byte, end bool) {
	e.mu.Lock()
	if e.conn == nil {
		e.early = append(e.early, p...)
		e.ended = e.ended || end
		e.mu.Unlock()
		return
	}
	e.mu.Unlock()
	if len(p) > 0 {
		e.conn.Write(p) // read hears of an error
	}
	if end {
		e.conn.CloseWrite()
		b.done(e)
	}
}

// attach gives an end its connection.
func (b *bare) attach(e *bareEnd, conn *net.TCPConn) {
	e.mu.Lock()
	e.conn = conn
	early, ended := e.early, e.ended
	e.early = nil
	if len(early) > 0 {
		conn.Write(early)
	}
	e.mu.Unlock()
	if ended {
		b.take(e, nil, true)
	}
}

// serve hands out what comes over the connection, until it ends. Opened is called for each
// client that the other end tells of.
func (b *bare) serve(opened func(*bareEnd)) error {
	r := bufio.NewReaderSize(b.conn, 64<<10)
	var header [bareHeader]byte
	p := make([]byte, bareRoom)
	for {
		if _, err := io.ReadFull(r, header[:]); err != nil {
			return err
		}
		n, id := int(binary.BigEndian.Uint16(header[1:])), binary.BigEndian.Uint32(header[4:])
		if _, err := io.ReadFull(r, p[:n]); err != nil {
			return err
		}
		if header[0] == bareOpen {
			go opened(b.add(id, nil))
			continue
		}
		b.mu.Lock()
		e := b.ends[id]
		b.mu.Unlock()
		if e != nil {
			b.take(e, p[:n], header[0] == bareEndOfData)
		}
	}
}

// runBareRelay prints two addresses: that of the agent, and the public one.
func runBareRelay([]string) error {
	agents, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	socket.Unpaced(agents)
	public, err := socket.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	socket.Unpaced(public)
	fmt.Println(agents.Addr())
	c, err := agents.Accept()
	if err != nil {
		return err
	}
	b := newBare(c)
	go func() {
		fmt.Fprintln(os.Stderr, "bare:", b.serve(func(*bareEnd) {}))
	}()
	var last atomic.Uint32
	return ServeUntilEOF(public.Addr(), public.Accept, func(client net.Conn) {
		e := b.add(last.Add(1), client.(*net.TCPConn))
		b.send(bareOpen, e.id, []byte(client.RemoteAddr().String()))
		b.read(e)
	})
}

// runBareAgent carries clients to an app's port.
func runBareAgent(args []string) error {
	flags := flag.NewFlagSet("bare-agent", flag.ExitOnError)
	at := flags.String("relay", "", "where the relay is")
	to := flags.String("to", "", "where the app is")
	flags.Parse(args)
	d := net.Dialer{KeepAlive: -1, Control: localdial.Control}
	c, err := d.Dial("tcp", *at)
	if err != nil {
		return err
	}
	b := newBare(c)
	fmt.Println(c.LocalAddr())
	failed := make(chan error, 1)
	fail := func(err error) {
		select {
		case failed <- err:
		default: // it ends for another reason
		}
	}
	go func() {
		fail(b.serve(func(e *bareEnd) {
			app, err := d.Dial("tcp", *to)
			if err != nil {
				fail(err)
				return
			}
			b.attach(e, app.(*net.TCPConn))
			b.read(e)
		}))
	}()
	return untilEOF(failed)
}
