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
