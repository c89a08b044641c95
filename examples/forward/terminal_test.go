package main

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A screen is what a terminal shows of what a view sends it. It knows the view's sequences
// and no others.
type screen struct {
	mu          sync.Mutex
	width       int
	pending     string // what is not whole yet
	lines       []string
	row, column int
	modes       map[string]bool // that are set
	views       int             // how often a screen of its own was entered

	// What should not have come to that one: lines that are too long, and characters or
	// sequences of another kind.
	wrapped bool
	odd     []string
}

func (s *screen) viewed() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.views
}

func newScreen(width int) *screen {
	return &screen{width: width, lines: make([]string, 1000), modes: map[string]bool{"?25": true, "?7": true}}
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending += string(p)
	for s.pending != "" && s.take() {
	}
	return len(p), nil
}

// take takes a character or a sequence, if it is whole.
func (s *screen) take() bool {
	if s.pending[0] != '\x1b' {
		c := s.pending[0]
		s.pending = s.pending[1:]
		s.character(c)
		return true
	}
	end := strings.IndexAny(s.pending, "HKJhlm")
	if end < 0 {
		return false
	}
	sequence, last := s.pending[:end], s.pending[end]
	s.pending = s.pending[end+1:]
	argument, ok := strings.CutPrefix(sequence, "\x1b[")
	if !ok {
		s.odd = append(s.odd, sequence)
	}
	switch last {
	case 'H':
		s.row, s.column = 0, 0
	case 'K':
		s.lines[s.row] = s.lines[s.row][:min(len(s.lines[s.row]), s.column)]
	case 'J':
		s.lines[s.row] = s.lines[s.row][:min(len(s.lines[s.row]), s.column)]
		clear(s.lines[s.row+1:])
	case 'h', 'l':
		s.modes[argument] = last == 'h'
		if argument == "?1049" {
			clear(s.lines)
			s.row, s.column = 0, 0
			if last == 'h' {
				s.views++
			}
		}
	}
	return true
}

func (s *screen) character(c byte) {
	view := s.modes["?1049"]
	switch {
	case c == '\r':
		s.column = 0
	case c == '\n':
		s.row = (s.row + 1) % len(s.lines)
	case c < ' ' || c > '~':
		if view {
			s.odd = append(s.odd, string(c))
		}
	default:
		line := s.lines[s.row]
		line += strings.Repeat(" ", max(0, s.column-len(line)))
		s.lines[s.row] = line[:s.column] + string(c) + line[min(len(line), s.column+1):]
		s.column++
		s.wrapped = s.wrapped || view && s.column > s.width
		if view {
			s.column = min(s.column, s.width-1) // where a cursor waits that is not to wrap
		}
	}
}

func (s *screen) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.lines, "\n")
}

// ours reports whether the terminal is the view's, and whether it is as it was before.
func (s *screen) ours() (ours, restored bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.modes
	return m["?1049"] && !m["?25"] && !m["?7"], !m["?1049"] && m["?25"] && m["?7"]
}

// onTerminal starts the program on a terminal of its own and returns what that shows.
func onTerminal(t *testing.T, env []string, args ...string) (cmd *exec.Cmd, keyboard *os.File, s *screen, exited chan error) {
	t.Helper()
	return startOnTerminal(t, nil, env, args...)
}

// startOnTerminal gives the program more files.
func startOnTerminal(t *testing.T, files []*os.File, env []string, args ...string) (cmd *exec.Cmd, keyboard *os.File, s *screen, exited chan error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	master, slave := openTerminal(t)
	setTerminalSize(t, master, 80, 24)
	cmd = exec.Command(self, args...)
	cmd.Env = append(os.Environ(), asProgram+"=1", "TERM=xterm", "NO_COLOR=")
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.ExtraFiles = files
	ownTerminal(cmd)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	s = newScreen(80)
	exited = make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(s, master) }) // to the error that is a terminal's end
	wg.Go(func() { exited <- cmd.Wait() })
	t.Cleanup(func() {
		cmd.Process.Kill()
		wg.Wait()
		master.Close()
		if t.Failed() {
			t.Logf("on the terminal:\n%s", strings.TrimRight(s.text(), "\n"))
		}
		if s.wrapped || len(s.odd) > 0 {
			t.Errorf("on the terminal: a line was too long: %v; odd: %q", s.wrapped, s.odd)
		}
	})
	return cmd, master, s, exited
}

// waitFor waits for the end of a program and returns what that was.
func waitFor(t *testing.T, exited <-chan error) error {
	t.Helper()
	select {
	case err := <-exited:
		return err
	case <-time.After(patience):
		t.Fatal("the program does not end")
		panic("unreachable")
	}
}

