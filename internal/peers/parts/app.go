package parts

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tcprelay/relay"
)

// What a client asks an app for with its first byte.
const (
	askEcho  = 'e' // every message comes back
	askTake  = 't' // the app counts what comes, and answers with the count at its end
	askTell  = 'm' // the app counts what comes, and tells the count every tellEvery
	askGive  = 'g' // the app sends for as long as it can
	bulkSize = 128 << 10

	tellEvery = 10 * time.Millisecond
)

// ServeUntilEOF prints addr and serves conns from accept until standard input ends.
func ServeUntilEOF(addr fmt.Stringer, accept func() (net.Conn, error), serve func(net.Conn)) error {
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
	return untilEOF(failed)
}

// untilEOF returns when standard input ends, or with what has failed before.
func untilEOF(failed <-chan error) error {
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
	return ServeUntilEOF(ln.Addr(), ln.Accept, serveApp)
}

// runEmbed is the same app with the library in it.
func runEmbed(args []string) error {
	flags := flag.NewFlagSet("embed", flag.ExitOnError)
	at := flags.String("relay", "", "address of relayd")
	dedicated := flags.Int("dedicated", -1, "spare connections; negative: clients share one")
	services := flags.Int("services", 1, "how many services")
	flags.Parse(args)
	var opts []relay.RegisterOption
	if *dedicated >= 0 {
		opts = append(opts, relay.WithDedicated(*dedicated))
	}
	var addrs addresses
	clients, failed := make(chan net.Conn), make(chan error)
	for range *services {
		ln, err := relay.Register(context.Background(), *at, opts...)
		if err != nil {
			return err
		}
		addrs = append(addrs, ln.Addr().String())
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					failed <- err
					return
				}
				clients <- c
			}
		}()
	}
	return ServeUntilEOF(addrs, func() (net.Conn, error) {
		select {
		case c := <-clients:
			return c, nil
		case err := <-failed:
			return nil, err
		}
	}, serveApp)
}

// addresses are several, for a Load that goes to all of them.
type addresses []string

func (a addresses) String() string { return strings.Join(a, ",") }

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
	case askTell:
		tell(c)
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

func tell(c net.Conn) {
	var total atomic.Uint64
	go func() {
		for {
			time.Sleep(tellEvery)
			if _, err := c.Write(binary.BigEndian.AppendUint64(nil, total.Load())); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, bulkSize)
	for {
		n, err := c.Read(buf)
		total.Add(uint64(n))
		if err != nil {
			return
		}
	}
}
