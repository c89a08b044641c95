package main

import (
	"sync"
	"time"

	"github.com/tcprelay/relay"
)

const (
	// sampleTime is how far the points of a plot are apart, and points how many there are.
	sampleTime = 2 * time.Second
	points     = 150

	// maxHappenings is how many events the page shows.
	maxHappenings = 50
)

// A chronicle keeps what a snapshot of the relay does not tell: totals since the start,
// what happened to services last, and how much each moved when.
type chronicle struct {
	since time.Time

	mu         sync.Mutex
	registered int64
	clients    int64
	left       moved // by clients that have left
	most       moved // that totals were said to be: they do not shrink
	happened   []happening
	plots      map[serviceKey]*plot
	sampled    time.Time
}

// A happening is an event, the last of several of its kind in a row.
type happening struct {
	relay.Event
	times int
}

// moved are bytes, from clients to apps and back.
type moved struct{ in, out int64 }

// A serviceKey tells services apart, also one that drains from its successor.
type serviceKey struct {
	name  string
	since time.Time
}

func keyOf(s *relay.ServiceInfo) serviceKey { return serviceKey{s.Name, s.Since} }

// A plot is how many bytes a second a service moved at the last samples, oldest first.
type plot struct {
	last    moved // at the last sample, in all
	in, out []int64
}

func newChronicle(now time.Time) *chronicle {
	return &chronicle{since: now, plots: make(map[serviceKey]*plot)}
}

// note is for relay.WithEvents.
func (c *chronicle) note(ev relay.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch ev.Kind {
	case relay.EventClient:
		c.clients++
	case relay.EventClientLeft:
		c.left.in += ev.BytesIn
		c.left.out += ev.BytesOut
	case relay.EventClientRefused:
	default:
		if ev.Kind == relay.EventRegistered {
			c.registered++
		}
		// One after the other, refusals are one line: strangers may make any number.
		if last := len(c.happened) - 1; ev.Kind == relay.EventRefused && last >= 0 && c.happened[last].Kind == relay.EventRefused {
			c.happened[last] = happening{ev, c.happened[last].times + 1}
			return
		}
		if len(c.happened) == maxHappenings {
			c.happened = append(c.happened[:0], c.happened[1:]...)
		}
		c.happened = append(c.happened, happening{ev, 1})
	}
}

// sample takes down what each service has moved since the last time.
func (c *chronicle) sample(now time.Time, services []relay.ServiceInfo) {
	c.mu.Lock()
	defer c.mu.Unlock()
	seconds := now.Sub(c.sampled).Seconds()
	first := c.sampled.IsZero()
	c.sampled = now
	plots := make(map[serviceKey]*plot, len(services))
	for i := range services {
		s := &services[i]
		p := c.plots[keyOf(s)]
		if p == nil {
			p = new(plot) // a service that is new began at nothing
		}
		if !first && seconds > 0 {
			p.in = appendPoint(p.in, int64(float64(s.BytesIn-p.last.in)/seconds))
			p.out = appendPoint(p.out, int64(float64(s.BytesOut-p.last.out)/seconds))
		}
		p.last = moved{s.BytesIn, s.BytesOut}
		plots[keyOf(s)] = p
	}
	c.plots = plots
}

func appendPoint(plot []int64, v int64) []int64 {
	if len(plot) == points {
		plot = append(plot[:0], plot[1:]...)
	}
	return append(plot, v)
}

// gone returns what clients that have left had moved. It is asked for before a snapshot:
// one who leaves in between is missing for a moment, and not counted twice.
func (c *chronicle) gone() moved {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.left
}

// total returns what was moved since the start, by those who were gone before a snapshot
// and those in it. It does not shrink.
func (c *chronicle) total(gone moved, services []relay.ServiceInfo) moved {
	now := gone
	for i := range services {
		for _, client := range services[i].Clients {
			now.in += client.BytesIn
			now.out += client.BytesOut
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.most = moved{max(c.most.in, now.in), max(c.most.out, now.out)}
	return c.most
}
