package peers

import (
	"bufio"
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

// TestRestart has relayd and forward killed, replaced and stopped while they are in
// use, and has them identify each other.
func TestRestart(t *testing.T) {
	bin := buildExamples(t, "relayd", "forward")
	relayd, forward := filepath.Join(bin, "relayd"), filepath.Join(bin, "forward")
	t.Run("Killed", func(t *testing.T) { restartKilled(t, relayd) })
	t.Run("HandedOver", func(t *testing.T) { restartHandedOver(t, relayd) })
	t.Run("NotHandedOver", func(t *testing.T) { restartNotHandedOver(t, relayd) })
	t.Run("HangupWhileTakingOver", func(t *testing.T) { hangupWhileTakingOver(t, relayd) })
	t.Run("RelaydStops", func(t *testing.T) { relaydStops(t, relayd) })
	t.Run("RelaydStopsAtOnce", func(t *testing.T) { relaydStopsAtOnce(t, relayd) })
	t.Run("ForwardStops", func(t *testing.T) { forwardStops(t, forward) })
	t.Run("ForwardStopsAtOnce", func(t *testing.T) { forwardStopsAtOnce(t, forward) })
	t.Run("Credentials", func(t *testing.T) { programCredentials(t, relayd, forward) })
}

// listening finds in a line of relayd's output where services register.
func listening(line string) (string, bool) {
	_, rest, ok := strings.Cut(line, "msg=listening addr=")
	addr, _, _ := strings.Cut(rest, " ")
	return addr, ok
}

// public finds the public address in what forward prints.
func public(line string) (string, bool) {
	_, _, err := net.SplitHostPort(line)
	return line, err == nil
}

// signal has the program stop, and returns when it has begun to.
func (p *program) signal(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	p.awaitLine(t, "that it stops", func(line string) (string, bool) {
		return line, strings.Contains(line, "msg=stopping")
	})
}

// wantRunning checks that the program has not ended.
func (p *program) wantRunning(t *testing.T) {
	t.Helper()
	select {
	case <-p.exited:
		t.Fatalf("%s has ended: %v", filepath.Base(p.cmd.Path), p.status)
	default:
	}
}

// wantDrained waits until the program has ended, with status 0 and nobody cut off.
func (p *program) wantDrained(t *testing.T) {
	t.Helper()
	await(t, p.exited, "the end of "+filepath.Base(p.cmd.Path))
	if p.status != nil || strings.Contains(p.output(), "cut off") {
		t.Errorf("%s ended with %v and said:\n%s", filepath.Base(p.cmd.Path), p.status, p.output())
	}
}

// wantTerminated sends the second signal and waits until it has ended the program,
// and with it the conn.
func (p *program) wantTerminated(t *testing.T, c net.Conn) {
	t.Helper()
	p.wantRunning(t)
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	await(t, p.exited, "the end of "+filepath.Base(p.cmd.Path))
	status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() || status.Signal() != syscall.SIGTERM {
		t.Errorf("the second signal ended %s with %v", filepath.Base(p.cmd.Path), p.status)
	}
	if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the second signal the client read %d bytes, %v", n, err)
	}
}

// serveEcho sends back what it gets, until ln is closed.
func serveEcho(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
		}()
	}
}

