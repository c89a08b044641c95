package main

import (
	"context"
	"net"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/localdial"
)

// localTime is how long it may take until a target has taken a client.
const localTime = 10 * time.Second

// carry joins a client to a new local connection. If there is none the client is
// reset, which is what it would get from a port where nobody listens, and others who share
// the name get those that come after it.
func (m *mapping) carry(client *relay.Conn, leave func(error)) {
	local, err := m.dial(client.RemoteAddr(), client.LocalAddr())
	if err != nil {
		m.missed.Add("local", "no local connection", "client", client.RemoteAddr(), "err", err)
		if m.shared {
			leave(err) // before this one can come again
		}
		client.SetLinger(0)
		client.Close()
		return
	}
	m.log.Debug("client came", "client", client.RemoteAddr())
	client.Join(local, func(err error) {
		if err != nil {
			m.log.Debug("client was cut off", "client", client.RemoteAddr(), "err", err)
			return
		}
		m.log.Debug("client left", "client", client.RemoteAddr())
	})
}

// dial connects to the target, and tells it who the client is, if it is to know.
func (m *mapping) dial(client, public net.Addr) (net.Conn, error) {
	by := time.Now().Add(localTime)
	c, err := m.connect(by)
	if err != nil {
		return nil, err
	}
	if tcp, ok := c.(*net.TCPConn); ok && !tcp.RemoteAddr().(*net.TCPAddr).IP.IsLoopback() {
		tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true}) // not all that local, and may vanish
	}
	if m.proxy == proxyV1 || m.proxy == proxyV2 {
		if err := introduce(c, by, m.proxy, client, public); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

// connect connects to the target.
func (m *mapping) connect(by time.Time) (net.Conn, error) {
	d := net.Dialer{KeepAlive: -1, Control: localdial.Control}
	if !m.lookedUp() {
		return d.DialContext(until{context.Background(), by}, m.network, m.address)
	}
	ctx, cancel := context.WithDeadline(context.Background(), by)
	defer cancel()
	return d.DialContext(ctx, m.network, m.address)
}

// introduce sends a PROXY header. It is done before any byte of the client's is read, and
// leaves the connection without a deadline.
func introduce(c net.Conn, by time.Time, v proxyVersion, client, public net.Addr) error {
	if err := c.SetWriteDeadline(by); err != nil {
		return err
	}
	if _, err := c.Write(v.appendHeader(nil, client, public)); err != nil {
		return err
	}
	return c.SetWriteDeadline(time.Time{})
}

// until is a context that ends at a time, which only what asks for that notices: connecting
// does, and looking up a name in the network may not. Nothing has to watch it, as package
// net has a goroutine do with one that can be canceled: for short connections that is a
// twentieth of what they cost.
type until struct {
	context.Context
	at time.Time
}

func (u until) Deadline() (time.Time, bool) { return u.at, true }
