package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tcprelay/relay/internal/peers/rounds"
)

// A job is what load does over a chain.
type job struct {
	name string
	kind string
	n    int
}

func allJobs(idle int) []job {
	return []job{
		{"bulk up, 1 conn", "up", 1},
		{"bulk up, 8 conns", "up", 8},
		{"bulk down, 1 conn", "down", 1},
		{"bulk down, 8 conns", "down", 8},
		{"round trips, 1 conn", "trips", 1},
		{"round trips, 64 conns", "trips", 64},
		{"connect, 16 at once", "connect", 16},
		{"connect, 256 at once", "connect", 256},
		{fmt.Sprintf("idle, %d clients", idle), "idle", idle},
		{"round trips beside bulk", "mixed", 1},
	}
}

// A figure is a column of a job's table.
type figure struct {
	name         string
	moreIsBetter bool
	of           func(m measurement) float64
	text         func(v float64) string
}

func rate(m measurement) float64 { return m.rate }
func cpu(m measurement) float64  { return m.cpu }

func thousands(v float64) string { return fmt.Sprintf("%.1fk", v/1e3) }
func micros(v float64) string    { return fmt.Sprintf("%.0f µs", v*1e6) }

func percentile(of func(m measurement) time.Duration) func(m measurement) float64 {
	return func(m measurement) float64 { return of(m).Seconds() }
}

func figuresOf(j job) []figure {
	p50 := figure{"p50", false, percentile(func(m measurement) time.Duration { return m.p50 }), micros}
	p99 := figure{"p99", false, percentile(func(m measurement) time.Duration { return m.p99 }), micros}
	switch j.kind {
	case "up", "down":
		return []figure{
			{"Gbit/s", true, rate, func(v float64) string { return fmt.Sprintf("%.1f", v*8/1e9) }},
			{"CPU s/GB", false, cpu, func(v float64) string { return fmt.Sprintf("%.2f", v*1e9) }},
		}
	case "trips":
		return []figure{{"per second", true, rate, thousands}, p50, p99, {"CPU each", false, cpu, micros}}
	case "connect":
		return []figure{{"per second", true, rate, thousands}, {"CPU each", false, cpu, micros}}
	case "mixed":
		return []figure{p50, p99}
	}
	memory := func(role string) figure {
		return figure{role + ", KiB", false, func(m measurement) float64 { return m.memory[role] },
			func(v float64) string { return fmt.Sprintf("%.1f", v/1024) }}
	}
	return []figure{memory("relay"), memory("agent")}
}

// tables collects measurements.
type tables struct {
	jobs     []job
	chains   []chain
	got      map[string][]*measurement // by job and chain, in the order of the rounds; nil if it failed
	failures []string
}

func newTables(jobs []job, chains []chain) *tables {
	return &tables{jobs: jobs, chains: chains, got: make(map[string][]*measurement)}
}

func key(j job, chain string) string { return j.name + "|" + chain }

func (t *tables) add(j job, c chain, m measurement, err error) {
	k := key(j, c.name)
	if err != nil {
		t.got[k] = append(t.got[k], nil)
		t.failures = append(t.failures, fmt.Sprintf("%s, %s: %v", j.name, c.name, err))
		return
	}
	t.got[k] = append(t.got[k], &m)
}

// values are a chain's in the order of the rounds; 0 where it failed.
func (t *tables) values(j job, chain string, f figure) []float64 {
	all := t.got[key(j, chain)]
	values := make([]float64, len(all))
	for i, m := range all {
		if m != nil {
			values[i] = f.of(*m)
		}
	}
	return values
}

// ratio is the median of the rounds' ratios of a to b.
func (t *tables) ratio(j job, a, b string, f figure) (float64, bool) {
	return rounds.Ratio(t.values(j, a, f), t.values(j, b, f))
}

func (t *tables) markdown() string {
	var b strings.Builder
	for _, j := range t.jobs {
		figures := figuresOf(j)
		fmt.Fprintf(&b, "\n| %s |", j.name)
		for _, f := range figures {
			fmt.Fprintf(&b, " %s |", f.name)
		}
		b.WriteString("\n|---|" + strings.Repeat("---:|", len(figures)) + "\n")
		for _, c := range t.chains {
			if !c.does(j) {
				continue
			}
			fmt.Fprintf(&b, "| %s |", c.name)
			for _, f := range figures {
				fmt.Fprintf(&b, " %s |", t.cell(j, c.name, f))
			}
			b.WriteByte('\n')
		}
	}
	return b.String()
}

func (t *tables) cell(j job, chain string, f figure) string {
	values := slices.DeleteFunc(t.values(j, chain, f), func(v float64) bool { return v == 0 })
	if len(values) == 0 {
		return "–"
	}
	s := f.text(rounds.Median(values))
	if r, ok := t.ratio(j, chain, baseline, f); ok && chain != baseline {
		s += fmt.Sprintf(" (%.2f×)", r)
	}
	return s
}
