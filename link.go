package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/tcprelay/relay/internal/dedicated"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/pulse"
	"github.com/tcprelay/relay/internal/socket"
	"github.com/tcprelay/relay/internal/wire"
)

// errDraining says that the relay gives a session no more clients.
var errDraining = errors.New("the relay is going away")

// A link is the app's side of a session with the relay. A listener has one after the
// other, and for a while two when the relay asks for another one.
type link struct {
	l           *Listener
	sess        *mux.Session
	control     *mux.Stream
	lines       *wire.Reader // of control
	pulse       *pulse.Pulse
	closed      chan struct{} // closed when the relay has said that no more clients come
	heardClosed bool          // the hearing goroutine's

	dialing     context.Context // ends when no more dedicated connections are wanted
	stopDialing context.CancelFunc
	dials       chan struct{} // bounds those being opened

	// Guarded by Listener.mu.
	registered bool
	unfit      bool                     // connections to the relay are no good for it
	spares     int                      // dedicated connections without a client, or being opened
	dedicated  map[*dedicated.Conn]bool // all there are: whether Accept has returned it
}

func (l *Listener) newLink(conn net.Conn) *link {
	k := &link{
		l:         l,
		sess:      mux.Client(conn, mux.Config{Accept: l.streams}),
		closed:    make(chan struct{}),
		dials:     make(chan struct{}, maxDials),
		dedicated: make(map[*dedicated.Conn]bool),
	}
	k.dialing, k.stopDialing = context.WithCancel(context.Background())
	k.sess.EnableStop()
	l.mu.Lock()
	l.links[k.sess] = k
	l.mu.Unlock()
	return k
}

// drop ends a link, if it has not ended, and takes it out of the listener's books. It
// waits a moment for a relay that takes nothing.
func (k *link) drop() {
	if k.pulse != nil {
		k.pulse.Stop()
	}
	k.sess.Close()
	k.dropDedicated()
	k.l.mu.Lock()
	defer k.l.mu.Unlock()
	delete(k.l.links, k.sess)
	k.l.refused += k.sess.Refused()
	k.l.offered += k.sess.Offered()
}

// tlsClient makes conn a TLS connection, verified for the host in addr unless the
// config names another.
func tlsClient(ctx context.Context, conn net.Conn, addr string, config *tls.Config) (net.Conn, error) {
	if config.ServerName == "" {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			host = addr
		}
		// What is no name is not one to send to who does not verify it: an address that
		// means something to a dialer of the user's.
		if _, err := netip.ParseAddr(host); err == nil || !config.InsecureSkipVerify || checkHostname(strings.ToLower(host)) == nil {
			config = config.Clone()
			config.ServerName = host
		}
	}
	tc := tls.Client(&socket.Under{Conn: conn}, config)
	if err := tc.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return tc, nil
}

// isAlert reports that the relay refused us after our side of the TLS handshake was
// over, as it does when our certificate is not what it wants. The error of crypto/tls
// has no type of its own.
func isAlert(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error"
}

// sayHello opens the control stream with the hello and waits for the reply.
func (k *link) sayHello(ctx context.Context, hello wire.Hello) (*wire.Reply, error) {
	line, err := wire.Line(hello)
	if err != nil {
		return nil, err
	}
	if k.control, err = k.sess.Open(line); err != nil {
		return nil, err
	}
	stop := cutShort(ctx, k.control)
	k.lines = wire.NewReader(k.control)
	var reply wire.Reply
	err = k.lines.Read(&reply)
	if late := stop(); late != nil {
		err = late
	}
	if err != nil {
		return nil, err
	}
	if reply.Error == nil && reply.Version != wire.Version {
		return nil, fmt.Errorf("reply of version %d", reply.Version)
	}
	return &reply, nil
}

// startPulse watches the session. Often is how often the relay wants to hear
// something.
func (k *link) startPulse(often time.Duration) {
	h := k.l.cfg.heartbeat.with(often)
	k.pulse = pulse.Start(k.sess, pulse.Config{
		Interval: h.interval,
		Dead:     h.dead,
		Trip:     k.sess.Trip,
		Ping:     func(id int64) { k.say(wire.Control{Type: wire.Ping, ID: id}) },
		Lost:     func(err error) { k.sess.CloseWithError(mux.NoError, err) },
	})
	k.pulse.Ask() // while nothing else is on its way
}

// serve handles what the relay says until the session is over, and returns why, for the
// caller to drop the link, or until the relay gives it no more clients, and returns
// errDraining: the session goes on by itself then.
func (k *link) serve() error {
	for {
		c, err := k.hear()
		if err == nil && c.Type == wire.Drain {
			k.stopDialing()
			k.l.drained.Go(k.serveDraining)
			return errDraining
		}
		if err != nil {
			return err
		}
	}
}

// serveDraining is serve for a session that gets no more clients.
func (k *link) serveDraining() {
	for {
		if _, err := k.hear(); err != nil {
			k.drop()
			return
		}
	}
}

// hear reads the relay's next words and does what they ask for. After an error the
// session is over.
func (k *link) hear() (c wire.Control, err error) {
	if err = k.lines.Read(&c); err == nil {
		switch c.Type {
		case wire.Ping:
			k.say(wire.Control{Type: wire.Pong, ID: c.ID})
		case wire.Pong:
			k.pulse.Pong(c.ID)
		case wire.Closed:
			if !k.heardClosed {
				k.heardClosed = true
				close(k.closed)
				k.stopDialing()
			}
		case wire.Open:
			k.openSpares(c.Secrets)
		case wire.End:
			if c.Error == nil {
				c.Error = &wire.Error{Code: wire.CodeDisconnected}
			}
			err = &RegisterError{Addr: k.l.relay, Code: Code(c.Error.Code), Message: c.Error.Message}
		}
		return c, err
	}
	if err != io.EOF && k.sess.Err() == nil { // otherwise it has ended, perhaps taking its time
		k.sess.CloseWithError(mux.ProtocolError, fmt.Errorf("control stream: %w", err))
	}
	<-k.sess.Done() // the relay says no more, but may still take what clients were sent
	return c, notOurs(k.sess.Err())
}

// sayClose has the relay send no more clients, however long it takes to say.
func (k *link) sayClose() {
	for errors.Is(k.say(wire.Control{Type: wire.Close}), os.ErrDeadlineExceeded) {
	}
}

// say gives up after sayTime. What else goes wrong ends the session, which its reader
// tells.
func (k *link) say(c wire.Control) error {
	line, err := wire.Line(c)
	if err != nil {
		return err
	}
	k.control.SetWriteDeadline(time.Now().Add(sayTime))
	_, err = k.control.Write(line)
	return err
}

// close tells the relay to send no more clients. When those that there are have left,
// and taken all that was sent to them, the relay ends the session.
func (k *link) close() {
	k.sess.RefuseStreams()
	go k.sayClose() // which may have to wait for the relay
}
