//go:build !linux && !darwin && !freebsd

package main

import "os"

// terminalSize would tell the size of a terminal. Here no file is known to be one that can
// be drawn on, so there are always lines.
func terminalSize(*os.File) (width, height int, ok bool) { return 0, 0, false }

func foreground(*os.File) bool { return false }

func (v *view) follow() (unfollow func()) { return func() {} }
