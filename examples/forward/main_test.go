package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/leak"
	"github.com/tcprelay/relay/internal/tcptest"
)

// asProgram in the environment makes the tests' binary the program itself or, if it is
// "shell", one that runs it as its job.
const asProgram = "FORWARD_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	switch os.Getenv(asProgram) {
	case "":
		leak.Main(m)
	case "shell":
		shell()
	default:
		main()
	}
}

// patience bounds the wait for what should happen. Nothing is asserted about how long
// things take.
const patience = time.Minute

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for giveUp := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(giveUp) {
			t.Fatalf("never: %s", what)
		}
	}
}

// A transcript is what was written to it. It may be used from any goroutine.
type transcript struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (tr *transcript) Write(p []byte) (int, error) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.b.Write(p)
}

func (tr *transcript) String() string {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.b.String()
}

func (tr *transcript) lines() []string { return strings.FieldsFunc(tr.String(), isNewline) }

func isNewline(r rune) bool { return r == '\n' }

// startRelay runs a relay until the test ends, or close is called, and returns where
// services register.
func startRelay(t *testing.T, at string, opts ...relay.ServerOption) (addr string, close func()) {
	t.Helper()
	srv, err := relay.NewServer(opts...)
	if err != nil {
		t.Fatal(err)
	}
	var ln net.Listener
	eventually(t, "a listener at "+at, func() bool { ln, err = net.Listen("tcp", at); return err == nil })
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	close = sync.OnceFunc(func() {
		srv.Close()
		if err := <-served; err != relay.ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(close)
	return ln.Addr().String(), close
}

// A running is a forwarder at work.
type running struct {
	*forwarder
	out, log transcript
	stop     func()
	done     chan struct{} // closed when it has ended, and the rest is valid
	failed   []error
	cut      bool
}

// start runs the program with flags, but for its view, until the test ends.
func start(t *testing.T, args ...string) *running {
	t.Helper()
	var c config
	if err := c.flags().Parse(args, nothing); err != nil {
		t.Fatal(err)
	}
	services, err := c.services()
	if err != nil {
		t.Fatal(err)
	}
	opts, err := c.options()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{stop: cancel, done: make(chan struct{})}
	r.forwarder = newForwarder(&c, services, opts, slog.New(slog.NewTextHandler(&r.log, nil)), &r.out)
	go func() {
		defer close(r.done)
		r.failed, r.cut = r.serve(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-r.done
		if t.Failed() {
			t.Logf("forward %q printed:\n%s\n%s", args, &r.out, &r.log)
		}
	})
	return r
}

// addrs waits for n public addresses and returns them by their targets; that of a single
// mapping has none.
func (r *running) addrs(t *testing.T, n int) map[string]string {
	t.Helper()
	eventually(t, "public addresses", func() bool { return len(r.out.lines()) >= n })
	addrs := make(map[string]string)
	for _, line := range r.out.lines() {
		addr, target, _ := strings.Cut(line, " -> ")
		addrs[target] = addr
	}
	return addrs
}

// ended waits for the end.
func (r *running) ended(t *testing.T) {
	t.Helper()
	select {
	case <-r.done:
	case <-time.After(patience):
		t.Fatal("does not end")
	}
}

// nobody returns an address where nobody listens, nor is going to while the test runs: it
// is that of a connection.
func nobody(t *testing.T) string {
	t.Helper()
	c, _ := tcptest.Pair(t)
	return c.LocalAddr().String()
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// serve says a greeting to all who come to ln, and then what they say, until it is closed.
func serve(ln net.Listener, greeting string) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.WriteString(c, greeting)
			io.Copy(c, c)
		}()
	}
}

func dial(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// wantRead checks what comes next.
func wantRead(t *testing.T, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); string(got) != want {
		t.Fatalf("read %q, %v, want %q", got[:n], err, want)
	}
}

// wantExchange says something to whoever says all back.
func wantExchange(t *testing.T, c net.Conn, text string) {
	t.Helper()
	written := make(chan error, 1)
	go func() { // for no buffer may hold it all
		_, err := io.WriteString(c, text)
		written <- err
	}()
	wantRead(t, c, text)
	if err := <-written; err != nil {
		t.Fatal(err)
	}
}

