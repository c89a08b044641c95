package relay

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"github.com/tcprelay/relay/internal/dedicated"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

const (
	// maxDials bounds the dedicated connections that are being opened at once, whatever a
	// relay asks for.
	maxDials = 64
	// maxWaiting bounds those that a relay can have an app open and not use.
	maxWaiting = 1000
)

var errUnfit = errors.New("the connection has no half-close, or cannot be reset")

// An arrival is a client that came by a connection of its own.
type arrival struct {
	k        *link
	d        *dedicated.Conn
	src, dst *net.TCPAddr
}

// openSpares opens the connections that the relay asks for, a goroutine for each, which
// ends when its connection has a client, or will have none.
func (k *link) openSpares(secrets []wire.Secret) {
	var declined []wire.Secret
	k.l.mu.Lock()
	for _, secret := range secrets {
		if k.l.cfg.dedicated < 0 || k.unfit || k.spares >= maxWaiting || k.sess.Err() != nil {
			declined = append(declined, secret)
			continue
		}
		k.spares++
		go k.spare(secret)
	}
	k.l.mu.Unlock()
	if declined != nil {
		k.unopened(declined) // and hears no more before it is said
	}
}

// spare opens a connection and waits until the relay gives it a client.
func (k *link) spare(secret wire.Secret) {
	d, err := k.openSpare(secret)
	var a *arrival
	if err == nil {
		a, err = k.awaitClient(d)
	}
	if err != nil {
		k.unopened([]wire.Secret{secret})
	}
	k.l.mu.Lock()
	k.spares--
	if err == nil {
		k.l.offered++ // in one step: Drain must not miss it
	}
	k.l.mu.Unlock()
	if err != nil {
		return
	}
	select {
	case k.l.arrivals <- a:
	default:
		k.l.turnAway(a)
	}
}

// openSpare opens a connection to the relay at the other end of the session: one of
// several with the same name would not know the secret.
func (k *link) openSpare(secret wire.Secret) (*dedicated.Conn, error) {
	select {
	case k.dials <- struct{}{}:
	case <-k.dialing.Done():
	}
	if err := context.Cause(k.dialing); err != nil {
		return nil, err
	}
	defer func() { <-k.dials }()
	// Once begun it is gone through with: a relay that does not need it any more knows
	// its secret, but would take one that says nothing for a stranger's.
	ctx, cancel := context.WithTimeoutCause(context.Background(), handshakeTimeout, os.ErrDeadlineExceeded)
	defer cancel()
	at := k.l.relay
	if addr, ok := k.sess.RemoteAddr().(*net.TCPAddr); ok && k.l.cfg.dial == nil {
		at = addr.String()
	}
	conn, rerr := k.l.dial(ctx, at)
	if rerr == nil {
		conn, rerr = k.l.secure(ctx, conn)
	}
	if rerr != nil {
		return nil, rerr
	}
	var d *dedicated.Conn
	d = dedicated.New(conn, func() {
		k.l.mu.Lock()
		delete(k.dedicated, d)
		k.l.mu.Unlock()
	})
	if d == nil {
		conn.Close()
		k.l.mu.Lock()
		k.unfit = true
		k.l.mu.Unlock()
		return nil, errUnfit
	}
	defer context.AfterFunc(ctx, func() { conn.SetWriteDeadline(time.Unix(1, 0)) })()
	if _, err := conn.Write(wire.AppendPreface(nil, secret)); err != nil {
		d.Fail(err)
		return nil, err
	}
	k.l.mu.Lock()
	k.dedicated[d] = false
	k.l.mu.Unlock()
	if k.sess.Err() != nil { // drop may have come before
		d.Refuse()
	}
	return d, nil
}

// awaitClient waits for what the relay sends in front of a client's bytes.
func (k *link) awaitClient(d *dedicated.Conn) (*arrival, error) {
	header, err := d.Await()
	var src, dst *net.TCPAddr
	if err == nil {
		_, src, dst, err = wire.ParseProxy(header)
	}
	if err != nil {
		d.Fail(err)
		return nil, err
	}
	return &arrival{k, d, src, dst}, nil
}

// unopened tells the relay that there will be no connections for some secrets, unless it
// knows: it has closed them because it will not need them.
func (k *link) unopened(secrets []wire.Secret) {
	if k.dialing.Err() == nil && k.sess.Err() == nil {
		k.say(wire.Control{Type: wire.Unopened, Secrets: secrets})
	}
}

// dropDedicated ends the connections of a session that has ended. Those that nobody has
// accepted are refused, in case the relay has given one a client meanwhile. Those of
// clients fail with the session's error, unless the relay ended it in order: it has
// carried everything then, and what it sent last may still be unread here.
func (k *link) dropDedicated() {
	k.stopDialing()
	err := k.sess.Err()
	var se *mux.SessionError
	inOrder := errors.As(err, &se) && se.Remote && se.Code == mux.NoError
	var refuse, fail []*dedicated.Conn
	k.l.mu.Lock()
	for d, taken := range k.dedicated {
		if !taken {
			refuse = append(refuse, d)
		} else if !inOrder {
			fail = append(fail, d)
		}
	}
	k.l.mu.Unlock()
	for _, d := range refuse {
		d.Refuse()
	}
	for _, d := range fail {
		d.Fail(notOurs(err))
	}
}

// turnAway has the relay give a client to somebody else, or reset it.
func (l *Listener) turnAway(a *arrival) {
	a.d.Refuse()
	l.countRefused()
}
