package peers

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/mux"
)

// TestStockService registers programs that know only muxado at a relay.
func TestStockService(t *testing.T) {
	cases := []struct {
		name string
		run  func(*testing.T, stockLibrary)
	}{
		{"Echo", serviceEcho},
		{"EchoBig", serviceEchoBig},
		{"ManyClients", serviceManyClients},
		{"HalfCloseThenAnswer", serviceHalfClose},
		{"SpeaksFirst", serviceSpeaksFirst},
		{"ClientResets", serviceClientResets},
		{"ClosesEarly", serviceClosesEarly},
		{"SessionCloses", serviceSessionCloses},
		{"TransportLost", serviceTransportLost},
		{"OpensStream", serviceOpensStream},
	}
	for _, lib := range stockLibraries {
		for _, c := range cases {
			t.Run(lib.name+"/"+c.name, func(t *testing.T) { c.run(t, lib) })
		}
	}
}

// stockService is a registered service.
type stockService struct {
	*stockSession
	conn net.Conn // the transport
	addr string   // the public address
}

// registerStock registers with a new relay and hands every client's stream to
// handle, in a goroutine of its own.
func registerStock(t *testing.T, lib stockLibrary, handle func(*stockSession, stockStream)) *stockService {
	t.Helper()
	conn, err := net.Dial("tcp", startRelayServer(t))
	if err != nil {
		t.Fatal(err)
	}
	svc := &stockService{stockSession: lib.start(conn, true, 0), conn: conn}
	watchdog := time.AfterFunc(patience, func() { svc.close() })
	var handlers sync.WaitGroup
	t.Cleanup(func() {
		watchdog.Stop()
		svc.close()
		handlers.Wait()
	})
	control, err := svc.open()
	if err != nil {
		t.Fatal(err)
	}
	if err := control.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	addr, err := io.ReadAll(control)
	if err != nil {
		t.Fatalf("reading the public address: %q, %v", addr, err)
	}
	svc.addr = string(addr)
	if host, port, err := net.SplitHostPort(svc.addr); err != nil || host != "127.0.0.1" || port == "0" {
		t.Fatalf("the relay said %q, want its public host:port", addr)
	}
	handlers.Go(func() {
		for {
			st, err := svc.accept()
			if err != nil {
				return
			}
			handlers.Go(func() { handle(svc.stockSession, st) })
		}
	})
	return svc
}

func stockEcho(_ *stockSession, st stockStream) {
	defer st.Close()
	io.Copy(st, st)
}

// wantEcho sends n bytes, half-closes, and checks that they come back, and no more.
func wantEcho(t *testing.T, c net.Conn, seed uint64, n int64) {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, testData(seed, n))
		sent <- errors.Join(err, c.(interface{ CloseWrite() error }).CloseWrite())
	}()
	if sum, got, err := digest(c); err != nil || sum != testDigest(seed, n) {
		t.Errorf("echo of %d bytes, SHA-256 %s, %v, want %d, %s", got, sum, err, n, testDigest(seed, n))
	}
	if err := <-sent; err != nil {
		t.Errorf("sending: %v", err)
	}
}

func serviceEcho(t *testing.T, lib stockLibrary) {
	svc := registerStock(t, lib, stockEcho)
	c := dialTCP(t, svc.addr)
	for i := range 100 {
		wantExchange(t, c, c, fmt.Sprint("message ", i))
	}
}

func serviceEchoBig(t *testing.T, lib stockLibrary) {
	svc := registerStock(t, lib, stockEcho)
	wantEcho(t, dialTCP(t, svc.addr), 20, 4<<20)
}

func serviceManyClients(t *testing.T, lib stockLibrary) {
	svc := registerStock(t, lib, stockEcho)
	for _, clients := range []uint64{4, 16, 64} {
		var wg sync.WaitGroup
		for i := range clients {
			c := dialTCP(t, svc.addr)
			wg.Go(func() { wantEcho(t, c, i, 300_000) })
		}
		wg.Wait()
	}
}

func serviceHalfClose(t *testing.T, lib stockLibrary) {
	svc := registerStock(t, lib, func(_ *stockSession, st stockStream) {
		defer st.Close()
		sum, n, err := digest(st)
		fmt.Fprint(st, sum, n, err)
	})
	const size = 1 << 20
	c := dialTCP(t, svc.addr)
	if _, err := io.Copy(c, testData(21, size)); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	got, err := io.ReadAll(c)
	if want := fmt.Sprint(testDigest(21, size), int64(size), nil); string(got) != want || err != nil {
		t.Errorf("the answer is %q, %v, want %q", got, err, want)
	}
}

func serviceSpeaksFirst(t *testing.T, lib stockLibrary) {
	svc := registerStock(t, lib, func(_ *stockSession, st stockStream) {
		defer st.Close()
		io.WriteString(st, "220 ready\r\n")
	})
	got, err := io.ReadAll(dialTCP(t, svc.addr))
	if string(got) != "220 ready\r\n" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
}

func serviceClientResets(t *testing.T, lib stockLibrary) {
	ended := make(chan mux.Code, 1)
	svc := registerStock(t, lib, func(s *stockSession, st stockStream) {
		defer st.Close()
		_, err := io.Copy(st, st)
		ended <- s.code(err)
	})
	c := dialTCP(t, svc.addr)
	wantExchange(t, c, c, "hello")
	c.SetLinger(0)
	c.Close()
	if code := await(t, ended, "the service to see the reset"); code != mux.StreamReset {
		t.Errorf("the service's read ended with code %v, want %v", code, mux.StreamReset)
	}
}

// serviceClosesEarly is a service that has heard enough: the client reads its whole
// answer, and fails to send more.
func serviceClosesEarly(t *testing.T, lib stockLibrary) {
	svc := registerStock(t, lib, func(_ *stockSession, st stockStream) {
		io.ReadFull(st, make([]byte, 5))
		io.WriteString(st, "enough")
		st.Close()
	})
	c := dialTCP(t, svc.addr)
	io.WriteString(c, "hello")
	if got, err := io.ReadAll(c); string(got) != "enough" || err != nil {
		t.Fatalf("read %q, %v", got, err)
	}
	_, err := io.Copy(c, testData(22, 1<<40))
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("sending ended with %v, want a reset", err)
	}
}

// wantCut checks that clients of a service whose session ends by way of end are
// reset, and that its public port closes.
func wantCut(t *testing.T, lib stockLibrary, end func(*stockService)) {
	svc := registerStock(t, lib, stockEcho)
	var clients []*net.TCPConn
	for range 3 {
		c := dialTCP(t, svc.addr)
		wantExchange(t, c, c, "hello")
		clients = append(clients, c)
	}
	end(svc)
	for _, c := range clients {
		if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read %d bytes, %v, want a reset", n, err)
		}
	}
	wantRefused(t, svc.addr)
}

func serviceSessionCloses(t *testing.T, lib stockLibrary) {
	wantCut(t, lib, func(svc *stockService) { svc.close() })
}

func serviceTransportLost(t *testing.T, lib stockLibrary) {
	wantCut(t, lib, func(svc *stockService) { svc.conn.Close() })
}

// serviceOpensStream breaks the rule that only the relay opens further streams.
func serviceOpensStream(t *testing.T, lib stockLibrary) {
	wantCut(t, lib, func(svc *stockService) {
		st, err := svc.open()
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(st, "may I?")
	})
}