// wantEnd has a client half-close and checks that nothing but the end comes.
func wantEnd(t *testing.T, c *net.TCPConn) {
	t.Helper()
	c.CloseWrite()
	if rest, err := io.ReadAll(c); len(rest) > 0 || err != nil {
		t.Errorf("at the end the client read %q, %v", rest, err)
	}
}

// wantReset checks that a client is reset, which may be as soon as it has connected.
func wantReset(t *testing.T, addr string) {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, patience)
	var got []byte
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		got, err = io.ReadAll(c)
	}
	if len(got) > 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %q, %v, want a reset", got, err)
	}
}

// One service alone is told by its address on a line, as scripts expect it.
func TestOne(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	ln := listen(t)
	go serve(ln, "hello ")
	r := start(t, "-relay", at, "-to", ln.Addr().String())
	addr := r.addrs(t, 1)[""]
	if got := r.out.String(); got != addr+"\n" {
		t.Errorf("printed %q", got)
	}
	c := dial(t, addr)
	wantRead(t, c, "hello ")
	wantExchange(t, c, "there")
	wantEnd(t, c)
	r.stop()
	r.ended(t)
	if len(r.failed) > 0 || r.cut {
		t.Errorf("ended with %v, cut off: %v", r.failed, r.cut)
	}
}

// Several services in one process, of which one is at a Unix socket.
func TestSeveral(t *testing.T) {
	for _, dedicated := range []string{"-1", "1"} {
		t.Run("dedicated "+dedicated, func(t *testing.T) {
			at, _ := startRelay(t, "127.0.0.1:0")
			socket := t.TempDir() + "/s"
			unix, err := net.Listen("unix", socket)
			if err != nil {
				t.Skip("no Unix sockets here: ", err)
			}
			t.Cleanup(func() { unix.Close() })
			tcp := listen(t)
			go serve(tcp, "TCP ")
			go serve(unix, "Unix ")
			r := start(t, "-relay", at, "-dedicated", dedicated, "-to", "unix:"+socket+",name=u", "-to", tcp.Addr().String()+",name=t")
			addrs := r.addrs(t, 2)
			for target, greeting := range map[string]string{tcp.Addr().String(): "TCP ", "unix:" + socket: "Unix "} {
				c := dial(t, addrs[target])
				wantRead(t, c, greeting)
				wantExchange(t, c, strings.Repeat("some data ", 100_000))
				wantEnd(t, c)
			}
		})
	}
}

// Targets that share a name have one address, and the clients between them.
func TestShared(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	one, two := listen(t), listen(t)
	go serve(one, "1")
	go serve(two, "2")
	r := start(t, "-relay", at, "-name", "web", "-shared", "-to", one.Addr().String(), "-to", two.Addr().String())
	addrs := r.addrs(t, 2)
	addr := addrs[one.Addr().String()]
	if addrs[two.Addr().String()] != addr {
		t.Fatalf("addresses: %q", addrs)
	}
	// Clients stay, so that the other one has fewer, as soon as the relay gives it any.
	got := make(map[byte]bool)
	eventually(t, "each has a client", func() bool {
		var b [1]byte
		if _, err := io.ReadFull(dial(t, addr), b[:]); err != nil {
			t.Fatal(err)
		}
		got[b[0]] = true
		return got['1'] && got['2']
	})
}

// A service by hostname says where it is reached.
func TestHostname(t *testing.T) {
	srv, err := relay.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	registration, public := listen(t), listen(t)
	var wg sync.WaitGroup
	wg.Go(func() { srv.ServeHosts(public) })
	wg.Go(func() { srv.Serve(registration) })
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	ln := listen(t)
	go serve(ln, "")
	r := start(t, "-wait", "-relay", registration.Addr().String(), "-to", ln.Addr().String()+",hostname=app.example.com")
	_, port, _ := net.SplitHostPort(public.Addr().String())
	if addr := r.addrs(t, 1)[""]; addr != "app.example.com:"+port {
		t.Errorf("printed %q", addr)
	}
	c := dial(t, public.Addr().String())
	wantExchange(t, c, "GET / HTTP/1.1\r\nHost: app.example.com\r\n\r\n")
}

