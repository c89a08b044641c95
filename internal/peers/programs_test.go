package peers

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// programPatience is the patience for one run of a program, such as scp of 100 MB.
const programPatience = 3 * time.Minute

// TestPrograms has programs of other people talk to each other through the
// examples relayd and forward, each a process of its own.
func TestPrograms(t *testing.T) {
	t.Run("session", func(t *testing.T) { runPrograms(t) })
	t.Run("dedicated", func(t *testing.T) { runPrograms(t, "-dedicated", "4") })
}

// runPrograms runs them with forward's flags given.
func runPrograms(t *testing.T, flags ...string) {
	bin := buildExamples(t, "relayd", "forward")
	relayd := startExample(t, filepath.Join(bin, "relayd"), "-listen", "127.0.0.1:0")
	addr := relayd.awaitLine(t, "relayd's address", func(line string) (string, bool) {
		_, rest, ok := strings.Cut(line, "msg=listening addr=")
		addr, _, _ := strings.Cut(rest, " ")
		return addr, ok
	})
	// expose makes the TCP server at to public and returns its public address.
	expose := func(t *testing.T, to string) string {
		t.Helper()
		forward := startExample(t, filepath.Join(bin, "forward"), append([]string{"-relay", addr, "-to", to}, flags...)...)
		return forward.awaitLine(t, "the public address", func(line string) (string, bool) {
			_, _, err := net.SplitHostPort(line)
			return line, err == nil
		})
	}
	cases := []struct {
		name string
		run  func(t *testing.T, expose func(t *testing.T, to string) string)
	}{
		{"SpeaksFirst", programSpeaksFirst},
		{"Resets", programResets},
		{"SSH", programSSH},
		{"Redis", programRedis},
		{"Curl", programCurl},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { c.run(t, expose) })
	}
}

// buildExamples builds programs of this repository and returns their directory.
func buildExamples(t *testing.T, names ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	args := []string{"build", "-buildvcs=false", "-o", dir}
	for _, name := range names {
		args = append(args, "./examples/"+name)
	}
	cmd := exec.Command("go", args...)
	cmd.Dir = "../.." // examples belong to the module of the library
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
	return dir
}

// findProgram returns where a program is installed.
func findProgram(t *testing.T, name, debianPackage string) string {
	t.Helper()
	// Servers are often outside an ordinary user's PATH.
	for _, candidate := range []string{name, "/usr/local/sbin/" + name, "/usr/sbin/" + name} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path
		}
	}
	t.Fatalf("%s is not installed; it is in the Debian package %s", name, debianPackage)
	panic("unreachable")
}

// runProgram runs a program to its end and returns what it printed. It fails the
// test if the program does not exit with status 0.
func runProgram(t *testing.T, stdin io.Reader, path string, args ...string) string {
	t.Helper()
	out, err := tryProgram(t, stdin, path, args...)
	if err != nil {
		t.Fatalf("%s %q: %v", filepath.Base(path), args, err)
	}
	return out
}

// tryProgram runs a program to its end and returns what it printed to its standard
// output. What it printed to the other is part of err.
func tryProgram(t *testing.T, stdin io.Reader, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), programPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%w\n%s%s", err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.String(), nil
}

// program is a process that runs until the test ends.
type program struct {
	cmd    *exec.Cmd
	exited chan struct{} // closed when it has
	status error         // valid then

	mu  sync.Mutex
	out bytes.Buffer // of both its outputs
}

// Write takes what the process prints.
func (p *program) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *program) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// startProgram starts a process, which is asked to end when the test does. Its
// output becomes part of the log of a test that fails.
func startProgram(t *testing.T, path string, args ...string) *program {
	t.Helper()
	return startCommand(t, exec.Command(path, args...))
}

func startCommand(t *testing.T, cmd *exec.Cmd) *program {
	t.Helper()
	p := &program{cmd: cmd, exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	p.cmd.WaitDelay = 5 * time.Second
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.status = p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.stop(t)
		if t.Failed() {
			t.Logf("output of %q:\n%s", cmd.Args, p.output())
		}
	})
	return p
}

