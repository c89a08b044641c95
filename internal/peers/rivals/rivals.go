// Package rivals has other people's multiplexers, each behind the same two functions,
// and what a relay around one of them needs: the joining of two conns.
package rivals

import (
	"io"
	"net"

	"github.com/hashicorp/yamux"
	"github.com/inconshreveable/muxado"
	"github.com/xtaci/smux"
)

// A Rival is somebody's multiplexer. Open and Accept make a session on a conn; closing
// the session closes the conn.
type Rival struct {
	Name string
	// Open makes the relay's side of a session, and returns what opens streams.
	Open func(net.Conn) (Opener, io.Closer, error)
	// Accept makes the agent's side, and returns what accepts them. Its conns are
	// HalfClosers.
	Accept func(net.Conn) (Accepter, io.Closer, error)
}

type (
	Opener   func() (HalfCloser, error)
	Accepter func() (net.Conn, error)
)

// All are in the order that tables list them in.
var All = []Rival{yamuxRival(), smuxRival(), muxadoRival()}

// Named returns the rival of that name.
func Named(name string) (Rival, bool) {
	for _, r := range All {
		if r.Name == name {
			return r, true
		}
	}
	return Rival{}, false
}

// yamuxRival raises the window of a stream from 256 KiB to where bulk goes faster.
func yamuxRival() Rival {
	config := yamux.DefaultConfig()
	config.MaxStreamWindowSize = 1 << 20
	config.LogOutput = io.Discard
	return Rival{
		Name: "yamux",
		Open: func(c net.Conn) (Opener, io.Closer, error) {
			s, err := yamux.Server(c, config)
			return func() (HalfCloser, error) {
				st, err := s.OpenStream()
				return yamuxStream{st}, err
			}, s, err
		},
		Accept: func(c net.Conn) (Accepter, io.Closer, error) {
			s, err := yamux.Client(c, config)
			return func() (net.Conn, error) {
				st, err := s.AcceptStream()
				return yamuxStream{st}, err
			}, s, err
		},
	}
}

// yamuxStream gives yamux's Close its true name: it ends the writing half only, and a
// stream is gone once both ends have called it.
type yamuxStream struct{ *yamux.Stream }

func (s yamuxStream) CloseWrite() error { return s.Stream.Close() }

// smuxRival speaks version 2, the one with a window per stream. The sizes are raised
// from 64 KiB per stream and 4 MiB per session, which hold it back.
func smuxRival() Rival {
	config := smux.DefaultConfig()
	config.Version = 2
	config.MaxStreamBuffer = 1 << 20
	config.MaxReceiveBuffer = 64 << 20
	return Rival{
		Name: "smux",
		Open: func(c net.Conn) (Opener, io.Closer, error) {
			s, err := smux.Server(c, config)
			return func() (HalfCloser, error) { return s.OpenStream() }, s, err
		},
		Accept: func(c net.Conn) (Accepter, io.Closer, error) {
			s, err := smux.Client(c, config)
			return func() (net.Conn, error) { return s.AcceptStream() }, s, err
		},
	}
}

// muxadoRival is the stock module as it comes; a larger window does not make it faster.
// It tells the app of a stream with the first bytes written to it, so its clients must
// speak first, as those of all measurements do.
func muxadoRival() Rival {
	return Rival{
		Name: "muxado",
		Open: func(c net.Conn) (Opener, io.Closer, error) {
			s := muxado.Server(c, nil)
			return func() (HalfCloser, error) { return s.OpenStream() }, s, nil
		},
		Accept: func(c net.Conn) (Accepter, io.Closer, error) {
			s := muxado.Client(c, nil)
			return s.Accept, s, nil
		},
	}
}
