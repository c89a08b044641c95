package main

import (
	"context"
	"fmt"
	"time"

	"github.com/tcprelay/relay/internal/peers/parts"
)

// A measurement is what a job over a chain came to.
type measurement struct {
	rate     float64 // per second
	cpu      float64 // seconds of all carriers, per unit
	p50, p99 time.Duration
	memory   map[string]float64 // bytes per client, by role
}

func (m measurement) String() string {
	s := fmt.Sprintf("%.4g/s cpu %.3g p50 %v p99 %v", m.rate, m.cpu, m.p50, m.p99)
	for role, n := range m.memory {
		s += fmt.Sprintf(" %s %.1f KiB", role, n/1024)
	}
	return s
}

const (
	warmUp     = 300 * time.Millisecond
	background = 8 // bulk conns, and as many stopped ones, beside the interactive one
)

func measure(ctx context.Context, b *parts.Bench, c chain, j job, length time.Duration) (m measurement, err error) {
	ctx, cancel := context.WithTimeout(ctx, length+2*time.Minute)
	defer cancel()
	r := &parts.Running{Bench: b, Ctx: ctx}
	defer r.End()
	addr, err := c.start(r)
	if err != nil {
		return m, err
	}
	load := parts.Load{Kind: j.kind, N: j.n, Warm: warmUp, For: length}
	if j.kind == "mixed" {
		load.Kind, load.Bulk, load.Stalled = "trips", background, background
	}
	carriers := r.Procs
	var cpu float64
	rss := make(map[string]float64)
	rep, err := r.Load(addr, load, func() {
		for _, p := range carriers {
			if p.Role != "" {
				cpu -= p.CPU()
				rss[p.Role] -= p.RSS()
			}
		}
	}, func() {
		for _, p := range carriers {
			if p.Role != "" {
				cpu += p.CPU()
				rss[p.Role] += p.RSS()
			}
		}
	})
	if err != nil {
		return m, err
	}
	m = measurement{rate: float64(rep.Count) / rep.Seconds, cpu: cpu / float64(rep.Count), p50: rep.P50, p99: rep.P99}
	if j.kind == "idle" {
		m.memory = make(map[string]float64)
		for role, n := range rss {
			m.memory[role] = n / float64(rep.Count)
		}
	}
	return m, nil
}
