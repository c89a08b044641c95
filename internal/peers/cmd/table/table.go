package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/tcprelay/relay/internal/peers/rounds"
)

const (
	baseline = "plain" // every ratio is to this contender
	own      = "ours"  // and this one's also to the best of the others
)

// table collects measurements. Jobs and contenders keep the order in which they
// were first seen.
type table struct {
	jobs, contenders []string
	units            map[string]string // by job
	values           map[benchName][]float64
	failed           map[benchName]string
}

// newTable makes a table with rows and columns for what was found, whose values
// do not count.
func newTable(found []result) *table {
	t := &table{
		units:  make(map[string]string),
		values: make(map[benchName][]float64),
		failed: make(map[benchName]string),
	}
	for _, r := range found {
		if !slices.Contains(t.jobs, r.name.job) {
			t.jobs = append(t.jobs, r.name.job)
		}
		if !slices.Contains(t.contenders, r.name.contender) {
			t.contenders = append(t.contenders, r.name.contender)
		}
		if r.failure != "" {
			t.add(r)
		} else {
			t.units[r.name.job] = r.unit
		}
	}
	return t
}

func (t *table) add(r result) {
	if r.failure != "" {
		t.failed[r.name] = r.failure
		return
	}
	t.units[r.name.job] = r.unit
	t.values[r.name] = append(t.values[r.name], r.value)
}

// all returns a contender's values in the order of the rounds. One that failed in
// any round has none.
func (t *table) all(job, contender string) []float64 {
	name := benchName{job, contender}
	if t.failed[name] != "" {
		return nil
	}
	return t.values[name]
}

// ratio says how many times as good a is as b, within a round.
func (t *table) ratio(job, a, b string) (ratio float64, ok bool) {
	as, bs := t.all(job, a), t.all(job, b)
	if !units[t.units[job]].moreIsBetter {
		as, bs = bs, as
	}
	return rounds.Ratio(as, bs)
}

// toughestRival returns which of those that multiplex, as own does, leaves own the
// smallest ratio.
func (t *table) toughestRival(job string) (name string, ratio float64) {
	for _, c := range t.contenders {
		if c == baseline || c == own {
			continue
		}
		if r, ok := t.ratio(job, own, c); ok && (name == "" || r < ratio) {
			name, ratio = c, r
		}
	}
	return name, ratio
}

func (t *table) markdown() string {
	var b strings.Builder
	b.WriteString("| job |")
	for _, c := range t.contenders {
		fmt.Fprintf(&b, " %s |", c)
	}
	fmt.Fprintf(&b, " %s / best rival |\n|---|", own)
	b.WriteString(strings.Repeat("---:|", len(t.contenders)+1))
	b.WriteByte('\n')
	for _, job := range t.jobs {
		fmt.Fprintf(&b, "| %s |", strings.ReplaceAll(job, "/", ", "))
		for _, c := range t.contenders {
			fmt.Fprintf(&b, " %s |", t.cell(job, c))
		}
		fmt.Fprintf(&b, " %s |\n", t.verdict(job))
	}
	return b.String()
}

// cell is one contender's median, spread and ratio to the baseline.
func (t *table) cell(job, contender string) string {
	name := benchName{job, contender}
	if t.failed[name] != "" {
		return "failed"
	}
	values := t.all(job, contender)
	if len(values) == 0 {
		return "–"
	}
	mid := rounds.Median(values)
	s := quantity(mid, t.units[job])
	if len(values) > 1 {
		s += fmt.Sprintf(" ±%.0f%%", 50*(slices.Max(values)-slices.Min(values))/mid)
	}
	if r, ok := t.ratio(job, contender, baseline); ok && contender != baseline {
		s += fmt.Sprintf(" (%.2f×)", r)
	}
	return s
}

// verdict compares our own figures with the best of the rivals'.
func (t *table) verdict(job string) string {
	rival, ratio := t.toughestRival(job)
	if rival == "" {
		return "–"
	}
	return fmt.Sprintf("**%.2f×** (%s)", ratio, rival)
}

// quantity prints a value with three digits and a unit that suits its size.
func quantity(v float64, unit string) string {
	switch {
	case unit == "MB/s" && v >= 1000:
		return fmt.Sprintf("%.2f GB/s", v/1000)
	case unit == "B/conn":
		return fmt.Sprintf("%.1f KiB/conn", v/1024)
	case v >= 1000:
		return fmt.Sprintf("%.1fk %s", v/1000, unit)
	}
	return fmt.Sprintf("%.0f %s", v, unit)
}

func (t *table) failures() string {
	var b strings.Builder
	for _, job := range t.jobs {
		for _, c := range t.contenders {
			name := benchName{job, c}
			if f := t.failed[name]; f != "" {
				fmt.Fprintf(&b, "%s: %s", name, f)
			}
		}
	}
	return b.String()
}
