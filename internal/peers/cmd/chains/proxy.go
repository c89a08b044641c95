package main

import (
	"flag"
	"io"
	"net"
)

// runProxy is a plain TCP proxy: io.Copy both ways, for which the kernel splices.
func runProxy(args []string) error {
	flags := flag.NewFlagSet("proxy", flag.ExitOnError)
	to := flags.String("to", "", "where to")
	flags.Parse(args)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	return serveUntilEOF(ln.Addr(), ln.Accept, func(client net.Conn) {
		backend, err := net.Dial("tcp", *to)
		if err != nil {
			client.Close()
			return
		}
		joinConns(client.(*net.TCPConn), backend.(*net.TCPConn), func(dst io.Writer, src io.Reader) error {
			_, err := io.Copy(dst, src)
			return err
		})
	})
}

type halfCloser interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// joinConns carries bytes both ways until both have ended, and closes both. A clean end
// is passed on as a half-close, an error ends everything.
func joinConns(near, far halfCloser, carry func(io.Writer, io.Reader) error) {
	defer near.Close()
	defer far.Close()
	half := func(dst, src halfCloser) {
		if carry(dst, src) != nil {
			near.Close()
			far.Close()
			return
		}
		dst.CloseWrite()
	}
	up := make(chan struct{})
	go func() {
		half(far, near)
		close(up)
	}()
	half(near, far)
	<-up
}
