package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/tcprelay/relay/internal/peers/rounds"
)

// tables collects measurements.
type tables struct {
	plan     *plan
	got      map[key][]measurement // in the order of the rounds; zero if it failed
	failures []string
}

type key struct {
	at    cell
	chain string
}

func newTables(p *plan) *tables { return &tables{plan: p, got: make(map[key][]measurement)} }

func (t *tables) add(at cell, c chain, m measurement, err error) {
	k := key{at, c.name}
	if err != nil {
		m = measurement{}
		t.failures = append(t.failures, fmt.Sprintf("%v, %s, %s: %v", at.link, at.job.name, c.name, err))
	}
	t.got[k] = append(t.got[k], m)
}

// A column is one figure of a cell.
type column struct {
	title string
	at    cell
	of    func(m measurement) float64
	text  func(v float64) string
}

func megabits(v float64) string { return fmt.Sprintf("%.1f", v/1e6) }
func millis(v float64) string   { return fmt.Sprintf("%.1f ms", v*1e3) }

// markdown has a table for each link's bulk, and one for what is interactive.
func (t *tables) markdown() string {
	var b strings.Builder
	var trips []column
	for _, l := range allLinks {
		var bulk []column
		for _, at := range t.plan.cells {
			if at.link != l {
				continue
			}
			if !at.job.interactive() {
				bulk = append(bulk, column{at.job.name, at, func(m measurement) float64 { return m.bits }, megabits})
				continue
			}
			trips = append(trips,
				column{l.String() + ", p50", at, func(m measurement) float64 { return m.p50.Seconds() }, millis},
				column{l.String() + ", p99", at, func(m measurement) float64 { return m.p99.Seconds() }, millis})
		}
		t.write(&b, l.String()+": Mbit/s of one stream", bulk)
	}
	t.write(&b, "round trips beside bulk", trips)
	return b.String()
}

func (t *tables) write(b *strings.Builder, title string, columns []column) {
	if len(columns) == 0 {
		return
	}
	fmt.Fprintf(b, "\n| %s |", title)
	for _, c := range columns {
		fmt.Fprintf(b, " %s |", c.title)
	}
	b.WriteString("\n|---|" + strings.Repeat("---:|", len(columns)) + "\n")
	for _, chain := range t.plan.chains {
		fmt.Fprintf(b, "| %s |", chain.name)
		for _, c := range columns {
			fmt.Fprintf(b, " %s |", t.cell(c, chain.name))
		}
		b.WriteByte('\n')
	}
}

// values are a chain's in the order of the rounds; 0 where it failed.
func (t *tables) values(c column, chain string) []float64 {
	var values []float64
	for _, m := range t.got[key{c.at, chain}] {
		values = append(values, c.of(m))
	}
	return values
}

func (t *tables) cell(c column, chain string) string {
	values := t.values(c, chain)
	good := slices.DeleteFunc(slices.Clone(values), func(v float64) bool { return v == 0 })
	if len(good) == 0 {
		return "–"
	}
	s := c.text(rounds.Median(good))
	if r, ok := rounds.Ratio(values, t.values(c, baseline)); ok && chain != baseline {
		s += fmt.Sprintf(" (%.2f×)", r)
	}
	return s
}
