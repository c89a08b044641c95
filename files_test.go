package relay_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
)

const childEnv = "RELAY_TEST_CHILD"

// inChild reports whether this is the process that withFiles started.
func inChild() bool { return os.Getenv(childEnv) != "" }

// withFiles prepares to run the same test in a process that may have n files open.
func withFiles(t *testing.T, n int) *exec.Cmd {
	t.Helper()
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("there is no shell to limit the files of a process: ", err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), shell, "-c", fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, n),
		exe, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), childEnv+"=1")
	return cmd
}

// By default there may be as many clients as 80 % of the files that the process may
// have open.
func TestClientsByFiles(t *testing.T) {
	ofSessions(t)
	if !inChild() {
		if out, err := withFiles(t, 100).CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS")) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	onStage(t, func(t *testing.T, s *stage) {
		a := s.registerEcho("a")
		first := s.client(a)
		s.mustServe(first)
		for range 79 {
			s.mustServe(s.client(a))
		}
		if s.served(s.client(a)) {
			t.Error("81 clients of a process that may have 100 files")
		}
		s.expectRefusals(map[string]int64{"clients": 1})
		first.Close()
		synctest.Wait()
		s.mustServe(s.client(a))
	})
}

// A relay whose process has no file left goes on with those that are connected, and
// takes others again when there are: clients as well as apps.
func TestOutOfFiles(t *testing.T) {
	ofSessions(t)
	if inChild() {
		relayForOutOfFiles(t)
		return
	}
	cmd := withFiles(t, 64)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	type line struct{ Msg, Kind, Addr, Err string }
	lines := make(chan line, 10_000)
	output := new(strings.Builder) // to be read when lines is closed
	go func() {
		defer close(lines)
		for sc := bufio.NewScanner(stdout); sc.Scan(); {
			output.WriteString(sc.Text() + "\n")
			var l line
			if json.Unmarshal(sc.Bytes(), &l) == nil {
				lines <- l
			}
		}
	}()
	await := func(msg string) line {
		t.Helper()
		for {
			l := within(t, "a line of the relay's process", lines)
			if l == (line{}) {
				t.Fatalf("the relay's process has ended:\n%s", output)
			}
			if l.Msg == msg {
				return l
			}
		}
	}
	addr := await("listening").Addr
	l := register(t, addr)
	go serveEcho(l)
	old := dial(t, l)
	echoes(t, old)

	// More than it can take. Those it cannot are connected all the same.
	var clients []*net.TCPConn
	for range 100 {
		clients = append(clients, dial(t, l))
	}
	if e := await("accept failed"); e.Kind != "accept" || e.Addr == "" || e.Err == "" {
		t.Errorf("logged %+v", e)
	}
	client := make(chan error, 1)
	go func() {
		c, err := net.Dial("tcp", l.Addr().String())
		if err == nil {
			defer c.Close()
			_, err = c.Write([]byte("x"))
		}
		if err == nil {
			_, err = c.Read(make([]byte, 1))
		}
		client <- err
	}()
	registered := make(chan error, 1)
	go func() {
		l, err := signUp(context.Background(), addr, relay.WithWait(), relay.WithBackoff(0, time.Second))
		if err == nil {
			l.Close()
			<-l.Done()
		}
		registered <- err
	}()
	for range 2 { // for as long as this takes
		await("accept failed")
		echoes(t, old)
	}
	select {
	case err := <-client:
		t.Errorf("a client was served without a file: %v", err)
	case err := <-registered:
		t.Errorf("an app was registered without a file: %v", err)
	default:
	}

	for _, c := range clients {
		c.Close()
	}
	if err := within(t, "a client's service", client); err != nil {
		t.Errorf("a client: %v", err)
	}
	if err := within(t, "a registration", registered); err != nil {
		t.Errorf("an app: %v", err)
	}
	echoes(t, old)
	echoes(t, dial(t, l))
	l.Close()
	stdin.Close()
	for range lines { // until it has ended
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(output.String(), "--- PASS") {
		t.Errorf("the relay's process: %v\n%s", err, output)
	}
}

// relayForOutOfFiles is the relay of TestOutOfFiles, until nothing comes from stdin
// any more.
func relayForOutOfFiles(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close() // now the runtime has the files that it needs for that
	check := nothingLeft(t)
	srv, err := relay.NewServer(relay.WithLimits(relay.Limits{Clients: -1}),
		relay.WithLogger(slog.New(slog.NewJSONHandler(os.Stdout, nil))))
	if err != nil {
		t.Fatal(err)
	}
	serve(t, srv, "127.0.0.1:0")
	io.Copy(io.Discard, os.Stdin)
	refused := srv.Refusals()
	delete(refused, "server_full") // the app may have been taken before there was a file for its listener
	if refused["accept"] < 3 || len(refused) != 1 {
		t.Errorf("refused %v", refused)
	}
	srv.Close()
	check()
}
