package main

import (
	"context"
	"time"
)

// A client uses the service over one connection at a time. When a connection fails, the
// failure is counted and the client goes on with another.
type client struct {
	*params
	id          int // from 0
	meter       *meter
	shard       *shard // of the meter
	schedule    schedule
	connections int    // so far
	out, in     []byte // of its links, one after the other
}

func newClient(p *params, m *meter, id int) *client {
	size := min(p.size, 64<<10)
	c := &client{params: p, id: id, meter: m, shard: m.shard(id), out: make([]byte, size), in: make([]byte, size)}
	if p.rate > 0 {
		c.schedule.period = time.Duration(float64(time.Second) / p.rate)
		c.schedule.phase = c.schedule.period / time.Duration(p.clients) * time.Duration(id)
	}
	return c
}

// run uses the service until ctx ends, and then to the end of what it has begun: to cut
// off a message that is late would hide that it is.
func (c *client) run(ctx context.Context) {
	start := time.Duration(float64(c.ramp) / float64(c.clients) * float64(c.id))
	if !sleep(ctx, start) {
		return
	}
	c.schedule.begin()
	for ctx.Err() == nil {
		if err := c.connect(ctx); err != nil {
			sleep(ctx, c.pause)
		}
	}
	<-c.meter.ended // as ctx has
	due := c.schedule.due(c.meter.start.Add(c.meter.span))
	c.meter.due.Add(due)
	c.meter.unsent.Add(max(due-c.schedule.sent, 0))
}

// connect opens a connection and uses it. What fails is counted.
func (c *client) connect(ctx context.Context) (err error) {
	var due time.Time
	if c.mode == connections {
		// Connecting is a part of what is measured.
		var ok bool
		if due, ok = c.schedule.next(ctx); !ok {
			return nil
		}
	}
	local := ""
	defer func() {
		if err != nil {
			c.meter.fail(c.id, local, err)
		}
	}()
	// Not ctx: that it takes long to connect shall be seen at the end of the run, too.
	conn, err := c.dial(context.Background())
	if err != nil {
		return &connectError{err}
	}
	defer conn.Close()
	local = conn.LocalAddr().String()
	c.meter.connected.Add(1)
	defer c.meter.connected.Add(-1)
	c.meter.connections.Add(1)

	bytes := newPayload(c.seed, c.id, c.connections)
	c.connections++
	l := &link{conn: conn, timeout: c.timeout, sent: bytes, expected: bytes, out: c.out, in: c.in, meter: c.shard}
	switch c.mode {
	case bulk:
		return c.stream(ctx, l)
	case connections:
		return c.once(l, due)
	}
	return c.roundTrips(ctx, l)
}

// once sends the only message of a connection.
func (c *client) once(l *link, due time.Time) error {
	err := l.exchange(c.size, true)
	if err == nil {
		c.shard.record(time.Since(due))
	}
	return err
}

// roundTrips sends one message after the other, each when the last has come back.
func (c *client) roundTrips(ctx context.Context, l *link) error {
	for {
		due, ok := c.schedule.next(ctx)
		if !ok {
			return nil
		}
		if err := l.exchange(c.size, false); err != nil {
			return err
		}
		c.shard.record(time.Since(due))
	}
}

// stream sends messages while those that were sent come back, up to -inflight of them on
// their way. When ctx ends it half-closes, and expects the rest and then the end.
func (c *client) stream(ctx context.Context, l *link) error {
	room := make(chan struct{}, c.inflight) // holds as many as are on their way
	due := make(chan time.Time, c.inflight) // when those were to be sent; closed after the last
	send := func(ctx context.Context) error {
		defer close(due)
		for {
			select {
			case room <- struct{}{}:
			case <-ctx.Done():
				return l.finish()
			}
			at, ok := c.schedule.next(ctx)
			if !ok {
				return l.finish()
			}
			due <- at
			if err := l.send(c.size, false); err != nil {
				return err
			}
		}
	}
	receive := func() error {
		for at := range due {
			if err := l.receive(c.size, false); err != nil {
				return err
			}
			c.shard.record(time.Since(at))
			<-room
		}
		return l.receive(0, true)
	}
	return l.duplex(ctx, send, receive)
}

// A schedule says when a client's messages are to be sent. Those that a slow service has
// delayed stay due when they were, and are sent as soon as they can be: a message is late
// by all that it had to wait, or else a service that stalls for a second would spoil the
// figures of one message, and not of all that should have been sent in that second.
type schedule struct {
	period time.Duration // 0 if each message is due as soon as it can be sent
	phase  time.Duration // of the first one, which has the clients take turns
	first  time.Time     // when that is due; zero before begin is called
	sent   int64
}

// begin has the first message be due a phase from now, whether there is a connection by
// then or not.
func (s *schedule) begin() { s.first = time.Now().Add(s.phase) }

// next waits for the time of the next message and returns it; without a period it is the
// present. It reports false if ctx has ended.
func (s *schedule) next(ctx context.Context) (due time.Time, ok bool) {
	now := time.Now()
	if s.period == 0 {
		return now, ctx.Err() == nil
	}
	due = s.first.Add(time.Duration(s.sent) * s.period)
	if !sleep(ctx, due.Sub(now)) {
		return due, false
	}
	s.sent++
	return due, true
}

// due returns how many messages were due by then; without a period there are none.
func (s *schedule) due(by time.Time) int64 {
	if s.period == 0 || by.Before(s.first) {
		return 0
	}
	return int64(by.Sub(s.first)/s.period) + 1
}

// sleep waits for d, or until ctx ends, and reports whether it has not.
func sleep(ctx context.Context, d time.Duration) bool {
	if d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	return ctx.Err() == nil
}
