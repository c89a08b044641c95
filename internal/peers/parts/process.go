// Package parts runs relays in processes of their own, for the commands that compare
// them. Such a command is also every part of a chain that is no program by itself: it
// runs itself with the name of the part.
package parts

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// all are the parts that every command has. Each prints its address when it is ready,
// and ends with its standard input.
var all = map[string]func(args []string) error{
	"app":   runApp,
	"embed": runEmbed,
	"relay": runRivalRelay,
	"agent": runRivalAgent,
	"load":  runLoad,
	"proxy": runProxy,

	"bare-relay": runBareRelay,
	"bare-agent": runBareAgent,
}

// Main is the part that the first argument names, and then does not return; it does if
// that names none. Commands call it first, and so do their tests. More are parts that
// other commands do not have.
func Main(more map[string]func(args []string) error) {
	if len(os.Args) < 2 {
		return
	}
	part := all[os.Args[1]]
	if part == nil {
		part = more[os.Args[1]]
	}
	if part == nil {
		return
	}
	if err := part(os.Args[2:]); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A Bench has what all measurements need.
type Bench struct {
	Dir             string // for files
	Relayd, Forward string // programs
	self            string
}

// NewBench builds the relay and its agent. Close removes them.
func NewBench(ctx context.Context) (*Bench, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "parts")
	if err != nil {
		return nil, err
	}
	b := &Bench{Dir: dir, self: self, Relayd: filepath.Join(dir, "relayd"), Forward: filepath.Join(dir, "forward")}
	for path, pkg := range map[string]string{b.Relayd: "relayd", b.Forward: "forward"} {
		build := exec.CommandContext(ctx, "go", "build", "-o", path, "github.com/tcprelay/relay/examples/"+pkg)
		if out, err := build.CombinedOutput(); err != nil {
			b.Close()
			return nil, fmt.Errorf("%w\n%s", err, out)
		}
	}
	// Chains need two files a client and more.
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil && limit.Cur < 100_000 {
		limit.Cur, limit.Max = 100_000, max(100_000, limit.Max)
		syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit) // if we may
	}
	return b, nil
}

func (b *Bench) Close() { os.RemoveAll(b.Dir) }

// A Process is a part of a chain.
type Process struct {
	Role  string // in the table of memory; empty if it is no carrier of bytes
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
	errs  strings.Builder
}

// Running is a chain whose parts have been started.
type Running struct {
	Bench *Bench
	Ctx   context.Context // kills them
	Procs []*Process
}

// Start starts a program, which reads standard input to its end. Role is what it is in
// the table; a part without one is not counted.
func (r *Running) Start(role, program string, args ...string) (*Process, error) {
	p := &Process{Role: role, cmd: exec.CommandContext(r.Ctx, program, args...)}
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewReader(stdout)
	p.cmd.Stderr = &p.errs
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	r.Procs = append(r.Procs, p)
	return p, nil
}

// Drain reads what the process goes on to say.
func (p *Process) Drain() {
	for {
		if _, err := p.out.ReadSlice('\n'); err != nil && err != bufio.ErrBufferFull {
			return
		}
	}
}

// Part starts this program as one of its parts, and returns the address that it prints.
func (r *Running) Part(role, name string, args ...string) (p *Process, addr string, err error) {
	if p, err = r.Start(role, r.Bench.self, append([]string{name}, args...)...); err != nil {
		return nil, "", err
	}
	addr, err = p.Line()
	return p, addr, err
}

// Line returns the next line of its output.
func (p *Process) Line() (string, error) {
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.cmd.Process.Kill()
		p.cmd.Wait() // for all of what it said
		return "", fmt.Errorf("%s: %w\n%s", filepath.Base(p.cmd.Path), err, p.errs.String())
	}
	return strings.TrimSpace(line), nil
}

// End kills them all.
func (r *Running) End() {
	for _, p := range r.Procs {
		p.stdin.Close()
		p.cmd.Process.Kill()
		p.cmd.Wait()
	}
}

// CPU returns the CPU seconds that a process has used.
func (p *Process) CPU() float64 {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.cmd.Process.Pid))
	var total float64
	for _, t := range tasks {
		b, _ := os.ReadFile(t)
		if f := strings.Fields(string(b)); len(f) > 0 {
			ns, _ := strconv.ParseFloat(f[0], 64)
			total += ns / 1e9
		}
	}
	return total
}

// RSS returns the bytes of memory that a process has in use.
func (p *Process) RSS() float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.cmd.Process.Pid))
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, _ := strconv.ParseFloat(f[1], 64)
	return pages * float64(os.Getpagesize())
}
