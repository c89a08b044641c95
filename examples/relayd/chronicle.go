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
	happened   []relay.Event
	plots      map[serviceKey]*plot
	sampled    time.Time
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
	in, out []float64
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
		if len(c.happened) == maxHappenings {
			c.happened = append(c.happened[:0], c.happened[1:]...)
		}
		c.happened = append(c.happened, ev)
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
			p.in = appendPoint(p.in, float64(s.BytesIn-p.last.in)/seconds)
			p.out = appendPoint(p.out, float64(s.BytesOut-p.last.out)/seconds)
		}
		p.last = moved{s.BytesIn, s.BytesOut}
		plots[keyOf(s)] = p
	}
	c.plots = plots
}

func appendPoint(plot []float64, v float64) []float64 {
	if len(plot) == points {
		plot = append(plot[:0], plot[1:]...)
	}
	return append(plot, v)
}

// total returns what was moved since the start, given what is connected now.
func (c *chronicle) total(services []relay.ServiceInfo) moved {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.left
	for i := range services {
		for _, client := range services[i].Clients {
			now.in += client.BytesIn
			now.out += client.BytesOut
		}
	}
	// Who left between the snapshot and here counts twice, until the next time.
	c.most = moved{max(c.most.in, now.in), max(c.most.out, now.out)}
	return c.most
}
