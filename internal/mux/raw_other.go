//go:build !unix

package mux

import (
	"io"
	"net"

	"github.com/tcprelay/relay/internal/splice"
)

// Without non-blocking access to sockets the flusher makes every write, and
// Stream.ReadFrom reads as from any other source.

type rawWriter struct{}

func newRawWriter(io.Writer) *rawWriter { return nil }

func (*rawWriter) write([]byte) (int, error) { panic("unreachable") }

func (*rawWriter) writeBehind(_, _ []byte) (int, error) { panic("unreachable") }

func (*rawWriter) drain(*splice.Pipe) (int, error) { panic("unreachable") }

func (*rawWriter) writePiped(*chunk, bool) (int, error) { panic("unreachable") }

type rawInput struct{}

func newRawInput(net.Conn) *rawInput { return nil }

func (*rawInput) Read([]byte) (int, error)                    { panic("unreachable") }
func (*rawInput) fill(int) (*splice.Pipe, error)              { panic("unreachable") }
func (*rawInput) give(*Stream, int, []byte) (int, int, error) { panic("unreachable") }

type rawReader struct{}

func newRawReader(io.Reader) *rawReader { return nil }

func (*rawReader) read(int, bool) (*chunk, int, error) { panic("unreachable") }