// registerAt registers at a relay until the test ends.
func registerAt(t *testing.T, addr string) *relay.Listener {
	t.Helper()
	ln, err := relay.Register(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// watchedListener keeps the errors of Accept, some of which http.Server gets over.
type watchedListener struct {
	*relay.Listener
	mu   sync.Mutex
	errs []error
}

func (l *watchedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		l.mu.Lock()
		l.errs = append(l.errs, err)
		l.mu.Unlock()
	}
	return c, err
}

// wantShutdown shuts the site on l down, and checks that this was the first that
// its server heard from Accept but conns.
func (l *watchedListener) wantShutdown(t *testing.T, s *httpSite) {
	t.Helper()
	l.mu.Lock()
	if len(l.errs) > 0 {
		t.Errorf("Accept failed: %v", l.errs)
	}
	l.mu.Unlock()
	select {
	case err := <-s.served:
		t.Errorf("Serve returned %v before Shutdown", err)
		return
	default:
	}
	if err := s.srv.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if err := await(t, s.served, "the end of Serve"); err != http.ErrServerClosed {
		t.Errorf("Serve returned %v", err)
	}
}

// restartKilled kills relayd and starts it again with the same flags. The http.Server
// of an app does not notice, and its clients find it where it was.
func restartKilled(t *testing.T, relayd string) {
	var args []string
	// start does what a supervisor would: a port that is free now may be taken for a
	// moment by a connection of another process.
	start := func() (p *program, addr string) {
		t.Helper()
		for giveUp := time.Now().Add(patience); time.Now().Before(giveUp); {
			p = startProgram(t, relayd, args...)
			if p.poll(func() bool {
				for line := range strings.Lines(p.output()) {
					if a, ok := listening(line); ok && strings.HasSuffix(line, "\n") {
						addr = strings.TrimSpace(a)
						return true
					}
				}
				return false
			}) {
				return p, addr
			}
		}
		t.Fatal("relayd does not start")
		panic("unreachable")
	}
	ln := listenTCP(t)
	first := min(ln.Addr().(*net.TCPAddr).Port, 65535-20)
	ln.Close()
	args = []string{"-listen", ln.Addr().String(), "-ports", fmt.Sprintf("%d-%d", first+1, first+20)}
	p, addr := start()

	app := &watchedListener{Listener: registerAt(t, addr)}
	site := startHTTP(t, app, echoPath)
	client := site.client(t)
	get := func(path string) error {
		resp, err := client.Get("http://" + site.addr + path)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && (resp.StatusCode != http.StatusOK || string(body) != path) {
			err = fmt.Errorf("%s, %q", resp.Status, body)
		}
		return err
	}
	if err := get("/before"); err != nil {
		t.Fatal(err)
	}
	for round := range 2 {
		if err := p.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		await(t, p.exited, "the end of relayd")
		if err := get("/between"); err == nil {
			t.Error("a request was answered while there was no relay")
		}
		p, _ = start()
		var err error
		if !p.poll(func() bool { err = get("/after"); return err == nil }) {
			t.Fatalf("not back after kill %d: %v", round+1, err)
		}
		if got := app.Addr().String(); got != site.addr {
			t.Errorf("the app is at %s, and was at %s", got, site.addr)
		}
	}
	if got := app.Stats().Reconnects; got != 2 {
		t.Errorf("%d reconnects, want 2", got)
	}
	client.CloseIdleConnections()
	app.wantShutdown(t, site)
	p.signal(t)
	p.wantDrained(t)
}

// webLoad is a number of HTTP clients, none of which tries anything twice.
type webLoad struct {
	addr     string
	sent     atomic.Int64 // requests
	answered atomic.Int64 // of these
	round    atomic.Int64 // clients that keep their connection do so until it changes
	stop     chan struct{}
	wg       sync.WaitGroup
}

// startWebLoad starts clients of which some use a connection for one request, and
// others keep theirs. They run until end is called, or one fails.
func startWebLoad(t *testing.T, addr string) *webLoad {
	l := &webLoad{addr: addr, stop: make(chan struct{})}
	client := func(again func(round int64) bool) {
		for !l.stopped() {
			round := l.round.Load()
			if err := l.visit(func() bool { return again(round) && !l.stopped() }); err != nil {
				t.Errorf("a request failed: %v", err)
				return
			}
		}
	}
	for range 3 {
		l.wg.Go(func() { client(func(int64) bool { return false }) })
		l.wg.Go(func() { client(func(round int64) bool { return round == l.round.Load() }) })
	}
	t.Cleanup(l.end)
	return l
}

func (l *webLoad) stopped() bool {
	select {
	case <-l.stop:
		return true
	default:
		return false
	}
}

// end waits until all clients have left.
func (l *webLoad) end() {
	if !l.stopped() {
		close(l.stop)
	}
	l.wg.Wait()
}

// visit makes requests over one connection for as long as again says so.
func (l *webLoad) visit(again func() bool) error {
	c, err := net.DialTimeout("tcp", l.addr, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	for more := true; more; more = again() {
		c.SetDeadline(time.Now().Add(patience))
		path := fmt.Sprintf("/%d", l.sent.Add(1))
		if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: relay\r\n\r\n", path); err != nil {
			return err
		}
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return err
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK || string(body) != path {
			return fmt.Errorf("%s got %s, %q", path, resp.Status, body)
		}
		l.answered.Add(1)
	}
	return nil
}

// restartHandedOver has relayds take each other's place under load. No request fails.
func restartHandedOver(t *testing.T, relayd string) {
	door := filepath.Join(t.TempDir(), "door")
	notes := filepath.Join(t.TempDir(), "notes")
	if err := os.WriteFile(notes, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), relayd, "-listen", "127.0.0.1:0", "-handover", notes).CombinedOutput(); err == nil {
		t.Errorf("relayd takes a file for its socket: %s", out)
	}
	if b, err := os.ReadFile(notes); err != nil || string(b) != "precious" {
		t.Errorf("of a file is left %q, %v", b, err)
	}
	ln := listenTCP(t)
	hosts := ln.Addr().String()
	ln.Close()
	ln = listenTCP(t)
	status := ln.Addr().String()
	ln.Close()
	var before os.FileInfo
	// start returns when the relayd is ready to be replaced by the next one, which is
	// when it has put its socket in the place of its predecessor's.
	start := func() (p *program, addr string) {
		t.Helper()
		p = startExample(t, relayd, "-listen", "127.0.0.1:0", "-hosts", hosts, "-handover", door, "-drain", "1h", "-status", status)
		addr = p.awaitLine(t, "its address", listening)
		p.awaitLine(t, "that the page is its own", func(line string) (string, bool) {
			return line, strings.Contains(line, "url=http://"+status+"/")
		})
		ready := p.poll(func() bool {
			now, err := os.Stat(door)
			if err != nil || before != nil && os.SameFile(now, before) {
				return false
			}
			before = now
			return true
		})
		if !ready {
			t.Fatal("relayd does not wait for a successor")
		}
		return p, addr
	}
	p, addr := start()
	app := &watchedListener{Listener: registerAt(t, addr)}
	var served atomic.Int64
	site := startHTTP(t, app, func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		echoPath(w, r)
	})
	load := startWebLoad(t, site.addr)
	// more waits for that many more answers.
	more := func(n int64) {
		t.Helper()
		want := load.answered.Load() + n
		if !p.poll(func() bool { return t.Failed() || load.answered.Load() >= want }) {
			t.Fatal("the clients got no more answers")
		}
	}
	more(100)
	for round := range int64(2) {
		dialTCP(t, hosts) // says nothing, which is waited for, but ends nobody
		next, at := start()
		if at != addr {
			t.Errorf("the next relayd is at %s, and the one before it was at %s", at, addr)
		}
		if !next.poll(func() bool { return app.Stats().Reconnects > round }) {
			t.Fatal("the app does not find the next relayd")
		}
		more(100)
		p.wantRunning(t) // for those who keep their connections
		load.round.Add(1)
		p.wantDrained(t)
		p = next
		more(100)
	}
	load.end()
	if sent, answered := load.sent.Load(), load.answered.Load(); sent != answered || sent != served.Load() {
		t.Errorf("%d requests, %d served, %d answered", sent, served.Load(), answered)
	}
	if got := app.Stats().Reconnects; got != 2 {
		t.Errorf("%d reconnects, want 2", got)
	}
	if got := app.Addr().String(); got != site.addr {
		t.Errorf("the app is at %s, and was at %s", got, site.addr)
	}
	app.wantShutdown(t, site)
	p.signal(t)
	p.wantDrained(t)
}

