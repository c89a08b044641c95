package peers

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/mod/module"
	"golang.org/x/mod/zip"

	"github.com/tcprelay/relay"
)

// A readme is the README, whose commands are run as they stand there, but for addresses:
// those have to be free, and on loopback.
type readme struct {
	*testing.T
	text string
	todo []string // commands that were not run yet
	env  []string // of commands
}

// elsewhere are commands that are not for this test.
var elsewhere = []string{
	"go test ./...", // .ci/run has it, and this test is part of it there
}

func openReadme(t *testing.T) *readme {
	t.Helper()
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	r := &readme{T: t, text: string(b), env: publish(t)}
	bin := t.TempDir()
	r.env = append(r.env, "GOBIN="+bin, "PATH="+bin+":"+os.Getenv("PATH"))
	for _, block := range regexp.MustCompile("(?ms)^```(sh|console)\n(.*?)^```$").FindAllStringSubmatch(r.text, -1) {
		for line := range strings.Lines(block[2]) {
			command := strings.TrimSpace(line)
			if block[1] == "console" {
				var ok bool
				if command, ok = strings.CutPrefix(command, "$ "); !ok {
					continue // what is printed
				}
			}
			if !slices.Contains(elsewhere, command) {
				r.todo = append(r.todo, command)
			}
		}
	}
	return r
}

// take returns the first command that begins with a text, and was not taken before.
func (r *readme) take(prefix string) string {
	r.Helper()
	for i, command := range r.todo {
		if strings.HasPrefix(command, prefix) {
			r.todo = slices.Delete(r.todo, i, i+1)
			return command
		}
	}
	r.Fatalf("the README has no command %q (any more)", prefix)
	panic("unreachable")
}

// block returns the first block of Go that holds a text.
func (r *readme) block(holds string) string {
	r.Helper()
	for _, block := range regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindAllStringSubmatch(r.text, -1) {
		if strings.Contains(block[1], holds) {
			return block[1]
		}
	}
	r.Fatalf("the README has no program with %q", holds)
	panic("unreachable")
}

// command returns a command to be run by a shell in a folder, with texts replaced, all of
// which have to be there.
func (r *readme) command(dir, command string, replace ...string) *exec.Cmd {
	r.Helper()
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(command, replace[i]) {
			r.Fatalf("%q has no %q", command, replace[i])
		}
		command = strings.ReplaceAll(command, replace[i], replace[i+1])
	}
	cmd := exec.Command("bash", "-c", command)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), r.env...)
	return cmd
}

// publish makes a module proxy that has the library as a user would get it, and returns the
// environment in which Go uses it. What else is needed comes from the cache of modules, as
// far as it is there.
func publish(t *testing.T) (env []string) {
	t.Helper()
	const path, version = "github.com/tcprelay/relay", "v0.1.0"
	proxy := t.TempDir()
	dir := filepath.Join(proxy, path, "@v")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	mod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	var files bytes.Buffer
	if err := zip.CreateFromDir(&files, module.Version{Path: path, Version: version}, "../.."); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"list":            []byte(version + "\n"),
		version + ".info": []byte(`{"Version":"` + version + `"}`),
		version + ".mod":  mod,
		version + ".zip":  files.Bytes(),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	known := strings.Fields(runProgram(t, nil, "go", "env", "GOMODCACHE", "GOPROXY"))
	if len(known) != 2 {
		t.Fatalf("go env says %q", known)
	}
	return []string{
		"GOPROXY=file://" + proxy + ",file://" + filepath.Join(known[0], "cache", "download") + "," + known[1],
		"GONOSUMDB=" + strings.TrimLeft(os.Getenv("GONOSUMDB")+","+path, ","), // nobody has published it
		"GOMODCACHE=" + t.TempDir(),
		"GOFLAGS=-modcacherw",
		"GOWORK=off",
	}
}

