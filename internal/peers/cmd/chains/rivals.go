package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/hashicorp/yamux"
	"github.com/inconshreveable/muxado"
	"github.com/xtaci/smux"
)

// A rival is somebody's multiplexer, with the smallest relay and agent around it.
type rival struct {
	// open returns what opens streams on the relay's side of a session.
	open func(net.Conn) (func() (halfCloser, error), error)
	// accept returns what accepts them on the agent's.
	accept func(net.Conn) (func() (net.Conn, error), error)
}

var rivals = map[string]rival{
	"yamux":  yamuxRival(),
	"smux":   smuxRival(),
	"muxado": muxadoRival(),
}

// yamuxRival raises the window of a stream from 256 KiB to where bulk goes faster.
func yamuxRival() rival {
	config := yamux.DefaultConfig()
	config.MaxStreamWindowSize = 1 << 20
	config.LogOutput = io.Discard
	return rival{
		func(c net.Conn) (func() (halfCloser, error), error) {
			s, err := yamux.Server(c, config)
			return func() (halfCloser, error) {
				st, err := s.OpenStream()
				return yamuxStream{st}, err
			}, err
		},
		func(c net.Conn) (func() (net.Conn, error), error) {
			s, err := yamux.Client(c, config)
			return func() (net.Conn, error) {
				st, err := s.AcceptStream()
				return yamuxStream{st}, err
			}, err
		},
	}
}

// yamuxStream gives yamux's Close its true name: it ends the writing half only.
type yamuxStream struct{ *yamux.Stream }

func (s yamuxStream) CloseWrite() error { return s.Stream.Close() }

// smuxRival speaks version 2, the one with a window per stream, whose sizes are raised:
// by default they hold it back.
func smuxRival() rival {
	config := smux.DefaultConfig()
	config.Version = 2
	config.MaxStreamBuffer = 1 << 20
	config.MaxReceiveBuffer = 64 << 20
	return rival{
		func(c net.Conn) (func() (halfCloser, error), error) {
			s, err := smux.Server(c, config)
			return func() (halfCloser, error) { return s.OpenStream() }, err
		},
		func(c net.Conn) (func() (net.Conn, error), error) {
			s, err := smux.Client(c, config)
			return func() (net.Conn, error) { return s.AcceptStream() }, err
		},
	}
}

func muxadoRival() rival {
	return rival{
		func(c net.Conn) (func() (halfCloser, error), error) {
			s := muxado.Server(c, nil)
			return func() (halfCloser, error) { return s.OpenStream() }, nil
		},
		func(c net.Conn) (func() (net.Conn, error), error) {
			return muxado.Client(c, nil).Accept, nil
		},
	}
}

// runRivalRelay prints two addresses: that of agents, and the public one.
func runRivalRelay(args []string) error {
	flags := flag.NewFlagSet("relay", flag.ExitOnError)
	name := flags.String("over", "", "which multiplexer")
	flags.Parse(args)
	agents, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	public, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(agents.Addr())
	c, err := agents.Accept()
	if err != nil {
		return err
	}
	open, err := rivals[*name].open(c)
	if err != nil {
		return err
	}
	return serveUntilEOF(public.Addr(), public.Accept, func(client net.Conn) {
		st, err := open()
		if err != nil {
			client.Close()
			return
		}
		joinConns(client.(*net.TCPConn), st, copyPooled)
	})
}

// runRivalAgent carries streams to an app's port or, without one, to the app in it.
func runRivalAgent(args []string) error {
	flags := flag.NewFlagSet("agent", flag.ExitOnError)
	name := flags.String("over", "", "which multiplexer")
	at := flags.String("relay", "", "where the relay is")
	to := flags.String("to", "", "where the app is; empty: here")
	flags.Parse(args)
	c, err := net.Dial("tcp", *at)
	if err != nil {
		return err
	}
	accept, err := rivals[*name].accept(c)
	if err != nil {
		return err
	}
	serve := serveApp
	if *to != "" {
		serve = func(st net.Conn) {
			backend, err := net.Dial("tcp", *to)
			if err != nil {
				st.Close()
				return
			}
			joinConns(backend.(*net.TCPConn), st.(halfCloser), copyPooled)
		}
	}
	return serveUntilEOF(c.LocalAddr(), accept, serve)
}

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// copyPooled is io.Copy with a buffer from a pool. A stream that can write itself out
// without one (smux) does so; a TCP conn's own methods are kept out of it, because
// towards a stream they only add a buffer of their own.
func copyPooled(dst io.Writer, src io.Reader) error {
	if _, ok := src.(*net.TCPConn); !ok {
		if w, ok := src.(io.WriterTo); ok {
			_, err := w.WriteTo(dst)
			if errors.Is(err, io.EOF) { // smux's way to say that it is done
				err = nil
			}
			return err
		}
	}
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, *buf)
	return err
}