// startExample starts a program of this repository, which has to end in good order
// when it is asked to.
func startExample(t *testing.T, path string, args ...string) *program {
	t.Helper()
	p := startProgram(t, path, args...)
	t.Cleanup(func() {
		p.stop(t)
		if p.status != nil {
			t.Errorf("%s ended with %v", filepath.Base(path), p.status)
		}
	})
	return p
}

// stop ends the process, if it has not ended yet.
func (p *program) stop(t *testing.T) {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(patience):
		t.Errorf("%s does not end on SIGTERM", filepath.Base(p.cmd.Path))
		p.cmd.Process.Kill()
		<-p.exited
	}
}

// poll calls done until it is true, the process has exited or the test's patience
// is over. It returns whether done was true.
func (p *program) poll(done func() bool) bool {
	for giveUp := time.Now().Add(patience); time.Now().Before(giveUp); time.Sleep(10 * time.Millisecond) {
		if done() {
			return true
		}
		select {
		case <-p.exited:
			return done() // what it did last counts
		default:
		}
	}
	return false
}

// awaitLine waits until the process has printed a whole line of which find makes
// something.
func (p *program) awaitLine(t *testing.T, what string, find func(line string) (string, bool)) (found string) {
	t.Helper()
	ok := p.poll(func() bool {
		for line := range strings.Lines(p.output()) {
			text, whole := strings.CutSuffix(line, "\n")
			if !whole {
				return false
			}
			if s, ok := find(text); ok {
				found = s
				return true
			}
		}
		return false
	})
	if !ok {
		t.Fatalf("%s did not print %s", filepath.Base(p.cmd.Path), what)
	}
	return found
}

// startServerProgram starts a server that has to be told its port, and returns its
// address once it takes connections.
func startServerProgram(t *testing.T, path string, args func(port string) []string) (addr string) {
	t.Helper()
	// The port is free when it is chosen, and may be taken before the server binds.
	for range 5 {
		ln := listenTCP(t)
		addr = ln.Addr().String()
		ln.Close()
		_, port, _ := net.SplitHostPort(addr)
		p := startProgram(t, path, args(port)...)
		ready := p.poll(func() bool {
			c, err := net.Dial("tcp", addr)
			if err == nil {
				c.Close()
			}
			return err == nil
		})
		select {
		case <-p.exited: // whoever answered was not this server
			t.Logf("%s ended: %v\n%s", filepath.Base(path), p.status, p.output())
			continue
		default:
		}
		if ready {
			return addr
		}
		break
	}
	t.Fatalf("%s does not start", filepath.Base(path))
	panic("unreachable")
}

// fileDigest returns the SHA-256 of a file.
func fileDigest(t *testing.T, name string) string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum, _, err := digest(f)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// bigFile makes a file of 100 MB and returns its name and SHA-256.
func bigFile(t *testing.T, seed uint64) (name, sum string) {
	t.Helper()
	name = filepath.Join(t.TempDir(), "big")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	_, err = io.Copy(io.MultiWriter(f, h), testData(seed, 100_000_000))
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return name, hex.EncodeToString(h.Sum(nil))
}

// serveGreeting serves a protocol in which the server speaks first, like SMTP's:
// a greeting, and an answer to the first line, which ends the connection. It
// returns when ln is closed.
func serveGreeting(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.WriteString(c, "220 ready\r\n")
			line := make([]byte, len("QUIT\r\n"))
			if _, err := io.ReadFull(c, line); err == nil {
				io.WriteString(c, "221 "+string(line))
			}
		}()
	}
}

// wantGreeting is a client of that protocol: it says nothing until it was greeted.
func wantGreeting(t *testing.T, addr string) {
	t.Helper()
	c := dialTCP(t, addr)
	greeting := make([]byte, len("220 ready\r\n"))
	if _, err := io.ReadFull(c, greeting); string(greeting) != "220 ready\r\n" {
		t.Fatalf("read %q, %v, want the greeting", greeting, err)
	}
	io.WriteString(c, "QUIT\r\n")
	if rest, err := io.ReadAll(c); string(rest) != "221 QUIT\r\n" || err != nil {
		t.Errorf("after QUIT the server said %q, %v", rest, err)
	}
}

// TestSpeaksFirst is programSpeaksFirst without programs.
func TestSpeaksFirst(t *testing.T) {
	ln := listenRelay(t)
	go serveGreeting(ln)
	for range 3 {
		wantGreeting(t, ln.Addr().String())
	}
}