// restartNotHandedOver starts relayds that cannot do all that they were told to beside one
// that works: it goes on, or its successor does.
func restartNotHandedOver(t *testing.T, relayd string) {
	const elsewhere = "192.0.2.1:9" // an address of nobody's
	door := filepath.Join(t.TempDir(), "door")
	p := startExample(t, relayd, "-listen", "127.0.0.1:0", "-handover", door)
	addr := p.awaitLine(t, "its address", listening)
	if !p.poll(func() bool { _, err := os.Stat(door); return err == nil }) {
		t.Fatal("relayd does not wait for a successor")
	}
	ln := registerAt(t, addr)
	go serveEcho(ln)
	echoes := func() {
		t.Helper()
		c := dialTCP(t, ln.Addr().String())
		wantExchange(t, c, c, "hello")
		c.Close()
	}
	out, err := exec.CommandContext(t.Context(), relayd, "-listen", "127.0.0.1:0", "-handover", door, "-status", elsewhere).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "-status") {
		t.Errorf("a relayd without its status page: %v\n%s", err, out)
	}
	p.wantRunning(t)
	echoes()
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(door), ".relayd-*")); len(left) > 0 {
		t.Errorf("left over: %q", left)
	}

	next := startExample(t, relayd, "-listen", "127.0.0.1:0", "-handover", door, "-hosts", elsewhere)
	next.awaitLine(t, "that it serves no hosts", func(line string) (string, bool) {
		return line, strings.Contains(line, "no hosts are served")
	})
	p.wantDrained(t)
	if !next.poll(func() bool { return ln.Stats().Reconnects == 1 }) {
		t.Fatal("the app does not find the next relayd")
	}
	echoes()
}

