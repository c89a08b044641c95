package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/peers/parts"
)

// TestMain has the test binary be the parts of chains too.
func TestMain(m *testing.M) {
	parts.Main(nil)
	os.Exit(m.Run())
}

// Every chain carries every kind of job. What it measures then is no figure.
func TestChains(t *testing.T) {
	b, err := parts.NewBench(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for i, c := range allChains {
		t.Run(c.name, func(t *testing.T) {
			jobs := slices.DeleteFunc(allJobs(20), func(j job) bool { return !c.does(j) })
			for k := range 2 { // all jobs over all chains would take minutes
				j := jobs[(i+5*k)%len(jobs)]
				m, err := measure(t.Context(), b, c, j, 50*time.Millisecond)
				if err != nil && !strings.Contains(err.Error(), "errors, the first") { // under load some rivals drop clients
					t.Errorf("%s: %v", j.name, err)
				}
				if err == nil && m.rate <= 0 {
					t.Errorf("%s: %v", j.name, m)
				}
			}
		})
	}
}

func TestMarkdown(t *testing.T) {
	up := job{"bulk up, 1 conn", "up", 1}
	a, b := chain{name: "relay, app"}, chain{name: baseline}
	tab := newTables([]job{up}, []chain{b, a})
	for _, round := range [][2]float64{{1e9, 0.5e9}, {2e9, 1.5e9}, {1e9, 0.25e9}} {
		tab.add(up, b, measurement{rate: round[0], cpu: 1e-9}, nil)
		tab.add(up, a, measurement{rate: round[1], cpu: 3e-9}, nil)
	}
	want := strings.Join([]string{
		"",
		"| bulk up, 1 conn | Gbit/s | CPU s/GB |",
		"|---|---:|---:|",
		"| proxy | 8.0 | 1.00 |",
		"| relay, app | 4.0 (0.50×) | 3.00 (3.00×) |",
		"",
	}, "\n")
	if got := tab.markdown(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	// A round that failed is in no ratio, and shifts no other.
	tab.add(up, b, measurement{}, fmt.Errorf("it broke"))
	tab.add(up, a, measurement{rate: 9e9}, nil)
	if r, ok := tab.ratio(up, "relay, app", baseline, figuresOf(up)[0]); !ok || r != 0.5 {
		t.Errorf("ratio %v, %v", r, ok)
	}
	if len(tab.failures) != 1 || !strings.Contains(tab.failures[0], "it broke") {
		t.Errorf("failures %q", tab.failures)
	}
}