// run returns what a command prints, which has to succeed.
func (r *readme) run(dir, command string, replace ...string) string {
	r.Helper()
	cmd := r.command(dir, command, replace...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		r.Fatalf("%q: %v\n%s%s", cmd.Args, err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.String()
}

// start starts a command, which is ended with all that it has started when the test ends,
// or by the function that it returns.
func (r *readme) start(dir, command string, replace ...string) (p *program, end func()) {
	r.Helper()
	cmd := r.command(dir, command, replace...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p = startCommand(r.T, cmd)
	end = func() {
		// "go run" does not pass a SIGTERM on.
		syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		await(r.T, p.exited, "the end of "+command)
	}
	r.Cleanup(end)
	return p, end
}

// freePorts returns a range of ports none of which is in use now.
func freePorts(t *testing.T, n int) (first, last int) {
	t.Helper()
	for first = 20_000; first < 32_000; first += n {
		free := true
		for port := first; port < first+n && free; port++ {
			ln, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
			if free = err == nil; free {
				ln.Close()
			}
		}
		if free {
			return first, first + n - 1
		}
	}
	t.Fatal("no free ports")
	panic("unreachable")
}

// url finds an address of the web in what a program prints.
func url(line string) (string, bool) { return line, strings.HasPrefix(line, "http://127.0.0.1:") }

// TestReadme does what the README says, as a new user would, in the order in which it is
// said there, until no command is left.
func TestReadme(t *testing.T) {
	curl := findProgram(t, "curl", "curl")
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	r := openReadme(t)
	dir := t.TempDir()
	first, last := freePorts(t, 20)
	ports := fmt.Sprintf("%d-%d", first, last)

	// Install, and the three lines.
	r.run(dir, r.take("go mod init"))
	r.run(dir, r.take("go get"))
	main := r.block("package main")
	relayd, end := r.start(dir, r.take("go run github.com/tcprelay/relay/examples/relayd"), "127.0.0.1:8080", "127.0.0.1:0", "8081-8180", ports)
	addr := relayd.awaitLine(t, "its address", listening)
	write := func(program string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(program), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(strings.ReplaceAll(main, "127.0.0.1:8080", addr))
	app, endApp := r.start(dir, r.take("go run ."))
	at := app.awaitLine(t, "its address", url)
	fetch := r.take("curl http://127.0.0.1:8081")
	if got := r.run(dir, fetch, "http://127.0.0.1:8081", "--silent --show-error "+at); !strings.HasPrefix(got, "hello, 127.0.0.1:") {
		t.Errorf("curl says %q", got)
	}
	endApp()
	end()

	// A relay to run.
	r.run(dir, r.take("go install"))
	relayd, end = r.start(dir, "exec "+r.take("relayd -listen 10.0.0.5:8080"),
		"10.0.0.5:8080", "127.0.0.1:0", "0.0.0.0", "127.0.0.1", "8081-8180", ports)
	ln, err := relay.Register(t.Context(), relayd.awaitLine(t, "its address", listening))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(ln.Addr().String(), "relay.example.com:") {
		t.Errorf("the public address is %v", ln.Addr())
	}
	ln.Close()
	end()

	// TLS and tokens; the app as before, and then with them.
	r.run(dir, r.take("head -c 24"))
	relayd, end = r.start(dir, "exec "+r.take("relayd -listen :8080")+" -status 0", ":8080", "127.0.0.1:0", "8081-8180", ports)
	addr = relayd.awaitLine(t, "its address", listening)
	page := relayd.awaitLine(t, "the page's address", func(line string) (string, bool) {
		_, url, ok := strings.Cut(line, "url=")
		return strings.TrimSuffix(url, "/"), ok
	})
	for path, want := range map[string]string{"status.json": `"services":[`, "metrics": "relay_services 0", "healthz": "ok\n"} {
		if got := r.run(dir, r.take("curl http://127.0.0.1:9800/"+path), "http://127.0.0.1:9800", "--silent --fail "+page); !strings.Contains(got, want) {
			t.Errorf("%s says %q", path, got)
		}
	}
	owners := relayd.awaitLine(t, "what owners need", func(line string) (string, bool) {
		return line, strings.HasPrefix(line, "forward ")
	})
	pin := regexp.MustCompile(`sha256//\S+`).FindString(owners)
	_, port, _ := net.SplitHostPort(addr)
	if !strings.HasPrefix(owners, "forward -relay relay.example.com:"+port+" ") || pin == "" {
		t.Errorf("owners are told %q", owners)
	}
	inReadme := regexp.MustCompile(`(?m)^\tln, err := relay\.Register\(.*\)$`)
	withToken := inReadme.ReplaceAllLiteralString(main, strings.TrimSuffix(r.block("WithPin"), "\n"))
	withToken = strings.NewReplacer("relay.example.com:8080", addr, "sha256//…", pin, "\t\"net/http\"\n", "\t\"net/http\"\n\t\"os\"\n").Replace(withToken)
	write(withToken)
	app, endApp = r.start(dir, r.take("RELAY_TOKEN="))
	if got := r.run(dir, fetch, "http://127.0.0.1:8081", "--silent --show-error http://127.0.0.1:"+
		portOf(t, app.awaitLine(t, "its address", func(line string) (string, bool) {
			return line, strings.HasPrefix(line, "http://relay.example.com:")
		}))); !strings.HasPrefix(got, "hello, 127.0.0.1:") {
		t.Errorf("curl says %q", got)
	}
	r.run(dir, r.take("kill -HUP"), "$(pidof relayd)", fmt.Sprint(relayd.cmd.Process.Pid)) // and no other test's
	relayd.awaitLine(t, "that it has reloaded", func(line string) (string, bool) {
		return line, strings.Contains(line, "msg=reloaded")
	})
	endApp()

	// Programs that cannot be changed: as the README has it, and as relayd printed it.
	local := listenTCP(t)
	go serveEcho(local)
	unix, err := net.Listen("unix", filepath.Join(dir, "api.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	go serveEcho(unix)
	echoes := func(public string) {
		t.Helper()
		c := dialTCP(t, "127.0.0.1:"+portOf(t, public))
		wantExchange(t, c, c, "hello")
		c.Close()
	}
	at8080 := []string{"relay.example.com:8080", addr, "sha256//…", pin}
	one, endOne := r.start(dir, "exec "+r.take("forward "), append(at8080, "localhost:3000", local.Addr().String())...)
	echoes(one.awaitLine(t, "its address", public))
	endOne()
	printed, endPrinted := r.start(dir, "exec "+owners, "relay.example.com", "127.0.0.1", "token.txt", "tokens.txt", "localhost:3000", local.Addr().String())
	echoes(printed.awaitLine(t, "its address", public))
	endPrinted()
	two, endTwo := r.start(dir, "exec "+r.take("forward "), append(at8080, "localhost:22", local.Addr().String(), "8090", fmt.Sprint(last), "/run", dir)...)
	for _, target := range []string{local.Addr().String(), "unix:"} {
		echoes(two.awaitLine(t, "the address for "+target, func(line string) (string, bool) {
			addr, to, ok := strings.Cut(line, " -> ")
			return addr, ok && strings.HasPrefix(to, target)
		}))
	}
	endTwo()
	end()

	// Hosts.
	relayd, end = r.start(dir, "exec "+r.take("relayd -listen 127.0.0.1:8080 -hosts"), "127.0.0.1:8080", "127.0.0.1:0", ":443", "127.0.0.1:0", ":80", "127.0.0.1:0")
	ln, err = relay.Register(t.Context(), relayd.awaitLine(t, "its address", listening), relay.WithHostname("app.example.com"))
	if err != nil {
		t.Fatal(err)
	}
	site := &http.Server{Handler: http.HandlerFunc(echoPath)}
	served := make(chan error, 1)
	go func() { served <- site.Serve(ln) }()
	for _, host := range regexp.MustCompile(`listening for hosts" addr=(\S+)`).FindAllStringSubmatch(relayd.output(), -1) {
		got := runProgram(t, nil, curl, "--silent", "--show-error", "--noproxy", "*", "--header", "Host: app.example.com", "http://"+host[1]+"/there")
		if got != "/there" {
			t.Errorf("at %s: %q", host[1], got)
		}
	}
	site.Close()
	<-served
	end()

	// In a clone.
	if got := r.run(root, r.take("go run ./examples/quickstart")); !strings.Contains(got, "MiB") {
		t.Errorf("quickstart says %q", got)
	}
	relayd, end = r.start(root, r.take("go run ./examples/relayd"), "127.0.0.1:8080", "127.0.0.1:0", "8081-8180", ports)
	echo, endEcho := r.start(root, r.take("go run ./examples/echo"), "127.0.0.1:8080", relayd.awaitLine(t, "its address", listening))
	r.run(root, r.take("go run ./examples/stress"), "127.0.0.1:8081", echo.awaitLine(t, "its address", public),
		"-time 10s", "-time 1s", "stress.json", filepath.Join(dir, "stress.json"), "stress.svg", filepath.Join(dir, "stress.svg"))
	for _, name := range []string{"stress.json", "stress.svg"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() < 1000 {
			t.Errorf("%s: %v", name, err)
		}
	}
	endEcho()
	end()

	if len(r.todo) > 0 {
		t.Errorf("the README has commands that nobody has run: %q", r.todo)
	}
}

func portOf(t *testing.T, addr string) string {
	t.Helper()
	_, port, err := net.SplitHostPort(strings.TrimPrefix(addr, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	return port
}