// hangupWhileTakingOver sends a SIGHUP, which is to reload, to a relayd that is still
// starting.
func hangupWhileTakingOver(t *testing.T, relayd string) {
	door := filepath.Join(t.TempDir(), "door")
	ln, err := net.Listen("unix", door)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p := startProgram(t, relayd, "-listen", "127.0.0.1:0", "-handover", door)
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	c.Close() // a predecessor that is none
	await(t, p.exited, "the end of relayd")
	if exit, ok := errors.AsType[*exec.ExitError](p.status); !ok || exit.ExitCode() != 1 {
		t.Errorf("relayd ended with %v", p.status)
	}
}

// relaydStops has relayd stop while a client talks to an app.
func relaydStops(t *testing.T, relayd string) {
	p := startExample(t, relayd, "-listen", "127.0.0.1:0", "-drain", "1h")
	addr := p.awaitLine(t, "its address", listening)
	app := registerAt(t, addr)
	go serveEcho(app)
	c := dialTCP(t, app.Addr().String())
	wantExchange(t, c, c, "hello")
	p.signal(t)
	wantRefused(t, app.Addr().String())
	wantRefused(t, addr)
	wantExchange(t, c, c, "still here?")
	p.wantRunning(t)
	c.CloseWrite()
	if rest, err := io.ReadAll(c); len(rest) > 0 || err != nil {
		t.Errorf("at the end the client read %q, %v", rest, err)
	}
	p.wantDrained(t)
}

func relaydStopsAtOnce(t *testing.T, relayd string) {
	p := startProgram(t, relayd, "-listen", "127.0.0.1:0", "-drain", "1h")
	app := registerAt(t, p.awaitLine(t, "its address", listening))
	go serveEcho(app)
	c := dialTCP(t, app.Addr().String())
	wantExchange(t, c, c, "hello")
	p.signal(t)
	wantExchange(t, c, c, "still here?")
	p.wantTerminated(t, c)
}

