package relay_test

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

// long reports whether the figures are wanted that take minutes.
func long() bool { return os.Getenv("RELAY_LONG") != "" }

// figure chooses a size: with RELAY_LONG set, by default, and with -short.
func figure(full, usual, short int) int {
	switch {
	case long():
		return full
	case testing.Short():
		return short
	}
	return usual
}

// A burst of connects is served whole. The relay holds back nobody, and the app has
// a backlog to hold them.
func TestBurst(t *testing.T) {
	_, addr := startRelay(t)
	l := register(t, addr)
	const n = 256
	start := make(chan struct{})
	var clients sync.WaitGroup
	for i := range n {
		clients.Go(func() {
			<-start
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Errorf("client %d: %v", i, err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			if err := echoed(c, i); err != nil {
				t.Errorf("client %d: %v", i, err)
			}
		})
	}
	close(start)
	go serveEcho(l)
	clients.Wait()
	if got := l.Stats(); got.Accepted != n || got.Refused != 0 {
		t.Errorf("stats %+v", got)
	}
}

// echoed sends a number and wants it back.
func echoed(c net.Conn, i int) error {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(i))
	if _, err := c.Write(b[:]); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return err
	}
	if got := binary.BigEndian.Uint64(b[:]); got != uint64(i) {
		return fmt.Errorf("%d came back", got)
	}
	return nil
}

// Many clients at once, each served while all others are there; and afterwards
// goroutines and files are what they were. The limit on open files is the hard one,
// to which the Go runtime sets it at the start.
func TestManyClients(t *testing.T) {
	srv, addr, log := startLogged(t)
	check := nothingLeft(t)
	l := register(t, addr)
	go serveEcho(l)

	n := figure(2000, 2000, 500)
	conns := make([]net.Conn, n)
	var clients sync.WaitGroup
	each := func(f func(i int) error) {
		for i := range n {
			clients.Go(func() {
				if err := f(i); err != nil {
					t.Errorf("client %d: %v", i, err)
				}
			})
		}
		clients.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	each(func(i int) (err error) {
		conns[i], err = net.Dial("tcp", l.Addr().String())
		return err
	})
	for round := range 3 {
		each(func(i int) error {
			conns[i].SetDeadline(time.Now().Add(patience))
			return echoed(conns[i], round*n+i)
		})
	}
	if s := srv.Services()[0]; len(s.Clients) != n || s.Refused != 0 {
		t.Errorf("%d clients, %d refused", len(s.Clients), s.Refused)
	}
	for _, c := range conns {
		c.Close()
	}
	log.wait(t, "client left", n)
	eventually(t, "the app's end of all", func() bool { return l.Stats().Live == 0 })
	if s := srv.Services()[0]; s.BytesIn != s.BytesOut || s.Accepted != int64(n) || len(s.Clients) != 0 {
		t.Errorf("service %+v", s)
	}
	c := dial(t, l)
	echoes(t, c)
	c.Close()
	l.Close()
	check()
}

// Many clients one after the other leave nothing behind.
func TestSequence(t *testing.T) {
	_, addr, log := startLogged(t)
	check := nothingLeft(t)
	l := register(t, addr)
	go serveEcho(l)
	before := heap()
	n := figure(50_000, 5000, 500)
	start := time.Now()
	for i := range n {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatalf("client %d: %v", i, err)
		}
		c.SetDeadline(time.Now().Add(patience))
		if err := echoed(c, i); err != nil {
			t.Fatalf("client %d: %v", i, err)
		}
		// The app closes first, so that it is not the client's port that lingers.
		c.(*net.TCPConn).CloseWrite()
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("client %d: %v", i, err)
		}
		c.Close()
	}
	t.Logf("%d clients in %v", n, time.Since(start).Round(time.Millisecond))
	log.wait(t, "client left", n)
	eventually(t, "the app's end of all", func() bool { return l.Stats().Live == 0 })
	log.forget()
	if grew := heap() - before; grew > 4<<20 {
		t.Errorf("%d bytes of memory stay", grew)
	}
	if got := l.Stats(); got.Accepted != int64(n) || got.BytesIn != got.BytesOut {
		t.Errorf("stats %+v", got)
	}
	l.Close()
	check()
}

// stream writes n bytes that are all different, as far as a lost, moved or repeated
// piece goes, and returns their sum.
func stream(w io.Writer, seed byte, n int64) ([32]byte, error) {
	h := sha256.New()
	p := randomBytes(1 << 20)
	for at := int64(0); at < n; at += int64(len(p)) {
		p = p[:min(int64(len(p)), n-at)]
		p[0] = seed
		binary.BigEndian.PutUint64(p[1:], uint64(at))
		h.Write(p)
		if _, err := w.Write(p); err != nil {
			return [32]byte{}, err
		}
	}
	return [32]byte(h.Sum(nil)), nil
}

// Both ways at once, over one conn and over many, every byte arrives.
func TestBulk(t *testing.T) {
	total := int64(figure(1<<30, 64<<20, 8<<20))
	for _, conns := range []int{1, 64} {
		t.Run(fmt.Sprint(conns), func(t *testing.T) {
			_, addr := startRelay(t)
			l := register(t, addr)
			start := time.Now()
			var all sync.WaitGroup
			for i := range conns {
				client, app := dial(t, l), accept(t, l)
				forever := time.Now().Add(20 * patience)
				client.SetDeadline(forever)
				app.SetDeadline(forever)
				for way, d := range []struct{ from, to conn }{{client, app}, {app, client}} {
					sent := make(chan [32]byte, 1)
					all.Go(func() {
						sum, err := stream(d.from, byte(2*i+way), total/int64(conns))
						if err == nil {
							err = d.from.CloseWrite()
						}
						if err != nil {
							t.Errorf("conn %d, way %d: %v", i, way, err)
						}
						sent <- sum
					})
					all.Go(func() {
						h := sha256.New()
						n, err := io.Copy(h, d.to)
						if err != nil || n != total/int64(conns) || [32]byte(h.Sum(nil)) != <-sent {
							t.Errorf("conn %d, way %d: %d bytes of %d, %v", i, way, n, total/int64(conns), err)
						}
					})
				}
			}
			all.Wait()
			took := time.Since(start)
			t.Logf("%d MiB each way in %v: %.1f Gbit/s in all, with four sums of it", total>>20,
				took.Round(time.Millisecond), float64(2*8*total)/took.Seconds()/1e9)
			if got := l.Stats(); got.BytesIn != total || got.BytesOut != total {
				t.Errorf("stats %+v", got)
			}
		})
	}
}

// Apps that come and go, with clients in them, leave nothing at the relay.
func TestManyRegistrations(t *testing.T) {
	srv, addr, log := startLogged(t)
	check := nothingLeft(t)
	n := figure(2000, 200, 50)
	for i := range n {
		l, err := signUp(t.Context(), addr, relay.WithName("the one"))
		for code(err) == relay.CodeNameTaken { // the relay hears of the last Close in its own time
			log.wait(t, "session ended", i)
			l, err = signUp(t.Context(), addr, relay.WithName("the one"))
		}
		if err != nil {
			t.Fatalf("registration %d: %v", i, err)
		}
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		a, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		sendAndExpect(t, c, a)
		l.Close()
		a.Close()
		c.Close()
	}
	log.wait(t, "session ended", n)
	eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
	check()
}