func (s *screen) eventually(t *testing.T, texts ...string) {
	t.Helper()
	for _, text := range texts {
		eventually(t, "on the screen: "+text, func() bool { return strings.Contains(s.text(), text) })
	}
}

// The view, on a terminal: what it shows, that it stops and goes on as a job does, that it
// follows the terminal's size, and that ^C ends it when the clients have left and the
// terminal is as it was.
func TestView(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	ln, gone := listen(t), nobody(t)
	go serve(ln, "")
	cmd, keyboard, s, exited := onTerminal(t, []string{"FORWARD_RELAY=" + at, "FORWARD_TO=" + ln.Addr().String() + ",name=web " + gone}, "-drain", "1h")
	s.eventually(t, "forward at "+at, " -> "+ln.Addr().String(), " -> "+gone, "  connected ", "^C stops\n")
	if ours, _ := s.ours(); !ours {
		t.Error("it is no screen of its own")
	}
	addrs := make(map[string]string)
	for line := range strings.Lines(s.text()) {
		if addr, target, ok := strings.Cut(strings.TrimSpace(line), " -> "); ok {
			addrs[target] = addr
		}
	}

	c := dial(t, addrs[ln.Addr().String()])
	wantExchange(t, c, strings.Repeat("x", 5<<10))
	s.eventually(t, "clients: 1 (1 in all)", "in: 5.0 KiB", "out: 5.0 KiB", "client came to="+ln.Addr().String()+" client="+c.LocalAddr().String())
	wantReset(t, addrs[gone])
	s.eventually(t, "no local connection to="+gone, "clients: 0 (1 in all, 1 reset)")

	wide := "client=" + c.LocalAddr().String()
	s.mu.Lock()
	s.width = 200
	s.mu.Unlock()
	setTerminalSize(t, keyboard, 24, 40)
	eventually(t, "a narrow screen", func() bool { return s.text() != "" && !strings.Contains(s.text(), wide) })
	setTerminalSize(t, keyboard, 200, 40)
	s.eventually(t, wide)

	const z, c3 = "\x1a", "\x03"
	io.WriteString(keyboard, z)
	eventually(t, "it stops, and leaves the terminal", func() bool {
		_, restored := s.ours()
		return restored && stopped(cmd.Process.Pid)
	})
	goOn(t, cmd.Process.Pid)
	eventually(t, "it goes on", func() bool { ours, _ := s.ours(); return ours })
	s.eventually(t, "clients: 1 (1 in all)")
	wantExchange(t, c, "still here?")

	io.WriteString(keyboard, c3)
	s.eventually(t, "stopping when the clients have left", "  leaving ")
	wantExchange(t, c, "and now?")
	wantEnd(t, c)
	if err := waitFor(t, exited); err != nil {
		t.Errorf("it ended with %v", err)
	}
	eventually(t, "the terminal is as it was", func() bool { _, restored := s.ours(); return restored })
}

// The view says that the relay was lost, and that it is back.
func TestViewReconnects(t *testing.T) {
	at, closeFirst := startRelay(t, "127.0.0.1:0")
	_, _, s, _ := onTerminal(t, nil, "-relay", at, "-to", "1")
	s.eventually(t, "  connected ")
	closeFirst()
	s.eventually(t, "  reconnecting ", "unreachable")
	startRelay(t, at)
	s.eventually(t, "  connected ", ", reconnects: 1", "back at the relay")
}

// What ends the program at once leaves the terminal as it was, too.
func TestViewEnds(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	ln := listen(t)
	go serve(ln, "")
	for _, tt := range []struct {
		name    string
		signals []os.Signal
		end     string
	}{
		{"interrupted twice", []os.Signal{syscall.SIGINT, syscall.SIGINT}, "signal: interrupt"},
		{"hung up twice", []os.Signal{syscall.SIGHUP, syscall.SIGHUP}, "signal: hangup"},
		{"quit", []os.Signal{syscall.SIGQUIT}, "exit status 2"}, // as a Go program does, with its stacks
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd, _, s, exited := onTerminal(t, nil, "-relay", at, "-to", ln.Addr().String(), "-drain", "1h")
			s.eventually(t, "  connected ")
			addr, _, _ := strings.Cut(strings.Split(s.text(), "\n")[2], " -> ")
			wantExchange(t, dial(t, addr), "hello")
			for i, sig := range tt.signals {
				if i > 0 {
					s.eventually(t, "  leaving ")
				}
				cmd.Process.Signal(sig)
			}
			if err := waitFor(t, exited); err == nil || err.Error() != tt.end {
				t.Errorf("it ended with %v, want %s", err, tt.end)
			}
			eventually(t, "the terminal is as it was", func() bool { _, restored := s.ours(); return restored })
		})
	}
}

