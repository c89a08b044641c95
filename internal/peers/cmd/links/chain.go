package main

import (
	"flag"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/tcprelay/relay/internal/peers/link"
	"github.com/tcprelay/relay/internal/peers/parts"
)

// A line is the link of a measurement.
type line struct {
	rtt  time.Duration
	bits int // per second and direction
}

var allLinks = []line{
	{20 * time.Millisecond, 100e6},
	{100 * time.Millisecond, 100e6},
	{300 * time.Millisecond, 100e6},
	{20 * time.Millisecond, 1e9},
	{100 * time.Millisecond, 1e9},
	{300 * time.Millisecond, 1e9},
}

func (l line) String() string {
	if l.bits >= 1e9 {
		return fmt.Sprintf("%v %dGbit/s", l.rtt, l.bits/1e9)
	}
	return fmt.Sprintf("%v %dMbit/s", l.rtt, l.bits/1e6)
}

// over starts the link before what is at addr.
func (l line) over(r *parts.Running) parts.Via {
	return func(addr string) (string, error) {
		_, addr, err := r.Part("", "link", "-to", addr, "-rtt", l.rtt.String(), "-bits", strconv.Itoa(l.bits))
		return addr, err
	}
}

// runLink is a link in a process of its own.
func runLink(args []string) error {
	flags := flag.NewFlagSet("link", flag.ExitOnError)
	to := flags.String("to", "", "where to")
	rtt := flags.Duration("rtt", 0, "round-trip time")
	bits := flags.Int("bits", 0, "per second and direction")
	flags.Parse(args)
	l := link.New(*rtt, *bits)
	ln, err := l.Listen()
	if err != nil {
		return err
	}
	return parts.ServeUntilEOF(ln.Addr(), ln.Accept, func(c net.Conn) { l.CarryTo(c.(*net.TCPConn), *to) })
}

// baseline is the chain that ratios are to.
const baseline = "direct"

// A chain is what lies between load and app, with a link before the app.
type chain struct {
	name string
	// start starts its parts, the app too, and returns the public address.
	start func(r *parts.Running, l line) (addr string, err error)
}

var allChains = []chain{
	{baseline, direct},
	{"relay", func(r *parts.Running, l line) (string, error) { return r.Embedded(l.over(r)) }},
	{"yamux", rival("yamux")},
	{"smux", rival("smux")},
	{"muxado", rival("muxado")},
}

func direct(r *parts.Running, l line) (string, error) {
	addr, err := r.App()
	if err != nil {
		return "", err
	}
	return l.over(r)(addr)
}

func rival(name string) func(r *parts.Running, l line) (string, error) {
	return func(r *parts.Running, l line) (string, error) {
		return r.Rival(name, "", l.over(r))
	}
}
