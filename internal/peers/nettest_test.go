package peers

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"testing"

	"golang.org/x/net/nettest"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/mux"
)

// muxTransports are what a mux session is run over here. Each func returns two
// connected ends.
var muxTransports = []struct {
	name string
	pair func() (net.Conn, net.Conn, error)
}{
	{"pipe", func() (net.Conn, net.Conn, error) {
		a, b := net.Pipe()
		return a, b, nil
	}},
	{"tcp", tcpPair},
	{"tls", func() (net.Conn, net.Conn, error) {
		dialled, accepted, err := tcpPair()
		if err != nil {
			return nil, nil, err
		}
		serverTLS, clientTLS := tlsConfigs()
		return tls.Client(dialled, clientTLS), tls.Server(accepted, serverTLS), nil
	}},
}

// TestNettestMux runs the conformance suite of net.Conn over mux streams: over
// every transport, with streams opened by either role, and with the suite's first
// conn as the end that opened and as the end that accepted.
func TestNettestMux(t *testing.T) {
	for _, transport := range muxTransports {
		for _, opener := range []string{"client", "server"} {
			for _, first := range []string{"opened", "accepted"} {
				t.Run(fmt.Sprintf("%s/%sOpens/%sFirst", transport.name, opener, first), func(t *testing.T) {
					nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
						return muxStreams(transport.pair, opener == "server", first == "accepted")
					})
				})
			}
		}
	}
}

// muxStreams returns the two ends of a stream on a session of its own.
func muxStreams(pair func() (net.Conn, net.Conn, error), serverOpens, acceptedFirst bool) (c1, c2 net.Conn, stop func(), err error) {
	a, b, err := pair()
	if err != nil {
		return nil, nil, nil, err
	}
	opening, accepting := mux.Client(a, mux.Config{}), mux.Server(b, mux.Config{})
	if serverOpens {
		opening, accepting = accepting, opening
	}
	stop = func() {
		opening.Close()
		accepting.Close()
	}
	opened, openErr := opening.Open(nil)
	if openErr != nil {
		stop()
		return nil, nil, nil, openErr
	}
	accepted, acceptErr := accepting.Accept()
	if acceptErr != nil {
		stop()
		return nil, nil, nil, acceptErr
	}
	if acceptedFirst {
		return accepted, opened, stop, nil
	}
	return opened, accepted, stop, nil
}

// TestNettestRelay runs the conformance suite over a relay: one end is what the
// app's Accept returned, the other a TCP client of the public port.
func TestNettestRelay(t *testing.T) {
	for name, listen := range map[string]func(*testing.T) net.Listener{"session": listenRelay, "dedicated": listenDedicated} {
		t.Run(name, func(t *testing.T) { nettestRelay(t, listen) })
	}
}

func nettestRelay(t *testing.T, listen func(*testing.T) net.Listener) {
	for _, first := range []string{"app", "client"} {
		t.Run(first+"First", func(t *testing.T) {
			ln := listen(t)
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				client, err := net.Dial("tcp", ln.Addr().String())
				if err != nil {
					return nil, nil, nil, err
				}
				app, err := ln.Accept()
				if err != nil {
					client.Close()
					return nil, nil, nil, err
				}
				stop = func() {
					client.Close()
					app.Close()
				}
				if _, ok := app.(*relay.Conn); !ok {
					stop()
					return nil, nil, nil, errors.New("Accept returned no *relay.Conn")
				}
				if first == "app" {
					return app, client, stop, nil
				}
				return client, app, stop, nil
			})
		})
	}
}
