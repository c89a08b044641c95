//go:build linux || darwin || freebsd

package main

import (
	"os"
	"os/signal"
	"syscall"
)

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
				v.react(sig)
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

func (v *view) react(sig os.Signal) {
	switch sig {
	case syscall.SIGTSTP:
		inTime(v.leave)
		syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	case syscall.SIGCONT:
		v.enter()
		v.notes.nudge()
	case syscall.SIGWINCH:
		v.notes.nudge()
	case syscall.SIGQUIT:
		die(sig, func() { inTime(v.leave) })
	}
}
