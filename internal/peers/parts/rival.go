package parts

import (
	"flag"
	"fmt"
	"net"

	"github.com/tcprelay/relay/internal/peers/rivals"
)

// runRivalRelay prints two addresses: that of agents, and the public one.
func runRivalRelay(args []string) error {
	flags := flag.NewFlagSet("relay", flag.ExitOnError)
	name := flags.String("over", "", "which multiplexer")
	flags.Parse(args)
	rival, ok := rivals.Named(*name)
	if !ok {
		return fmt.Errorf("no rival is named %q", *name)
	}
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
	open, _, err := rival.Open(c)
	if err != nil {
		return err
	}
	return ServeUntilEOF(public.Addr(), public.Accept, func(client net.Conn) {
		st, err := open()
		if err != nil {
			client.Close()
			return
		}
		rivals.Join(client.(*net.TCPConn), st, rivals.Copy)
	})
}

// runRivalAgent carries streams to an app's port or, without one, to the app in it.
func runRivalAgent(args []string) error {
	flags := flag.NewFlagSet("agent", flag.ExitOnError)
	name := flags.String("over", "", "which multiplexer")
	at := flags.String("relay", "", "where the relay is")
	to := flags.String("to", "", "where the app is; empty: here")
	flags.Parse(args)
	rival, ok := rivals.Named(*name)
	if !ok {
		return fmt.Errorf("no rival is named %q", *name)
	}
	c, err := net.Dial("tcp", *at)
	if err != nil {
		return err
	}
	accept, _, err := rival.Accept(c)
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
			rivals.Join(backend.(*net.TCPConn), st.(rivals.HalfCloser), rivals.Copy)
		}
	}
	return ServeUntilEOF(c.LocalAddr(), accept, serve)
}
