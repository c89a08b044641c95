package parts

import (
	"flag"
	"net"

	"github.com/tcprelay/relay/internal/peers/rivals"
)

// runProxy is a plain TCP proxy, for which the kernel splices.
func runProxy(args []string) error {
	flags := flag.NewFlagSet("proxy", flag.ExitOnError)
	to := flags.String("to", "", "where to")
	flags.Parse(args)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	return ServeUntilEOF(ln.Addr(), ln.Accept, func(client net.Conn) {
		backend, err := net.Dial("tcp", *to)
		if err != nil {
			client.Close()
			return
		}
		rivals.Join(client.(*net.TCPConn), backend.(*net.TCPConn), rivals.Splice)
	})
}
