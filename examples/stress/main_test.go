package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/leak"
)

// patience bounds every wait of these tests, so that what never happens fails on a line
// of its test. Nothing is asserted about how long things take.
const patience = time.Minute

// asProgram in the environment has the test's executable be the program.
const asProgram = "STRESS_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	leak.Main(m)
}

// behindRelay runs a relay and a service behind it, whose clients are given to serve, and
// returns the public address.
func behindRelay(t *testing.T, wrap func(net.Listener) net.Listener, serve func(conn)) string {
	t.Helper()
	srv, err := relay.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	registration, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(registration) }()
	t.Cleanup(func() {
		srv.Close()
		<-served
	})
	public, err := relay.Register(t.Context(), registration.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	serveClients(t, wrap(public), serve)
	return public.Addr().String()
}

// directly serves clients at a TCP address without a relay, and returns it.
func directly(t *testing.T, serve func(conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveClients(t, ln, serve)
	return ln.Addr().String()
}

// serveClients gives each client to serve, and closes it after that, until the test ends.
func serveClients(t *testing.T, ln net.Listener, serve func(conn)) {
	over := make(chan struct{})
	go func() {
		defer close(over)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				serve(c.(conn))
			}()
		}
	}()
	t.Cleanup(func() {
		ln.Close()
		<-over
	})
}

func plain(ln net.Listener) net.Listener { return ln }

// An echo sends everything back, and calls enough once it has sent so many bytes.
type echo struct {
	left   atomic.Int64
	enough func()
}

// echoOf returns an echo, and a context that ends once that has sent n bytes.
func echoOf(t *testing.T, n int64) (context.Context, *echo) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	e := &echo{enough: cancel}
	e.left.Store(n)
	return ctx, e
}

func (e *echo) serve(c conn) { io.Copy(io.MultiWriter(c, e), c) }

// Write counts what was sent.
func (e *echo) Write(b []byte) (int, error) {
	if e.left.Add(-int64(len(b))) <= 0 {
		e.enough()
	}
	return len(b), nil
}

// stress runs the program and returns what it says. The report is that of the JSON.
func stress(t *testing.T, ctx context.Context, args ...string) (status int, r *report, stdout, stderr, svg string) {
	t.Helper()
	dir := t.TempDir()
	jsonFile, svgFile := filepath.Join(dir, "report.json"), filepath.Join(dir, "report.svg")
	var out, err strings.Builder
	status = command(ctx, append([]string{"-json", jsonFile, "-svg", svgFile}, args...), nothing, &out, &err, false)
	r = new(report)
	if e := json.Unmarshal(readFile(t, jsonFile), r); e != nil {
		t.Fatal(e)
	}
	return status, r, out.String(), err.String(), string(readFile(t, svgFile))
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// checkGood fails the test unless the run went well and its figures fit each other.
func checkGood(t *testing.T, status int, r *report) {
	t.Helper()
	if status != 0 || r.Totals.Errors != 0 || len(r.Errors.First) != 0 {
		t.Errorf("status %d, errors %+v", status, r.Errors)
	}
	if want := r.Totals.Messages * int64(r.Parameters.Size); r.Totals.Bytes != want || want == 0 {
		t.Errorf("%d bytes of %d messages of %d bytes", r.Totals.Bytes, r.Totals.Messages, r.Parameters.Size)
	}
	if l := r.Latency; l.Count != r.Totals.Messages || !slices.IsSorted([]float64{0, l.Min, l.P50, l.P90, l.P99, l.P999, l.Max}) {
		t.Errorf("latencies of %d messages: %+v", r.Totals.Messages, l)
	}
	var messages, bytes int64
	from := 0.0
	for _, s := range r.Series {
		if s.From != from || s.To < from {
			t.Errorf("sample from %v to %v, after one that ended at %v", s.From, s.To, from)
		}
		from = s.To
		messages += s.Messages
		bytes += s.Bytes
	}
	if messages != r.Totals.Messages || bytes != r.Totals.Bytes || from != r.Elapsed {
		t.Errorf("the series has %d messages, %d bytes in %v s, the totals are %+v in %v s", messages, bytes, from, r.Totals, r.Elapsed)
	}
}

// TestBehindRelay runs each mode against an echo service behind a relay, with messages
// that are sent before they are received and such that are both at once, until enough has
// passed.
func TestBehindRelay(t *testing.T) {
	for _, mode := range []mode{roundTrips, bulk, connections} {
		for _, size := range []string{"1", "1000", "200000"} {
			t.Run(string(mode)+"/"+size, func(t *testing.T) {
				t.Parallel()
				n := int64(1 << 20)
				if size == "1" {
					n = 500
				}
				ctx, echo := echoOf(t, n)
				addr := behindRelay(t, plain, echo.serve)
				status, r, stdout, _, svg := stress(t, ctx, "-to", addr, "-time", "1h", "-timeout", "1m", "-clients", "7", "-mode", string(mode), "-size", size)
				checkGood(t, status, r)
				if r.Totals.Bytes < n {
					t.Errorf("%d bytes verified, %d echoed", r.Totals.Bytes, n)
				}
				if c := r.Totals.Connections; c < 1 || mode == connections && c != r.Totals.Messages || mode != connections && c > 7 {
					t.Errorf("%d connections for %d messages", c, r.Totals.Messages)
				}
				if !r.Interrupted {
					t.Error("not interrupted")
				}
				if !strings.Contains(stdout, "every byte came back") || !strings.Contains(stdout, "p99.9") {
					t.Errorf("stdout: %s", stdout)
				}
				checkXML(t, svg)
			})
		}
	}
}

// TestTime lets a run end by itself.
func TestTime(t *testing.T) {
	t.Parallel()
	_, echo := echoOf(t, 0)
	addr := behindRelay(t, plain, echo.serve)
	status, r, _, _, _ := stress(t, t.Context(), "-to", addr, "-time", "50ms", "-timeout", "1m", "-clients", "2", "-mode", "connections", "-seed", "7")
	// On a busy machine the time may be over before there was a message.
	if (status != 0) != (r.Totals.Messages == 0) || r.Totals.Errors > 0 || r.Interrupted || r.Elapsed < 0.05 {
		t.Errorf("status %d, interrupted: %v, after %v s of 0.05: %+v", status, r.Interrupted, r.Elapsed, r.Errors)
	}
	want := parameters{To: addr, Mode: connections, Clients: 2, Time: 0.05, Size: 1024, Timeout: 60, Seed: 7}
	if r.Parameters != want {
		t.Errorf("parameters %+v, not %+v", r.Parameters, want)
	}
}

// TestTLS has the service speak TLS with its clients, through the relay.
func TestTLS(t *testing.T) {
	certified := httptest.NewTLSServer(nil)
	certified.Close()
	config := &tls.Config{Certificates: certified.TLS.Certificates}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certified.Certificate().Raw})
	if err := os.WriteFile(ca, cert, 0o600); err != nil {
		t.Fatal(err)
	}
	secure := func(ln net.Listener) net.Listener { return tls.NewListener(ln, config) }
	for _, mode := range []mode{roundTrips, bulk, connections} {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			ctx, echo := echoOf(t, 1<<20)
			addr := behindRelay(t, secure, echo.serve)
			status, r, _, _, _ := stress(t, ctx, "-to", addr, "-time", "1h", "-timeout", "1m", "-clients", "3", "-mode", string(mode), "-size", "20000", "-ca", ca)
			checkGood(t, status, r)
			if !r.Parameters.TLS {
				t.Error("not over TLS")
			}
		})
	}
	t.Run("insecure", func(t *testing.T) {
		t.Parallel()
		ctx, echo := echoOf(t, 1)
		status, r, _, _, _ := stress(t, ctx, "-to", behindRelay(t, secure, echo.serve), "-time", "1h", "-timeout", "1m", "-clients", "1", "-insecure")
		checkGood(t, status, r)
	})
	t.Run("not trusted", func(t *testing.T) {
		t.Parallel()
		_, echo := echoOf(t, 1)
		p, _, err := parse([]string{"-to", behindRelay(t, secure, echo.serve), "-time", "1h", "-timeout", "1m", "-clients", "1", "-tls"}, nothing)
		if err != nil {
			t.Fatal(err)
		}
		checkErrors(t, runUntilFailed(t, p), connectFailed, "certificate")
	})
}

