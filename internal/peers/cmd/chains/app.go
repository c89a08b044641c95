package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/tcprelay/relay"
)

// What a client asks an app for with its first byte.
const (
	askEcho  = 'e' // every message comes back
	askTake  = 't' // the app counts what comes, and answers with the count at its end
	askGive  = 'g' // the app sends for as long as it can
	bulkSize = 128 << 10
)

// parts are what this program can be in a chain. Each prints its address when it is
// ready, and ends with its standard input.
var parts = map[string]func(args []string) error{
	"app":   runApp,
	"embed": runEmbed,
	"proxy": runProxy,
	"relay": runRivalRelay,
	"agent": runRivalAgent,
	"load":  runLoad,
}

// serveUntilEOF serves conns from accept until standard input ends.
func serveUntilEOF(addr fmt.Stringer, accept func() (net.Conn, error), serve func(net.Conn)) error {
	fmt.Println(addr)
	failed := make(chan error, 1)
	go func() {
		for {
			c, err := accept()
			if err != nil {
				failed <- err
				return
			}
			go serve(c)
		}
	}()
	ended := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	select {
	case err := <-failed:
		return err
	case <-ended:
		return nil
	}
}

// runApp is an app behind a TCP port.
func runApp([]string) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	return serveUntilEOF(ln.Addr(), ln.Accept, serveApp)
}

// runEmbed is the same app with the library in it.
func runEmbed(args []string) error {
	flags := flag.NewFlagSet("embed", flag.ExitOnError)
	at := flags.String("relay", "", "address of relayd")
	flags.Parse(args)
	ln, err := relay.Register(context.Background(), *at)
	if err != nil {
		return err
	}
	return serveUntilEOF(ln.Addr(), ln.Accept, serveApp)
}

func serveApp(c net.Conn) {
	defer c.Close()
	var what [1]byte
	if _, err := io.ReadFull(c, what[:]); err != nil {
		return
	}
	switch what[0] {
	case askEcho:
		echo(c)
	case askTake:
		buf := make([]byte, bulkSize)
		var total uint64
		for {
			n, err := c.Read(buf)
			total += uint64(n)
			if err != nil {
				if errors.Is(err, io.EOF) {
					c.Write(binary.BigEndian.AppendUint64(nil, total))
				}
				return
			}
		}
	case askGive:
		buf := make([]byte, bulkSize)
		for {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}
}

// echo holds only a small buffer: its memory is not what is measured.
func echo(c net.Conn) {
	var buf [256]byte
	for {
		n, err := c.Read(buf[:])
		if n > 0 {
			if _, err := c.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