// A terminal that takes no output does not keep signals from ending the program.
func TestViewBlocked(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	ln := listen(t)
	go serve(ln, "")
	for _, tt := range []struct {
		name    string
		signals []os.Signal
		end     string
	}{
		{"twice", []os.Signal{syscall.SIGTERM, syscall.SIGINT}, "signal: "}, // whichever comes first
		{"quit", []os.Signal{syscall.SIGQUIT}, ""},                          // it wants to say its stacks
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd, keyboard, s, exited := onTerminal(t, nil, "-relay", at, "-to", ln.Addr().String(), "-drain", "1h")
			s.eventually(t, "  connected ")
			addr, _, _ := strings.Cut(strings.Split(s.text(), "\n")[2], " -> ")
			c := dial(t, addr)
			wantExchange(t, c, "hello")
			io.WriteString(keyboard, "\x13") // ^S
			for _, sig := range tt.signals {
				cmd.Process.Signal(sig)
			}
			if tt.end == "" {
				// The runtime writes to the terminal, which has to take it.
				io.WriteString(keyboard, "\x11")
			}
			if err := waitFor(t, exited); err == nil || !strings.HasPrefix(err.Error(), tt.end) {
				t.Errorf("it ended with %v", err)
			}
		})
	}
}

// As a job in the background the view does not draw on what is another one's screen, and in
// the foreground again it does.
func TestViewInBackground(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	ln := listen(t)
	go serve(ln, "")
	j, keyboard, s, exited := startJob(t, true, "-relay", at, "-to", ln.Addr().String(), "-drain", "1h")
	s.eventually(t, "  connected ")
	addr, _, _ := strings.Cut(strings.Split(s.text(), "\n")[2], " -> ")
	c := dial(t, addr)
	toBackground := func() (views int) { // that there were before
		t.Helper()
		io.WriteString(keyboard, "\x1a")
		eventually(t, "it stops, and leaves the terminal", func() bool {
			_, restored := s.ours()
			return restored && stopped(j.pid)
		})
		views = s.viewed()
		j.do(t, "bg")
		wantExchange(t, c, "hello")
		return views
	}
	toBackground()
	j.do(t, "fg")
	s.eventually(t, "  connected ", "clients: 1 (1 in all)")

	views := toBackground()
	if p, err := os.FindProcess(j.pid); err != nil || p.Signal(syscall.SIGTERM) != nil {
		t.Fatal("no signal can be sent")
	}
	wantRefused(t, addr)
	wantExchange(t, c, "and still there")
	wantEnd(t, c)
	if err := waitFor(t, exited); err != nil {
		t.Errorf("it ended with %v", err)
	}
	if _, restored := s.ours(); !restored || s.viewed() != views {
		t.Errorf("it has drawn in the background")
	}
}

// A job that is started in the background prints lines.
func TestNoViewInBackground(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	j, keyboard, s, exited := startJob(t, false, "-relay", at, "-to", "1")
	s.eventually(t, "127.0.0.1:", "msg=registered")
	j.do(t, "fg")
	io.WriteString(keyboard, "\x03")
	if err := waitFor(t, exited); err != nil {
		t.Errorf("it ended with %v", err)
	}
	if s.viewed() > 0 {
		t.Error("a view")
	}
}

// Behind the view, what ended the program is on the terminal that was there before.
func TestViewFails(t *testing.T) {
	_, _, s, exited := onTerminal(t, nil, "-relay", nobody(t), "-to", "1")
	if exit, ok := errors.AsType[*exec.ExitError](waitFor(t, exited)); !ok || exit.ExitCode() != 1 {
		t.Errorf("it ended with %v", exit)
	}
	s.eventually(t, `level=ERROR msg="forward failed"`)
	if _, restored := s.ours(); !restored {
		t.Error("the terminal is not as it was")
	}
}

// Plain lines are to be had on a terminal too, and with one that cannot do more.
func TestNoView(t *testing.T) {
	at, _ := startRelay(t, "127.0.0.1:0")
	for _, args := range [][]string{{"TERM=dumb"}, {"TERM=xterm", "-plain"}} {
		_, keyboard, s, exited := onTerminal(t, args[:1], append(args[1:], "-relay", at, "-to", "1")...)
		eventually(t, "the address alone on a line", func() bool {
			for line := range strings.Lines(s.text()) {
				_, port, err := net.SplitHostPort(strings.TrimSpace(line))
				if n, _ := strconv.Atoi(port); err == nil && n > 0 {
					return true
				}
			}
			return false
		})
		io.WriteString(keyboard, "\x03")
		if err := waitFor(t, exited); err != nil {
			t.Errorf("it ended with %v", err)
		}
		if s.viewed() > 0 {
			t.Errorf("%q: a view", args)
		}
	}
}
