package peers

import (
	"net"
	"time"

	muxado2016 "github.com/inconshreveable/muxado"
	muxado2 "golang.ngrok.com/muxado/v2"

	"github.com/tcprelay/relay/internal/mux"
)

// stockStream is what the streams of both stock libraries are.
type stockStream interface {
	net.Conn
	CloseWrite() error
}

// stockSession is a session of a stock library.
type stockSession struct {
	// open returns a stream of which the peer hears with its first write. Streams
	// must be opened and first written one after the other: concurrent ones can put
	// their SYNs on the wire out of order.
	open   func() (stockStream, error)
	accept func() (stockStream, error)
	// goAway says that no more streams are taken.
	goAway func(text string) error
	close  func() error
	// code returns the protocol's code in an error of this library. io.EOF and other
	// errors without one have code 255.
	code func(error) mux.Code
}

// stockLibrary starts sessions. A backlog of 0 is the library's default.
type stockLibrary struct {
	name  string
	start func(conn net.Conn, client bool, backlog uint32) *stockSession
}

var stockLibraries = []stockLibrary{
	{"muxado2016", func(conn net.Conn, client bool, backlog uint32) *stockSession {
		start := muxado2016.Server
		if client {
			start = muxado2016.Client
		}
		s := start(conn, &muxado2016.Config{AcceptBacklog: backlog})
		return &stockSession{
			open:   func() (stockStream, error) { return s.OpenStream() },
			accept: func() (stockStream, error) { return s.AcceptStream() },
			goAway: func(text string) error {
				goer := s.(interface {
					GoAway(muxado2016.ErrorCode, []byte, time.Time) error
				})
				return goer.GoAway(muxado2016.NoError, []byte(text), time.Time{})
			},
			close: s.Close,
			code: func(err error) mux.Code {
				code, _ := muxado2016.GetError(err)
				return mux.Code(code)
			},
		}
	}},
	{"muxado2", func(conn net.Conn, client bool, backlog uint32) *stockSession {
		start := muxado2.Server
		if client {
			start = muxado2.Client
		}
		s := start(conn, &muxado2.Config{AcceptBacklog: backlog})
		return &stockSession{
			open:   func() (stockStream, error) { return s.OpenStream() },
			accept: func() (stockStream, error) { return s.AcceptStream() },
			goAway: func(text string) error {
				goer := s.(interface {
					GoAway(muxado2.ErrorCode, []byte, time.Time) error
				})
				return goer.GoAway(muxado2.NoError, []byte(text), time.Time{})
			},
			close: s.Close,
			code: func(err error) mux.Code {
				code, _ := muxado2.GetError(err)
				return mux.Code(code)
			},
		}
	}},
}