// TestSignal has a signal end the program, which reports all the same.
func TestSignal(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no signals")
	}
	t.Parallel()
	ctx, echo := echoOf(t, 1000)
	addr := directly(t, echo.serve)
	program := exec.CommandContext(t.Context(), os.Args[0], "-to", addr, "-time", "1h", "-timeout", "1m", "-clients", "3", "-json", "-")
	program.Env = append(os.Environ(), asProgram+"=1")
	var stdout, stderr bytes.Buffer
	program.Stdout, program.Stderr = &stdout, &stderr
	if err := program.Start(); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
	if err := program.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	if err := program.Wait(); err != nil {
		t.Errorf("%v\n%s", err, stderr.Bytes())
	}
	var r report
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		t.Fatalf("%v\n%s", err, stdout.Bytes())
	}
	checkGood(t, 0, &r)
	if !r.Interrupted || !strings.Contains(stderr.String(), "interrupted after") {
		t.Errorf("interrupted: %v\n%s", r.Interrupted, stderr.Bytes())
	}
}

// TestNoMessages has a run in which nothing came back not be a good one.
func TestNoMessages(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	status, r, stdout, _, _ := stress(t, ctx, "-to", "127.0.0.1:1")
	if status != 1 || r.Totals.Messages != 0 || r.Totals.Errors != 0 || !strings.Contains(stdout, "no messages") {
		t.Errorf("status %d, %+v, %s", status, r.Totals, stdout)
	}
}

// A gone is a standard output that nobody reads any more: it looks for files when it is
// written to.
type gone struct {
	t     *testing.T
	files []string
}

func (g *gone) Write([]byte) (int, error) {
	for _, name := range g.files {
		if len(readFile(g.t, name)) == 0 {
			g.t.Errorf("%s is still empty", name)
		}
	}
	return 0, io.ErrClosedPipe
}

// TestFilesFirst has the files be complete before the text is written.
func TestFilesFirst(t *testing.T) {
	dir := t.TempDir()
	files := []string{filepath.Join(dir, "json"), filepath.Join(dir, "svg")}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var stderr strings.Builder
	status := command(ctx, []string{"-to", "127.0.0.1:1", "-json", files[0], "-svg", files[1]}, nothing, &gone{t, files}, &stderr, false)
	if status != 1 || !strings.Contains(stderr.String(), "closed pipe") {
		t.Errorf("status %d, %s", status, stderr.String())
	}
}

func TestFilesThatCannotBe(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none", "report")
	for _, flag := range []string{"-json", "-svg"} {
		var stdout, stderr strings.Builder
		status := command(t.Context(), []string{"-to", "127.0.0.1:1", flag, none}, nothing, &stdout, &stderr, false)
		if status != 1 || !strings.Contains(stderr.String(), "stress: "+flag) || stdout.Len() > 0 {
			t.Errorf("%s: status %d, %s%s", flag, status, stdout.String(), stderr.String())
		}
	}
}