// forwardStops has forward stop in the middle of a large upload. All of it arrives,
// and so does the download that answers it.
func forwardStops(t *testing.T, forward string) {
	const size = 8 << 20
	ln := listenTCP(t)
	uploaded := make(chan string, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		io.WriteString(c, "go")
		sum, _, _ := digest(c)
		uploaded <- sum
		io.Copy(c, testData(61, size))
	}()
	p := startExample(t, forward, "-relay", startRelayServer(t), "-to", ln.Addr().String(), "-drain", "1h")
	addr := p.awaitLine(t, "the public address", public)
	c := dialTCP(t, addr)
	word := make([]byte, len("go"))
	if _, err := io.ReadFull(c, word); err != nil {
		t.Fatal(err)
	}
	data := testData(60, size)
	if _, err := io.CopyN(c, data, size/2); err != nil {
		t.Fatal(err)
	}
	p.signal(t)
	wantRefused(t, addr)
	p.wantRunning(t)
	if _, err := io.Copy(c, data); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got := await(t, uploaded, "the upload"); got != testDigest(60, size) {
		t.Errorf("SHA-256 of the upload is %s", got)
	}
	if got, n, err := digest(c); got != testDigest(61, size) || err != nil {
		t.Errorf("the download is %d bytes with SHA-256 %s, %v", n, got, err)
	}
	p.wantDrained(t)
}

func forwardStopsAtOnce(t *testing.T, forward string) {
	ln := listenTCP(t)
	go serveEcho(ln)
	p := startProgram(t, forward, "-relay", startRelayServer(t), "-to", ln.Addr().String(), "-drain", "1h")
	c := dialTCP(t, p.awaitLine(t, "the public address", public))
	wantExchange(t, c, c, "hello")
	p.signal(t)
	wantExchange(t, c, c, "still here?")
	p.wantTerminated(t, c)
}

// programCredentials has relayd prove who it is, and forward show what it may.
func programCredentials(t *testing.T, relayd, forward string) {
	dir := t.TempDir()
	file := func(name string, content []byte) string {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	server, _ := tlsConfigs()
	key, err := x509.MarshalPKCS8PrivateKey(server.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert := file("cert", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificates[0].Certificate[0]}))
	p := startExample(t, relayd, "-listen", "127.0.0.1:0",
		"-cert", cert, "-key", file("key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
		"-tokens", file("ours", []byte("# ours\nold\n\nour secret\n")), "-tokens", file("theirs", []byte("their secret\n")))
	addr := p.awaitLine(t, "its address", listening)
	ln := listenTCP(t)
	go serveEcho(ln)
	token := func(s string) string { return file("token of "+s, []byte(s+"\n")) }
	args := func(more ...string) []string {
		return append([]string{"-relay", addr, "-to", ln.Addr().String()}, more...)
	}
	wantEcho := func(more ...string) {
		t.Helper()
		p := startExample(t, forward, args(more...)...)
		c := dialTCP(t, p.awaitLine(t, "the public address", public))
		wantExchange(t, c, c, "hello")
		c.Close()
	}
	wantRefusal := func(code string, more ...string) {
		t.Helper()
		p := exec.CommandContext(t.Context(), forward, args(more...)...)
		var stderr bytes.Buffer
		p.Stderr = &stderr
		err := p.Run()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 || !strings.Contains(stderr.String(), code) {
			t.Errorf("forward %q ended with %v, want %s:\n%s", more, err, code, stderr.Bytes())
		}
	}
	wantEcho("-ca", cert, "-token", token("our secret"), "-name", "web")
	wantRefusal("unauthorized", "-ca", cert, "-token", token("no secret"), "-name", "other")
	wantRefusal("no token", "-ca", cert, "-token", token("# ours"), "-name", "other")
	t.Setenv("RELAY_TOKEN", "# ours") // a comment of relayd's file, too, is no token
	wantRefusal("unauthorized", "-ca", cert, "-name", "other")
	wantRefusal("name_taken", "-ca", cert, "-token", token("their secret"), "-name", "web")
	wantEcho("-ca", cert, "-token", token("their secret"), "-name", "other")

	// Forward takes no relay that it cannot verify, and this one takes nobody without TLS.
	wantRefusal("tls: ", "-tls", "-token", token("our secret"), "-name", "other")
	wantRefusal("tls: ", "-token", token("our secret"), "-name", "other")
}
