package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/peers/parts"
)

// TestMain has the test binary be the parts of chains too.
func TestMain(m *testing.M) {
	parts.Main(ownParts)
	m.Run()
}

// Two chains carry every kind of job. What it measures then is no figure.
func TestLinks(t *testing.T) {
	b, err := parts.NewBench(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close) // not before the parallel ones have ended
	for _, c := range allChains[:2] {
		for _, j := range allJobs {
			t.Run(c.name+"/"+j.name, func(t *testing.T) {
				t.Parallel() // they wait for most of their time
				at := cell{line{2 * time.Millisecond, 100e6}, j}
				if m, err := measure(t.Context(), b, c, at, 100*time.Millisecond); err != nil || m == (measurement{}) {
					t.Errorf("%v, %v", m, err)
				}
			})
		}
	}
}

func TestChoose(t *testing.T) {
	var p plan
	if err := p.choose("^100ms", "inter|^up$", "relay"); err != nil {
		t.Fatal(err)
	}
	if len(p.cells) != 3 || len(p.chains) != 1 { // nothing interactive at a gigabit
		t.Errorf("chose %v and %d chains", p.cells, len(p.chains))
	}
	if err := new(plan).choose("^5ms", ".", "."); err == nil {
		t.Error("a link that is not there was found")
	}
}

func TestMarkdown(t *testing.T) {
	var p plan
	if err := p.choose("20ms 100M", "^up$|inter", "direct|relay"); err != nil {
		t.Fatal(err)
	}
	up, trips := p.cells[0], p.cells[1]
	tab := newTables(&p)
	for _, round := range [][2]float64{{100e6, 50e6}, {80e6, 60e6}} {
		tab.add(up, p.chains[0], measurement{bits: round[0]}, nil)
		tab.add(up, p.chains[1], measurement{bits: round[1]}, nil)
	}
	tab.add(up, p.chains[0], measurement{}, errors.New("it broke"))
	tab.add(up, p.chains[1], measurement{bits: 70e6}, nil)
	tab.add(trips, p.chains[0], measurement{p50: 20 * time.Millisecond, p99: 30 * time.Millisecond}, nil)
	want := strings.Join([]string{
		"",
		"| 20ms 100Mbit/s: Mbit/s of one stream | up |",
		"|---|---:|",
		"| direct | 90.0 |",
		"| relay | 60.0 (0.62×) |",
		"",
		"| round trips beside bulk | 20ms 100Mbit/s, p50 | 20ms 100Mbit/s, p99 |",
		"|---|---:|---:|",
		"| direct | 20.0 ms | 30.0 ms |",
		"| relay | – | – |",
		"",
	}, "\n")
	if got := tab.markdown(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if len(tab.failures) != 1 || !strings.Contains(tab.failures[0], "it broke") {
		t.Errorf("failures %q", tab.failures)
	}
}