// A client is reset when nobody is at the target, and that is said once a second, however
// many clients come.
func TestLocalAway(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	r := start(t, "-relay", at, "-to", nobody(t))
	addr := r.addrs(t, 1)[""]
	const crowd = 50
	begun := time.Now()
	for range crowd {
		wantReset(t, addr)
	}
	eventually(t, "all were counted", func() bool { return r.mappings[0].row().missed == crowd })
	said := strings.Count(r.log.String(), "no local connection")
	if most := 1 + int(time.Since(begun)/time.Second); said < 1 || said > most {
		t.Errorf("it was said %d times, and %d at most are right", said, most)
	}
	if !strings.Contains(r.log.String(), "refused") {
		t.Errorf("the log does not say why:\n%s", &r.log)
	}
}

// Who is there when it is stopped may go on.
func TestDrain(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	ln := listen(t)
	go serve(ln, "")
	r := start(t, "-relay", at, "-to", ln.Addr().String(), "-drain", "1h")
	addr := r.addrs(t, 1)[""]
	c := dial(t, addr)
	wantExchange(t, c, "hello")
	r.stop()
	wantRefused(t, addr)
	wantExchange(t, c, "still here?")
	select {
	case <-r.done:
		t.Error("ended before its client")
	default:
	}
	wantEnd(t, c)
	r.ended(t)
	if len(r.failed) > 0 || r.cut {
		t.Errorf("ended with %v, cut off: %v", r.failed, r.cut)
	}
}

