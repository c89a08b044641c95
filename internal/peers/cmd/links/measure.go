package main

import (
	"context"
	"fmt"
	"time"

	"github.com/tcprelay/relay/internal/peers/parts"
)

// background clients read as much as they can beside an interactive one, and as many have
// stopped reading.
const background = 8

// A job is what clients do. Those that have stopped reading are on the same session.
type job struct {
	name          string
	kind          string // of parts.Load
	bulk, stalled int
}

var allJobs = []job{
	{"down", "down", 0, 0},
	{"up", "told up", 0, 0},
	{"down, beside a stalled reader", "down", 0, 1},
	{"up, beside a stalled reader", "told up", 0, 1},
	{"interactive", "trips", background, background},
}

func (j job) interactive() bool { return j.kind == "trips" }

// runsOver says whether a job is measured over a link: an interactive one only over those
// where the link, and not the machine, is what the bulk beside it fills.
func (j job) runsOver(l line) bool {
	return !j.interactive() || l.bits <= 100e6 && l.rtt <= 100*time.Millisecond
}

// A measurement is what a job over a chain came to.
type measurement struct {
	bits     float64 // per second
	p50, p99 time.Duration
}

func (m measurement) String() string {
	if m.bits > 0 {
		return fmt.Sprintf("%.1f Mbit/s", m.bits/1e6)
	}
	return fmt.Sprintf("p50 %v p99 %v", m.p50, m.p99)
}

func measure(ctx context.Context, b *parts.Bench, c chain, at cell, length time.Duration) (m measurement, err error) {
	load := parts.Load{Kind: at.job.kind, N: 1, For: length, Bulk: at.job.bulk, Stalled: at.job.stalled}
	load.Warm = max(2*time.Second, 20*at.link.rtt) // what is not at its speed by then stays slow
	if at.job.interactive() {
		load.For = max(length, 100*at.link.rtt) // or p99 would be the worst of a few
	}
	ctx, cancel := context.WithTimeout(ctx, load.Warm+load.For+time.Minute)
	defer cancel()
	r := &parts.Running{Bench: b, Ctx: ctx}
	defer r.End()
	addr, err := c.start(r, at.link)
	if err != nil {
		return m, err
	}
	rep, err := r.Load(addr, load, func() {}, func() {})
	if err != nil {
		return m, err
	}
	if at.job.interactive() {
		return measurement{p50: rep.P50, p99: rep.P99}, nil
	}
	return measurement{bits: float64(rep.Count) * 8 / rep.Seconds}, nil
}
