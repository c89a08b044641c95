//go:build unix

package handover

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/leak"
)

// roleVar tells the test binary to be another process than the tests'.
const roleVar = "HANDOVER_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleVar) {
	case "successor":
		if err := succeed(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "bystander": // lives until its standard input ends
		io.Copy(io.Discard, os.Stdin)
	default:
		leak.Main(m)
	}
}

// helper returns a command that runs this binary in a role.
func helper(t *testing.T, role string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), roleVar+"="+role)
	cmd.Stderr = os.Stderr
	return cmd
}

// waiting returns a listening socket with n clients that it has not accepted. Each has sent its number as a line.
func waiting(t *testing.T, n int) (*net.TCPListener, []net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	clients := make([]net.Conn, n)
	for i := range clients {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		fmt.Fprintln(c, i)
		clients[i] = c
	}
	return ln.(*net.TCPListener), clients
}

// serve accepts n clients of a listening socket that was received, and answers each with its line and a text.
func serve(f *os.File, n int, text string) error {
	ln, err := net.FileListener(f)
	f.Close()
	if err != nil {
		return err
	}
	defer ln.Close()
	for range n {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil {
			return err
		}
		fmt.Fprintf(c, "%s %s", strings.TrimSpace(line), text)
		c.Close()
	}
	return nil
}

// served fails unless every client is answered with its number and the text.
func served(t *testing.T, clients []net.Conn, text string) {
	t.Helper()
	for i, c := range clients {
		got, err := io.ReadAll(c)
		if want := fmt.Sprintf("%d %s", i, text); string(got) != want || err != nil {
			t.Errorf("client %d got %q, %v, want %q", i, got, err, want)
		}
		c.Close()
	}
}

// sendListener sends a listening socket and closes it, before the other side may serve.
func sendListener(conn *net.UnixConn, ln *net.TCPListener, state any) error {
	f, err := ln.File()
	if err != nil {
		return err
	}
	err = Send(conn, state, []*os.File{f})
	f.Close()
	ln.Close()
	return err
}

func TestListener(t *testing.T) {
	a, b := socketPair(t)
	sameOpen(t, func() {
		ln, clients := waiting(t, 20)
		sent := make(chan error, 1)
		go func() { sent <- sendListener(a, ln, nil) }()
		var state any
		files, err := Receive(b, &state)
		if err != nil {
			t.Fatal(err)
		}
		if err := Done(b, nil); err != nil {
			t.Fatal(err)
		}
		if err := <-sent; err != nil { // the sender's listener is closed
			t.Fatal(err)
		}
		late, err := net.Dial("tcp", clients[0].RemoteAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(late, len(clients))
		clients = append(clients, late)
		if err := serve(files[0], len(clients), "served"); err != nil {
			t.Fatal(err)
		}
		served(t, clients, "served")
	})
}

// job is what the tests' process asks of a successor in another process.
type job struct {
	Clients int
	Refuse  string // not to serve but to refuse with this
	Die     bool   // to end without an answer
}

// succeed is the successor's process: it takes over the listening sockets that it gets over the socket at path, and
// serves once the other side has closed its own.
func succeed(path string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	conn := c.(*net.UnixConn)
	var j job
	files, err := Receive(conn, &j)
	switch {
	case err != nil:
		return err
	case j.Die:
		return nil
	case j.Refuse != "":
		return Done(conn, errors.New(j.Refuse))
	}
	if err := Done(conn, nil); err != nil {
		return err
	}
	if _, err := io.ReadAll(conn); err != nil {
		return err
	}
	for _, f := range files {
		if err := serve(f, j.Clients, fmt.Sprint("by process ", os.Getpid())); err != nil {
			return err
		}
	}
	return nil
}

func TestProcesses(t *testing.T) {
	for _, test := range []struct {
		name  string
		job   job
		check func(error) bool
	}{
		{"taken", job{Clients: 10}, func(err error) bool { return err == nil }},
		{"refused", job{Refuse: "no room"}, func(err error) bool {
			return err != nil && strings.Contains(err.Error(), "no room")
		}},
		{"died", job{Die: true}, func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			sameOpen(t, func() {
				dir, err := os.MkdirTemp("", "handover") // t.TempDir's names are longer than a socket's may be
				if err != nil {
					t.Fatal(err)
				}
				defer os.RemoveAll(dir)
				control, err := net.Listen("unix", filepath.Join(dir, "s"))
				if err != nil {
					t.Fatal(err)
				}
				defer control.Close()
				ln, clients := waiting(t, test.job.Clients)
				cmd := helper(t, "successor", control.Addr().String())
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				conn, err := control.Accept()
				if err != nil {
					t.Fatal(err)
				}
				err = sendListener(conn.(*net.UnixConn), ln, test.job)
				conn.Close()
				if !test.check(err) {
					t.Errorf("Send: %v", err)
				}
				served(t, clients, fmt.Sprint("by process ", cmd.Process.Pid))
				if err := cmd.Wait(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestNotInherited: a process that the receiver starts does not keep a received file open.
func TestNotInherited(t *testing.T) {
	a, b := socketPair(t)
	sameOpen(t, func() {
		readers, writers := pipes(t, 1)
		sent := make(chan error, 1)
		go func() { sent <- Send(a, nil, writers) }()
		var state any
		files, err := Receive(b, &state)
		if err != nil {
			t.Fatal(err)
		}
		Done(b, nil)
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		cmd := helper(t, "bystander")
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		closeAll(writers)
		closeAll(files)
		readers[0].SetReadDeadline(time.Now().Add(time.Minute)) // a failure, not a hang
		if _, err := readers[0].Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the pipe is still open for writing: %v", err)
		}
		closeAll(readers)
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
}