func programSpeaksFirst(t *testing.T, expose func(*testing.T, string) string) {
	ln := listenTCP(t)
	go serveGreeting(ln)
	addr := expose(t, ln.Addr().String())
	for range 3 {
		wantGreeting(t, addr)
	}
}

// programResets has either end reset the connection. The other must not take that
// for an end in good order.
func programResets(t *testing.T, expose func(*testing.T, string) string) {
	ln := listenTCP(t)
	addr := expose(t, ln.Addr().String())
	pair := func() (client, server *net.TCPConn) {
		t.Helper()
		client = dialTCP(t, addr)
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(patience))
		wantExchange(t, client, c, "hello")
		wantExchange(t, c, client, "hello yourself")
		return client, c.(*net.TCPConn)
	}
	wantCut := func(who string, c net.Conn) {
		t.Helper()
		if got, err := io.ReadAll(c); len(got) > 0 || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s read %q, %v, want a reset", who, got, err)
		}
	}
	client, server := pair()
	client.SetLinger(0)
	client.Close()
	wantCut("the server", server)

	client, server = pair()
	server.SetLinger(0)
	server.Close()
	wantCut("the client", client)
}

// programSSH carries a protocol in which the server speaks first and both speak at
// once, and files of 100 MB each way.
func programSSH(t *testing.T, expose func(*testing.T, string) string) {
	keygen := findProgram(t, "ssh-keygen", "openssh-client")
	ssh := findProgram(t, "ssh", "openssh-client")
	scp := findProgram(t, "scp", "openssh-client")
	sshd := findProgram(t, "sshd", "openssh-server")
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}

	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	for _, key := range []string{"hostkey", "userkey"} {
		runProgram(t, nil, keygen, "-q", "-t", "ed25519", "-N", "", "-f", file(key))
	}
	if os.Geteuid() == 0 {
		// Run by root, sshd wants its directory, which the init script of the package
		// makes. A machine on which nobody starts sshd has none.
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	addr := startServerProgram(t, sshd, func(port string) []string {
		config := strings.Join([]string{
			"ListenAddress 127.0.0.1",
			"Port " + port,
			"HostKey " + file("hostkey"),
			"AuthorizedKeysFile " + file("userkey.pub"),
			"PidFile none",
			"UsePAM no",
			"StrictModes no",
			"UseDNS no",
			"PasswordAuthentication no",
			"PermitRootLogin prohibit-password",
			"Subsystem sftp internal-sftp",
		}, "\n")
		if err := os.WriteFile(file("sshd_config"), []byte(config+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return []string{"-D", "-e", "-f", file("sshd_config")}
	})
	host, port, _ := net.SplitHostPort(expose(t, addr))

	// A client that waits for the server's first words, as ssh does not.
	c := dialTCP(t, net.JoinHostPort(host, port))
	banner := make([]byte, len("SSH-2.0-"))
	if _, err := io.ReadFull(c, banner); string(banner) != "SSH-2.0-" {
		t.Errorf("read %q, %v, want a banner", banner, err)
	}
	c.Close()

	hostKey, err := os.ReadFile(file("hostkey.pub"))
	if err != nil {
		t.Fatal(err)
	}
	known := fmt.Sprintf("[%s]:%s %s", host, port, hostKey)
	if err := os.WriteFile(file("known_hosts"), []byte(known), 0o600); err != nil {
		t.Fatal(err)
	}
	options := []string{
		"-F", "/dev/null", "-i", file("userkey"),
		"-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none",
		"-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile=" + file("known_hosts"),
		"-o", "Port=" + port,
	}
	sshArgs := func(command string) []string {
		return append(options[:len(options):len(options)], me.Username+"@"+host, command)
	}
	runProgram(t, nil, ssh, sshArgs("true")...)
	if got := runProgram(t, nil, ssh, sshArgs("echo hello")...); got != "hello\n" {
		t.Errorf("echo printed %q", got)
	}
	text := hex.EncodeToString(testBytes(50, 1<<20))
	if got := runProgram(t, strings.NewReader(text), ssh, sshArgs("cat")...); got != text {
		t.Errorf("cat printed %d bytes that are not the %d it was given", len(got), len(text))
	}
	_, err = tryProgram(t, nil, ssh, sshArgs("exit 7")...)
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 7 {
		t.Errorf("exit 7 ended with %v", err)
	}

	name, sum := bigFile(t, 51)
	remote := func(name string) string { return me.Username + "@" + host + ":" + name }
	copyFile := func(from, to, result string) {
		t.Helper()
		runProgram(t, nil, scp, append(options[:len(options):len(options)], "-q", from, to)...)
		if got := fileDigest(t, result); got != sum {
			t.Errorf("scp %s %s: SHA-256 is %s, want %s", from, to, got, sum)
		}
	}
	copyFile(name, remote(file("uploaded")), file("uploaded"))
	copyFile(remote(file("uploaded")), file("downloaded"), file("downloaded"))
}

// programRedis carries many small requests, with and without pipelining, and
// connections that live for one request.
func programRedis(t *testing.T, expose func(*testing.T, string) string) {
	server := findProgram(t, "redis-server", "redis-server")
	cli := findProgram(t, "redis-cli", "redis-tools")
	benchmark := findProgram(t, "redis-benchmark", "redis-tools")

	dir := t.TempDir()
	host, port, _ := net.SplitHostPort(expose(t, startServerProgram(t, server, func(port string) []string {
		return []string{"--bind", "127.0.0.1", "--port", port, "--dir", dir, "--save", "", "--appendonly", "no"}
	})))
	at := func(args ...string) []string { return append([]string{"-h", host, "-p", port}, args...) }

	if got := runProgram(t, nil, cli, at("set", "colour", "green")...); got != "OK\n" {
		t.Errorf("SET said %q", got)
	}
	if got := runProgram(t, nil, cli, at("get", "colour")...); got != "green\n" {
		t.Errorf("GET said %q", got)
	}
	const big = 8 << 20
	if got := runProgram(t, testData(52, big), cli, at("-x", "set", "big")...); got != "OK\n" {
		t.Errorf("SET of %d bytes said %q", big, got)
	}
	if got := runProgram(t, nil, cli, at("--raw", "get", "big")...); got != string(testBytes(52, big))+"\n" {
		t.Errorf("GET returned %d bytes, which are not the %d of SET", len(got)-1, big)
	}
	for _, load := range [][]string{
		{"-n", "20000", "-c", "50", "-P", "1"},
		{"-n", "20000", "-c", "50", "-P", "16"},
		{"-n", "2000", "-c", "50", "-k", "0"}, // a connection for each request
	} {
		out := runProgram(t, nil, benchmark, at(append(load, "-t", "ping,set,get", "--csv")...)...)
		for _, test := range []string{"PING_INLINE", "PING_MBULK", "SET", "GET"} {
			if !strings.Contains(out, strconv.Quote(test)+",") {
				t.Errorf("redis-benchmark %q has no result for %s", load, test)
			}
		}
		if strings.Contains(strings.ToLower(out), "error") {
			t.Errorf("redis-benchmark %q reported an error", load)
		}
		t.Logf("redis-benchmark %q:\n%s", load, out)
	}
}

// programCurl uploads and downloads 100 MB.
func programCurl(t *testing.T, expose func(*testing.T, string) string) {
	curl := findProgram(t, "curl", "curl")
	name, sum := bigFile(t, 53)
	ln := listenTCP(t)
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			http.ServeFile(w, r, name)
			return
		}
		got, n, err := digest(r.Body)
		fmt.Fprint(w, got, n, err)
	})
	url := "http://" + expose(t, s.addr) + "/"
	// No proxy that the environment names must come between.
	options := []string{"--silent", "--show-error", "--fail", "--noproxy", "*"}

	got := runProgram(t, nil, curl, append(options, "--upload-file", name, url)...)
	if want := fmt.Sprint(sum, int64(100_000_000), nil); got != want {
		t.Errorf("the server got %q, want %q", got, want)
	}
	to := filepath.Join(t.TempDir(), "downloaded")
	runProgram(t, nil, curl, append(options, "--output", to, url)...)
	if got := fileDigest(t, to); got != sum {
		t.Errorf("SHA-256 of the download is %s, want %s", got, sum)
	}
}
