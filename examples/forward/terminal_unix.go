//go:build linux || darwin || freebsd

package main

import (
	"os"
	"os/signal"
	"syscall"
	"unsafe"
)

// terminalSize returns the size of a terminal in characters, 0 by 0 if it does not know,
// and whether the file is a terminal at all.
func terminalSize(f *os.File) (width, height int, ok bool) {
	var size struct{ rows, columns, x, y uint16 }
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, 0, false
	}
	errno := syscall.EBADF
	raw.Control(func(fd uintptr) {
		_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&size)))
	})
	return int(size.columns), int(size.rows), errno == 0
}

// follow does what a terminal's signals ask for: it leaves the terminal as it was while the
// program is stopped, or before it quits, and draws when the size has changed. It ends with
// the function that it returns.
func (v *view) follow() (unfollow func()) {
	signals := make(chan os.Signal, 8)
	done, ended := make(chan struct{}), make(chan struct{})
	signal.Notify(signals, syscall.SIGTSTP, syscall.SIGCONT, syscall.SIGQUIT, syscall.SIGWINCH)
	go func() {
		defer close(ended)
		for {
			select {
			case sig := <-signals:
				v.obey(sig)
			case <-done:
				return
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(done)
		<-ended
	}
}

func (v *view) obey(sig os.Signal) {
	switch sig {
	case syscall.SIGTSTP:
		v.leave()
		syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	case syscall.SIGCONT:
		v.enter()
		v.notes.nudge()
	case syscall.SIGWINCH:
		v.notes.nudge()
	case syscall.SIGQUIT:
		die(sig, v.leave)
	}
}
