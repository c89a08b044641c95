package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var errno syscall.Errno
	err = raw.Control(func(fd uintptr) { _, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, request, uintptr(arg)) })
	if err == nil && errno != 0 {
		err = errno
	}
	return err
}

// openTerminal returns both ends of a terminal.
func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip("this machine gives no terminals: ", err)
	}
	var locked, number int32
	if err := ioctl(master, syscall.TIOCSPTLCK, unsafe.Pointer(&locked)); err != nil {
		t.Fatal(err)
	}
	if err := ioctl(master, syscall.TIOCGPTN, unsafe.Pointer(&number)); err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		master.Close()
		t.Skip("this machine gives no terminals: ", err)
	}
	return master, slave
}

func setTerminalSize(t *testing.T, f *os.File, width, height uint16) {
	t.Helper()
	size := [4]uint16{height, width}
	if err := ioctl(f, syscall.TIOCSWINSZ, unsafe.Pointer(&size)); err != nil {
		t.Fatal(err)
	}
}

// ownTerminal has a program's standard input be the terminal that sends it signals.
func ownTerminal(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
}

// A job is the program as a job of a shell.
type job struct {
	pid      int
	commands io.Writer
	answers  *bufio.Reader
}

// inForeground in the environment has a shell start its job there.
const inForeground = "FORWARD_TEST_IN_FOREGROUND"

// startJob starts the program as the job of a shell, which owns the terminal.
func startJob(t *testing.T, foreground bool, args ...string) (j *job, keyboard *os.File, s *screen, exited chan error) {
	t.Helper()
	in, commands, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	answers, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	env := []string{asProgram + "=shell"}
	if foreground {
		env = append(env, inForeground+"=1")
	}
	_, keyboard, s, exited = startOnTerminal(t, []*os.File{in, out}, env, args...)
	in.Close()
	out.Close()
	t.Cleanup(func() { commands.Close(); answers.Close() })
	j = &job{commands: commands, answers: bufio.NewReader(answers)}
	if _, err := fmt.Fscanln(j.answers, &j.pid); err != nil {
		t.Fatal(err)
	}
	return j, keyboard, s, exited
}

// do has the shell do what one does with fg and bg.
func (j *job) do(t *testing.T, command string) {
	t.Helper()
	fmt.Fprintln(j.commands, command)
	if got, err := j.answers.ReadString('\n'); got != "done\n" {
		t.Fatalf("%s: %q, %v", command, got, err)
	}
}

// shell runs the program as a job, which it moves to the foreground and to the background
// as it is told. It ends with the job, and the job with it.
func shell() {
	runtime.LockOSThread()         // the job is to end with this thread
	signal.Ignore(syscall.SIGTTOU) // which who changes the foreground from the background gets
	commands, answers := bufio.NewScanner(os.NewFile(3, "commands")), os.NewFile(4, "answers")
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	child := exec.Command(self, os.Args[1:]...)
	child.Env = append(os.Environ(), asProgram+"=1")
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Foreground: os.Getenv(inForeground) != "", Pdeathsig: syscall.SIGKILL}
	if err := child.Start(); err != nil {
		panic(err)
	}
	go func() {
		child.Wait()
		os.Exit(child.ProcessState.ExitCode())
	}()
	pid := child.Process.Pid
	fmt.Fprintln(answers, pid)
	for commands.Scan() {
		group := int32(syscall.Getpgrp())
		if commands.Text() == "fg" {
			group = int32(pid)
		}
		if err := ioctl(os.Stdin, syscall.TIOCSPGRP, unsafe.Pointer(&group)); err != nil {
			panic(err)
		}
		syscall.Kill(-pid, syscall.SIGCONT)
		fmt.Fprintln(answers, "done")
	}
	select {} // until the job ends
}

// stopped reports whether a process is, as by ^Z.
func stopped(pid int) bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(state, "T")
}

// goOn continues a process that is stopped.
func goOn(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
}
