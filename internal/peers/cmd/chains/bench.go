package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bench has what all measurements need.
type bench struct {
	dir             string
	self            string
	relayd, forward string
}

func newBench(ctx context.Context) (*bench, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "chains")
	if err != nil {
		return nil, err
	}
	b := &bench{dir: dir, self: self, relayd: filepath.Join(dir, "relayd"), forward: filepath.Join(dir, "forward")}
	for path, pkg := range map[string]string{b.relayd: "relayd", b.forward: "forward"} {
		build := exec.CommandContext(ctx, "go", "build", "-o", path, "github.com/tcprelay/relay/examples/"+pkg)
		if out, err := build.CombinedOutput(); err != nil {
			b.close()
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

func (b *bench) close() { os.RemoveAll(b.dir) }

// A process is a part of a chain.
type process struct {
	role  string // in the table of memory; empty if it is no carrier of bytes
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
	errs  strings.Builder
}

// running is a chain whose parts have been started.
type running struct {
	b     *bench
	ctx   context.Context
	procs []*process
}

// start starts a program, which reads standard input to its end. Role is what it is in
// the table; a part without one is not counted.
func (r *running) start(role, program string, args ...string) (*process, error) {
	p := &process{role: role, cmd: exec.CommandContext(r.ctx, program, args...)}
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
	r.procs = append(r.procs, p)
	return p, nil
}

// part starts this program as one of its parts, and returns the address that it prints.
func (r *running) part(role, name string, args ...string) (p *process, addr string, err error) {
	if p, err = r.start(role, r.b.self, append([]string{name}, args...)...); err != nil {
		return nil, "", err
	}
	addr, err = p.line()
	return p, addr, err
}

func (p *process) line() (string, error) {
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.cmd.Process.Kill()
		p.cmd.Wait() // for all of what it said
		return "", fmt.Errorf("%s: %w\n%s", filepath.Base(p.cmd.Path), err, p.errs.String())
	}
	return strings.TrimSpace(line), nil
}

func (r *running) end() {
	for _, p := range r.procs {
		p.stdin.Close()
		p.cmd.Process.Kill()
		p.cmd.Wait()
	}
}

// cpu returns the CPU seconds that a process has used.
func (p *process) cpu() float64 {
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

// rss returns the bytes of memory that a process has in use.
func (p *process) rss() float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.cmd.Process.Pid))
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, _ := strconv.ParseFloat(f[1], 64)
	return pages * float64(os.Getpagesize())
}

// A measurement is what a job over a chain came to.
type measurement struct {
	rate     float64 // per second
	cpu      float64 // seconds of all carriers, per unit
	p50, p99 time.Duration
	memory   map[string]float64 // bytes per client, by role
}

func (m measurement) String() string {
	s := fmt.Sprintf("%.4g/s cpu %.3g p50 %v p99 %v", m.rate, m.cpu, m.p50, m.p99)
	for role, n := range m.memory {
		s += fmt.Sprintf(" %s %.1f KiB", role, n/1024)
	}
	return s
}

func (b *bench) measure(ctx context.Context, c chain, j job, length time.Duration) (m measurement, err error) {
	ctx, cancel := context.WithTimeout(ctx, length+2*time.Minute)
	defer cancel()
	r := &running{b: b, ctx: ctx}
	defer r.end()
	addr, err := c.start(r)
	if err != nil {
		return m, err
	}
	carriers := len(r.procs)
	l, err := r.start("", b.self, "load", "-addr", addr, "-kind", j.kind, "-n", strconv.Itoa(j.n), "-for", length.String())
	if err != nil {
		return m, err
	}
	if line, err := l.line(); err != nil || line != "ready" {
		return m, errors.Join(fmt.Errorf("load says %q", line), err)
	}
	var cpu float64
	rss := make(map[string]float64)
	for _, p := range r.procs[:carriers] {
		if p.role != "" {
			cpu -= p.cpu()
			rss[p.role] -= p.rss()
		}
	}
	if _, err := io.WriteString(l.stdin, "go\n"); err != nil {
		return m, err
	}
	line, err := l.line()
	if err != nil {
		return m, err
	}
	for _, p := range r.procs[:carriers] {
		if p.role != "" {
			cpu += p.cpu()
			rss[p.role] += p.rss()
		}
	}
	var rep report
	if err := json.Unmarshal([]byte(line), &rep); err != nil {
		return m, err
	}
	if rep.Errors > 0 {
		return m, fmt.Errorf("%d errors, the first: %s", rep.Errors, rep.Error)
	}
	if rep.Count == 0 {
		return m, errors.New("nothing came through")
	}
	m = measurement{rate: float64(rep.Count) / rep.Seconds, cpu: cpu / float64(rep.Count), p50: rep.P50, p99: rep.P99}
	if j.kind == "idle" {
		m.memory = make(map[string]float64)
		for role, n := range rss {
			m.memory[role] = n / float64(rep.Count)
		}
	}
	return m, nil
}

// freePort returns an address where nobody listens now.
func freePort() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

// awaitPort returns when somebody listens at addr.
func awaitPort(ctx context.Context, addr string) error {
	for {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(5 * time.Millisecond):
		}
	}
}