func wantRefused(t *testing.T, addr string) {
	t.Helper()
	eventually(t, "nobody is at "+addr, func() bool {
		c, err := net.DialTimeout("tcp", addr, patience)
		if err == nil {
			c.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
}

// Who stays for longer than -drain is cut off.
func TestDrainOver(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	ln := listen(t)
	go serve(ln, "")
	r := start(t, "-relay", at, "-to", ln.Addr().String(), "-drain", "1ms")
	c := dial(t, r.addrs(t, 1)[""])
	wantExchange(t, c, "hello")
	r.stop()
	r.ended(t)
	if len(r.failed) > 0 || !r.cut {
		t.Errorf("ended with %v, cut off: %v", r.failed, r.cut)
	}
	wantEnd(t, c) // the process would have ended by now
}

// When the relay refuses a mapping the program ends, and says which it was.
func TestRefused(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	taken, ln := listen(t), listen(t)
	go serve(ln, "")
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	good := start(t, "-relay", at, "-to", ln.Addr().String(), "-drain", "1h")
	refused := start(t, "-relay", at, "-to", "localhost:1,port="+port)
	refused.ended(t)
	wantCode(t, refused.failed, relay.CodePortUnavailable)
	if got := refused.log.String(); strings.Contains(got, "stopping") {
		t.Errorf("there was nothing to stop:\n%s", got)
	}
	good.addrs(t, 1)

	// Of two, one.
	holder := start(t, "-relay", at, "-to", ln.Addr().String()+",name=held")
	holder.addrs(t, 1)
	two := start(t, "-relay", at, "-drain", "1h", "-to", ln.Addr().String()+",name=fine", "-to", "localhost:1,name=held")
	two.ended(t)
	wantCode(t, two.failed, relay.CodeNameTaken)
	if got := fmt.Sprint(two.failed); !strings.Contains(got, "-to localhost:1: ") {
		t.Errorf("it does not say which: %s", got)
	}
}

func wantCode(t *testing.T, errs []error, code relay.Code) {
	t.Helper()
	if len(errs) != 1 {
		t.Fatalf("failed with %v", errs)
	}
	if re, ok := errors.AsType[*relay.RegisterError](errs[0]); !ok || re.Code != code {
		t.Errorf("failed with %v, want %s", errs[0], code)
	}
}

// A service that the operator ends takes the others with it, whose clients may go on.
func TestDisconnected(t *testing.T) {
	srv, err := relay.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	registration := listen(t)
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(registration) })
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	ln, other := listen(t), listen(t)
	go serve(ln, "")
	r := start(t, "-relay", registration.Addr().String(), "-drain", "1h",
		"-to", ln.Addr().String()+",name=stays", "-to", other.Addr().String()+",name=goes")
	c := dial(t, r.addrs(t, 2)[ln.Addr().String()])
	wantExchange(t, c, "hello")
	if err := srv.Disconnect("goes"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it stops", func() bool { return strings.Contains(r.log.String(), "msg=stopping") })
	if log := r.log.String(); !strings.Contains(log, "-to "+other.Addr().String()+": ") || strings.Contains(log, "level=ERROR") {
		t.Errorf("the log does not say why, or what is said in the end:\n%s", log)
	}
	wantExchange(t, c, "still here?")
	wantEnd(t, c)
	r.ended(t)
	wantCode(t, r.failed, relay.CodeDisconnected)
}

// A service that the relay ends has its clients finish, too, if they can.
func TestEndedWithClients(t *testing.T) {
	srv, err := relay.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	registration := listen(t)
	at := registration.Addr().String()
	served, shut := make(chan error, 1), make(chan error, 1)
	go func() { served <- srv.Serve(registration) }()
	ln := listen(t)
	go serve(ln, "")
	r := start(t, "-relay", at, "-to", ln.Addr().String(), "-drain", "1h")
	c := dial(t, r.addrs(t, 1)[""])
	wantExchange(t, c, "hello")

	// The next relay at that address does not know it.
	go func() { shut <- srv.Shutdown(context.Background()) }()
	<-served
	startRelay(t, at, relay.WithTokens("another"))
	eventually(t, "it stops", func() bool { return strings.Contains(r.log.String(), "msg=stopping") })
	if got := r.mappings[0].row(); got.state != ended || r.mappings[0].stats().Live != 1 {
		t.Errorf("%+v", got)
	}
	wantExchange(t, c, strings.Repeat("still here? ", 10_000))
	select {
	case <-r.done:
		t.Error("ended before its client")
	default:
	}
	wantEnd(t, c)
	r.ended(t)
	wantCode(t, r.failed, relay.CodeUnauthorized)
	if err := <-shut; err != nil || r.cut {
		t.Errorf("the relay ended with %v, cut off: %v", err, r.cut)
	}
}

// Clients that have left are not cut off when the time to leave is over, even if that was
// none.
func TestNobodyCutOff(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	r := start(t, "-relay", at, "-to", nobody(t))
	wantReset(t, r.addrs(t, 1)[""])
	r.stop()
	r.ended(t)
	over := make(chan struct{})
	close(over)
	for range 100 { // a select takes either
		if !r.mappings[0].await(over) {
			t.Fatal("they are")
		}
	}
}

// A stop while it waits for a relay is an end in order.
func TestStopWaiting(t *testing.T) {
	r := start(t, "-relay", nobody(t), "-wait", "-to", "1", "-to", "2,port=8081", "-to", "3")
	for _, m := range r.mappings {
		eventually(t, "it says why it waits", func() bool { return m.row().why != "" })
		if got := m.row(); got.state != registering {
			t.Errorf("state %v, %q", got.state, got.why)
		}
	}
	r.stop()
	r.ended(t)
	for _, m := range r.mappings {
		if got := m.row(); got.state != ended || got.why != "" {
			t.Errorf("in the end: %v, %q", got.state, got.why)
		}
	}
	if len(r.failed) > 0 || r.cut {
		t.Errorf("ended with %v, cut off: %v", r.failed, r.cut)
	}
}

// The address is printed anew when the relay comes back with another host, and only then.
func TestAddressChanges(t *testing.T) {
	at, closeFirst := startRelay(t, "127.0.0.1:0", relay.WithAdvertisedHost("one.example.com"))
	ln := listen(t)
	go serve(ln, "")
	r := start(t, "-relay", at, "-to", ln.Addr().String())
	one := r.addrs(t, 1)[""]
	_, port, _ := net.SplitHostPort(one)
	closeFirst()
	_, closeSecond := startRelay(t, at, relay.WithAdvertisedHost("one.example.com"))
	eventually(t, "it is back", func() bool { return r.mappings[0].stats().Reconnects == 1 })
	closeSecond()
	startRelay(t, at, relay.WithAdvertisedHost("two.example.com"))
	want := "one.example.com:" + port + "\ntwo.example.com:" + port + "\n"
	eventually(t, "the other address", func() bool { return len(r.out.lines()) > 1 })
	if got := r.out.String(); got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
	wantExchange(t, dial(t, "127.0.0.1:"+port), "hello")
}

// -pin trusts a certificate of nobody's by its key, and that alone.
func TestPin(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	at, _ := startRelay(t, "127.0.0.1:0", relay.WithTLSConfig(&tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}))
	ln := listen(t)
	go serve(ln, "")
	other := "sha256//" + strings.Repeat("A", 43) + "="
	r := start(t, "-relay", at, "-to", ln.Addr().String(), "-pin", other, "-pin", relay.Pin(cert))
	wantExchange(t, dial(t, r.addrs(t, 1)[""]), "hello")
	for _, args := range [][]string{{"-pin", other}, {"-tls"}} {
		r := start(t, append(args, "-relay", at, "-to", "1")...)
		r.ended(t)
		wantCode(t, r.failed, relay.CodeTLS)
	}
}

// What was given as the name of a file may be the token, which is not repeated.
func TestTokenNotTold(t *testing.T) {
	for _, token := range []string{"S3CRET", strings.Repeat("S3CRET", 50), "S3CRET\x00"} {
		c := config{token: token}
		if _, err := c.options(); err == nil || strings.Contains(err.Error(), "S3CRET") || !strings.Contains(err.Error(), "RELAY_TOKEN") {
			t.Errorf("%v", err)
		}
	}
}

// A file has one token, and comments.
func TestReadToken(t *testing.T) {
	for text, want := range map[string]string{
		"one\n":                           "one",
		" one ":                           "one",
		"# of the app\r\n\r\none\r\n # x": "one",
		"":                                "no token",
		"# one\n":                         "no token",
		"one\ntwo\n":                      "more than one token",
	} {
		file := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readToken(file)
		if err == nil && got != want || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

// Blanks around a token in the environment are none of it.
func TestTokenOfEnvironment(t *testing.T) {
	t.Setenv("RELAY_TOKEN", " S3CRET\n")
	at, _ := startRelay(t, "127.0.0.1:0", relay.WithTokens("S3CRET"))
	start(t, "-relay", at, "-to", "1").addrs(t, 1)
}

// With -verbose the log has clients, too.
func TestProgram(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	ln := listen(t)
	go serve(ln, "")
	run := func(env []string, args ...string) (*exec.Cmd, *transcript) {
		var said transcript
		cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
		cmd.Env = append(append(os.Environ(), asProgram+"=1"), env...)
		cmd.Stdout, cmd.Stderr = &said, &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, &said
	}
	for _, args := range [][]string{{}, {"-to", "1", "-pin", "nonsense"}} {
		cmd, said := run(nil, args...)
		cmd.Wait()
		if status := cmd.ProcessState.ExitCode(); status != 2 || !strings.HasPrefix(said.String(), "forward: -") {
			t.Errorf("%q: status %d, %s", args, status, said)
		}
	}
	cmd, said := run(nil, "-version")
	if err := cmd.Wait(); err != nil || !strings.HasPrefix(said.String(), "forward ") || len(said.lines()) != 1 {
		t.Errorf("%v, %s", err, said)
	}
	cmd, said = run([]string{"FORWARD_VERBOSE=true", "FORWARD_PORT=tcp://10.0.0.1:80"}, "-relay", at, "-to", ln.Addr().String())
	defer cmd.Wait()
	defer cmd.Process.Kill()
	addr := ""
	eventually(t, "an address", func() bool {
		for _, line := range said.lines() {
			if _, _, err := net.SplitHostPort(line); err == nil {
				addr = line
			}
		}
		return addr != ""
	})
	c := dial(t, addr)
	eventually(t, "its client in the log", func() bool {
		return strings.Contains(said.String(), "client="+c.LocalAddr().String())
	})
}
