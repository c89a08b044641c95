package main

import (
	"strings"
	"testing"
)

// Output as the testing package writes it: measurements among other lines, and a
// benchmark that failed.
const sample = `goos: linux
pkg: example.com/peers
BenchmarkRelay/bulkUp/conns=1/via=plain-2         	    1521	    500000 ns/op	2000.00 MB/s	       0 B/op	       0 allocs/op
BenchmarkRelay/bulkUp/conns=1/via=yamux-2         	     550	   2000000 ns/op	 500.00 MB/s	    4916 B/op	      40 allocs/op
BenchmarkRelay/bulkUp/conns=1/via=smux-2          	     550	   2000000 ns/op	 600.00 MB/s	    4916 B/op	      40 allocs/op
BenchmarkRelay/bulkUp/conns=1/via=ours-2          	     550	   1000000 ns/op	 900.00 MB/s	    4916 B/op	      40 allocs/op
BenchmarkRelay/idle/conns=1000/via=plain-2        	       2	 428750294 ns/op	     10240 B/conn	 3894792 B/op	   67438 allocs/op
BenchmarkRelay/idle/conns=1000/via=yamux-2        	       2	 428750294 ns/op	    102400 B/conn	 3894792 B/op	   67438 allocs/op
--- FAIL: BenchmarkRelay/idle/conns=1000/via=smux
    bench_test.go:87: worker 0: EOF
--- FAIL: BenchmarkRelay/idle/conns=1000
BenchmarkRelay/idle/conns=1000/via=ours           	       2	 428750294 ns/op	     20480 B/conn	 3894792 B/op	   67438 allocs/op
FAIL
`

func TestMarkdown(t *testing.T) {
	found := parseResults([]byte(sample))
	tab := newTable(found)
	for _, r := range found {
		tab.add(r)
	}
	// Two more rounds on a machine that was half as fast, then faster again.
	for contender, values := range map[string][2]float64{
		"plain": {1000, 2500},
		"yamux": {250, 500},
		"smux":  {300, 750},
		"ours":  {600, 1000},
	} {
		for _, v := range values {
			tab.add(result{name: benchName{"bulkUp/conns=1", contender}, value: v, unit: "MB/s"})
		}
	}
	want := strings.Join([]string{
		"| job | plain | yamux | smux | ours | ours / best rival |",
		"|---|---:|---:|---:|---:|---:|",
		"| bulkUp, conns=1 | 2.00 GB/s ±38% | 500 MB/s ±25% (0.25×) | 600 MB/s ±38% (0.30×) | 900 MB/s ±22% (0.45×) | **1.50×** (smux) |",
		"| idle, conns=1000 | 10.0 KiB/conn | 100.0 KiB/conn (0.10×) | failed | 20.0 KiB/conn (0.50×) | **5.00×** (yamux) |",
		"",
	}, "\n")
	if got := tab.markdown(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got, want := tab.failures(), "BenchmarkRelay/idle/conns=1000/via=smux: failed\nbench_test.go:87: worker 0: EOF\n"; got != want {
		t.Errorf("failures: got %q, want %q", got, want)
	}
}

func TestPatternMatchesWholeElements(t *testing.T) {
	got := benchName{"bulkUp/conns=1", "ours"}.pattern()
	if want := "^BenchmarkRelay$/^bulkUp$/^conns=1$/^via=ours$"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
