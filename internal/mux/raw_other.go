//go:build !unix

package mux

import (
	"io"
)

// Without non-blocking access to sockets the flusher makes every write, and
// Stream.ReadFrom reads as from any other source.

type rawWriter struct{}

func newRawWriter(io.Writer) *rawWriter { return nil }

func (*rawWriter) write([]byte) (int, error) { panic("unreachable") }

type rawReader struct{}

func newRawReader(io.Reader) *rawReader { return nil }

func (*rawReader) read(int) (*chunk, int, error) { panic("unreachable") }
