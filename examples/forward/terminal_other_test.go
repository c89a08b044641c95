//go:build !linux

package main

import (
	"os"
	"os/exec"
	"testing"
)

// openTerminal skips the test: each system makes terminals in its own way, and package
// syscall has what it takes for Linux alone.
func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	t.Skip("a terminal is made for tests on Linux only")
	panic("unreachable")
}

func setTerminalSize(*testing.T, *os.File, uint16, uint16) {}

func ownTerminal(*exec.Cmd) {}

func stopped(int) bool { return false }

func goOn(*testing.T, int) {}

// A job is the program as a job of a shell.
type job struct{ pid int }

func startJob(t *testing.T, _ bool, _ ...string) (*job, *os.File, *screen, chan error) {
	openTerminal(t)
	panic("unreachable")
}

func (*job) do(*testing.T, string) {}

func shell() {}
