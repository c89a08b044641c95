package main

import (
	"regexp"
	"strconv"
	"strings"
)

// benchName is the name of a benchmark taken apart: what is done, by whom.
type benchName struct {
	job       string // "bulkUp/conns=1"
	contender string // "ours"
}

const (
	benchRoot     = "BenchmarkRelay"
	contenderMark = "via="
)

func (n benchName) String() string {
	return benchRoot + "/" + n.job + "/" + contenderMark + n.contender
}

// pattern matches this benchmark and no other: "conns=1" alone would also find
// "conns=16".
func (n benchName) pattern() string {
	parts := strings.Split(n.String(), "/")
	for i, p := range parts {
		parts[i] = "^" + regexp.QuoteMeta(p) + "$"
	}
	return strings.Join(parts, "/")
}

// parseName takes apart a name as the testing package prints it, at a benchmark's
// result with the number of CPUs behind it.
func parseName(s string) (benchName, bool) {
	rest, ok := strings.CutPrefix(s, benchRoot+"/")
	if !ok {
		return benchName{}, false
	}
	i := strings.LastIndex(rest, "/"+contenderMark)
	if i < 0 {
		return benchName{}, false
	}
	contender := rest[i+1+len(contenderMark):]
	if j := strings.LastIndexByte(contender, '-'); j >= 0 {
		if _, err := strconv.Atoi(contender[j+1:]); err == nil {
			contender = contender[:j]
		}
	}
	return benchName{rest[:i], contender}, true
}

// result is one measurement, or the words of one that failed.
type result struct {
	name    benchName
	value   float64
	unit    string
	failure string // empty for a measurement
}

// units are those that say what a benchmark is about, and whether more is better.
// The time per operation and the allocations are left to benchstat.
var units = map[string]struct{ moreIsBetter bool }{
	"MB/s":    {true},
	"trips/s": {true},
	"conns/s": {true},
	"B/conn":  {false},
}

// parseResults reads the output of a test binary that runs benchmarks.
func parseResults(out []byte) []result {
	var results []result
	failing := -1 // index of the result whose failure the next lines belong to
	for line := range strings.Lines(string(out)) {
		if failing >= 0 && strings.HasPrefix(line, "    ") {
			results[failing].failure += strings.TrimSpace(line) + "\n"
			continue
		}
		failing = -1
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "--- FAIL: "); ok {
			if name, ok := parseName(strings.TrimSpace(rest)); ok {
				failing = len(results)
				results = append(results, result{name: name, failure: "failed\n"})
			}
			continue
		}
		fields := strings.Fields(line)
		if len(fields) < 4 {
			continue
		}
		name, ok := parseName(fields[0])
		if !ok {
			continue
		}
		// A name, a count, then pairs of value and unit.
		for i := 2; i+1 < len(fields); i += 2 {
			if _, ok := units[fields[i+1]]; !ok {
				continue
			}
			if value, err := strconv.ParseFloat(fields[i], 64); err == nil {
				results = append(results, result{name: name, value: value, unit: fields[i+1]})
			}
		}
	}
	return results
}
