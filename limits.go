package relay

import (
	"fmt"
	"time"

	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/nofile"
	"github.com/tcprelay/relay/internal/wire"
)

// Limits bound what services and clients may take of a relay. They are set for a
// server ([WithLimits]), and some of them for an identity ([Grant]).
//
// For every field zero means the default and a negative number no limit. What is over
// a limit is refused or reset at once, counted under the name given below
// ([Server.Refusals], [ServiceInfo]), and logged, at most once a second for each name.
type Limits struct {
	// A connection to a registration listener has HandshakeTime, by default 10 s, for
	// everything up to the relay's reply ("handshake"). Its hello may have HelloSize
	// bytes, by default and at most 16 KiB ("malformed"). Pending of them may be at it
	// at once, by default 256 ("pending"), and PendingPerIP of one IP address, by
	// default 64 ("pending_per_ip"). A client that comes by a host ([Server.ServeHosts])
	// has HandshakeTime and HelloSize too, to say which ("greeting").
	HandshakeTime time.Duration
	HelloSize     int
	Pending       int
	PendingPerIP  int

	// Services bounds the public addresses, of the server or of an identity, with those
	// that are closed and still have clients or a session. By default there is no limit
	// but that of the ports ("server_full").
	Services int

	// AppsPerService bounds the apps that share one public address, with those that are
	// leaving, or were lost and have still time to come back, by default to 1,000
	// ("server_full").
	AppsPerService int

	// Clients bounds the clients connected at once, of the server or of an identity.
	// By default it is 80 % of the files that the process may have open for the
	// server, and none for an identity ("clients"). ClientsPerIP bounds those of one
	// IP address, by default not ("clients_per_ip"), and ClientsPerService those of
	// one public address, by default to 10,000 ("clients_per_service").
	Clients           int
	ClientsPerIP      int
	ClientsPerService int

	// A client that comes while the app is away, or does not answer, waits for it,
	// WaitTime at most, by default 10 s ("waited"; negative: it does not wait for an app
	// that is away, and 5 s for an answer), with at most Waiting others of its service,
	// by default 1,000 ("waiting").
	WaitTime time.Duration
	Waiting  int

	// BytesPerSecond is what all clients of a service together may move, and
	// ClientBytesPerSecond what one may, in each direction. By default there is no
	// limit. Nobody is refused for it: bytes wait.
	BytesPerSecond       int64
	ClientBytesPerSecond int64

	// A client is reset when no byte moved in either direction for IdleTime, by default
	// never ("idle"); when bytes waited for it and it took none for StallTime, by
	// default 5 min ("stalled"); when one side has half-closed and no byte moved for
	// LingerTime, by default 5 min ("lingered"). They are looked after several times in
	// each such time, or every 15 s.
	IdleTime   time.Duration
	StallTime  time.Duration
	LingerTime time.Duration

	// Of bytes that a client has not taken yet the server holds 256 KiB, or up to
	// ClientUnread if the client was seen to keep up, by default 40 MiB. Of those of a
	// session it holds SessionUnread, by default 256 MiB: beyond that a client whose
	// bytes have waited for long is reset ("unread"). Negative: the default.
	ClientUnread  int
	SessionUnread int
}

var defaultLimits = Limits{
	HandshakeTime:     handshakeTimeout,
	HelloSize:         wire.MaxLine,
	Pending:           256,
	PendingPerIP:      64,
	AppsPerService:    1000,
	ClientsPerService: 10_000,
	WaitTime:          10 * time.Second,
	Waiting:           1000,
	StallTime:         5 * time.Minute,
	LingerTime:        5 * time.Minute,
}

func (l Limits) validate() error {
	if l.HelloSize > wire.MaxLine {
		return fmt.Errorf("relay: Limits.HelloSize %d: the protocol has %d at most", l.HelloSize, wire.MaxLine)
	}
	return nil
}

// or returns l with the fields of d where it has zero.
func (l Limits) or(d Limits) Limits {
	for _, f := range []struct{ v, d *int }{
		{&l.HelloSize, &d.HelloSize}, {&l.Pending, &d.Pending}, {&l.PendingPerIP, &d.PendingPerIP},
		{&l.Services, &d.Services}, {&l.AppsPerService, &d.AppsPerService}, {&l.Clients, &d.Clients}, {&l.ClientsPerIP, &d.ClientsPerIP},
		{&l.ClientsPerService, &d.ClientsPerService}, {&l.Waiting, &d.Waiting},
		{&l.ClientUnread, &d.ClientUnread}, {&l.SessionUnread, &d.SessionUnread},
	} {
		if *f.v == 0 {
			*f.v = *f.d
		}
	}
	for _, f := range []struct{ v, d *time.Duration }{
		{&l.HandshakeTime, &d.HandshakeTime}, {&l.WaitTime, &d.WaitTime},
		{&l.IdleTime, &d.IdleTime}, {&l.StallTime, &d.StallTime}, {&l.LingerTime, &d.LingerTime},
	} {
		if *f.v == 0 {
			*f.v = *f.d
		}
	}
	for _, f := range []struct{ v, d *int64 }{
		{&l.BytesPerSecond, &d.BytesPerSecond}, {&l.ClientBytesPerSecond, &d.ClientBytesPerSecond},
	} {
		if *f.v == 0 {
			*f.v = *f.d
		}
	}
	return l
}

// fileBudget is how many of the process's files clients may take, with the connections
// that are dedicated to them; some are for other things. 0: there is no limit.
func fileBudget() int { return nofile.Limit() / 10 * 8 }

// outOfFiles reports that another client, or another dedicated connection, would be over
// the budget.
func (s *Server) outOfFiles() bool {
	files := fileBudget()
	return files > 0 && s.clients.Held(holder{})+int(s.dedicated.Load()) >= files
}

// forServer completes a server's limits.
func (l Limits) forServer() Limits {
	if l.Clients == 0 {
		l.Clients = fileBudget()
	}
	l = l.or(defaultLimits)
	if l.HelloSize < 0 {
		l.HelloSize = wire.MaxLine
	}
	return l
}

// session returns what a session of the server's may hold.
func (l Limits) session() mux.Config {
	// Room for the control stream, and for one more that comes with it: member.run
	// makes a protocol error of that one too.
	return mux.Config{Backlog: 2, MaxWindow: l.ClientUnread, MaxUnread: l.SessionUnread}
}

// sweepEvery returns how often a service's clients are looked after, 0 for never.
func (l Limits) sweepEvery() time.Duration {
	var least time.Duration
	for _, d := range []time.Duration{l.IdleTime, l.StallTime, l.LingerTime} {
		if d > 0 && (least == 0 || d < least) {
			least = d
		}
	}
	if least == 0 {
		return 0
	}
	return min(max(least/8, 10*time.Millisecond), 15*time.Second)
}
