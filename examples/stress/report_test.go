package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

func textOf(t *testing.T, r *report) string {
	t.Helper()
	var b strings.Builder
	if err := r.writeText(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// aReport is one in which something is of everything.
func aReport() *report {
	return &report{
		Format:      1,
		StartedAt:   time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.UTC),
		GoVersion:   "go1.26",
		OS:          "plan9",
		Arch:        "mips",
		CPUs:        3,
		Parameters:  parameters{To: "example.com:1", Mode: roundTrips, Clients: 2, Time: 10, Size: 1024, Rate: 0.5, Ramp: 1, Timeout: 4, TLS: true, Seed: 9},
		Elapsed:     2,
		Span:        1.5,
		Interrupted: true,
		Totals:      totals{Messages: 3, Bytes: 3100, Connections: 4, Errors: 2, Due: 2, Unsent: 1},
		Rates:       rates{Messages: 1.5, Bytes: 1550, Connections: 2},
		Latency:     latencies{Count: 3, Min: 100, Mean: 200.5, P50: 150, P90: 351.5, P99: 351.5, P999: 351.5, Max: 351.5},
		Percentiles: []point{{0, 100}, {50, 150}, {100, 351.5}},
		Errors: failures{
			ByKind: map[string]int64{"connect_refused": 0, "connect_failed": 1, "timeout": 0, "reset": 0, "early_eof": 0, "wrong_byte": 1, "extra_byte": 0, "other": 0},
			First: []sampleError{
				{At: 0.25, Kind: "wrong_byte", Client: 1, LocalAddress: "127.0.0.1:5", Message: "byte 28 of the connection is 0x00, not 0x01"},
				{At: 0.5, Kind: "connect_failed", Client: 0, Message: "connecting: no route <&>"},
			},
		},
		Series: []sample{
			{From: 0, To: 1, Clients: 2, Messages: 3, MessagesPerSecond: 3, Bytes: 3100, BytesPerSecond: 3100, P50: 150, P99: 351.5, Max: 351.5, Errors: 2},
			{From: 1, To: 2},
		},
	}
}

// TestJSON holds on to the names of the fields, which other programs read.
func TestJSON(t *testing.T) {
	want := `{
	"format": 1,
	"started_at": "2026-01-02T03:04:05.006Z",
	"go_version": "go1.26",
	"os": "plan9",
	"arch": "mips",
	"cpus": 3,
	"parameters": {
		"to": "example.com:1",
		"mode": "round-trips",
		"clients": 2,
		"time_seconds": 10,
		"size_bytes": 1024,
		"rate_per_client": 0.5,
		"inflight": 0,
		"ramp_seconds": 1,
		"timeout_seconds": 4,
		"tls": true,
		"seed": 9
	},
	"elapsed_seconds": 2,
	"span_seconds": 1.5,
	"interrupted": true,
	"totals": {
		"messages": 3,
		"bytes": 3100,
		"connections": 4,
		"errors": 2,
		"due": 2,
		"unsent": 1
	},
	"rates": {
		"messages_per_second": 1.5,
		"bytes_per_second": 1550,
		"connections_per_second": 2
	},
	"latency": {
		"count": 3,
		"min_us": 100,
		"mean_us": 200.5,
		"p50_us": 150,
		"p90_us": 351.5,
		"p99_us": 351.5,
		"p999_us": 351.5,
		"max_us": 351.5
	},
	"percentiles": [
		{
			"percent": 0,
			"latency_us": 100
		},
		{
			"percent": 50,
			"latency_us": 150
		},
		{
			"percent": 100,
			"latency_us": 351.5
		}
	],
	"errors": {
		"by_kind": {
			"connect_failed": 1,
			"connect_refused": 0,
			"early_eof": 0,
			"extra_byte": 0,
			"other": 0,
			"reset": 0,
			"timeout": 0,
			"wrong_byte": 1
		},
		"first": [
			{
				"at_seconds": 0.25,
				"kind": "wrong_byte",
				"client": 1,
				"local_address": "127.0.0.1:5",
				"message": "byte 28 of the connection is 0x00, not 0x01"
			},
			{
				"at_seconds": 0.5,
				"kind": "connect_failed",
				"client": 0,
				"local_address": "",
				"message": "connecting: no route <&>"
			}
		]
	},
	"series": [
		{
			"from_seconds": 0,
			"to_seconds": 1,
			"clients": 2,
			"messages": 3,
			"messages_per_second": 3,
			"bytes": 3100,
			"bytes_per_second": 3100,
			"p50_us": 150,
			"p99_us": 351.5,
			"max_us": 351.5,
			"errors": 2
		},
		{
			"from_seconds": 1,
			"to_seconds": 2,
			"clients": 0,
			"messages": 0,
			"messages_per_second": 0,
			"bytes": 0,
			"bytes_per_second": 0,
			"p50_us": 0,
			"p99_us": 0,
			"max_us": 0,
			"errors": 0
		}
	]
}
`
	var b strings.Builder
	if err := aReport().writeJSON(&b); err != nil {
		t.Fatal(err)
	}
	if b.String() != want {
		t.Errorf("%s", b.String())
	}
}

// TestEmptyJSON has lists and kinds be there when there is nothing in them.
func TestEmptyJSON(t *testing.T) {
	var b strings.Builder
	if err := newReport(&params{mode: bulk}, newMeter(1), false).writeJSON(&b); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Percentiles, Series *[]any
		Errors              struct {
			ByKind map[string]int64 `json:"by_kind"`
			First  *[]any
		}
	}
	if err := json.Unmarshal([]byte(b.String()), &got); err != nil {
		t.Fatal(err)
	}
	if got.Percentiles == nil || got.Series == nil || got.Errors.First == nil || len(got.Errors.ByKind) != int(kinds) {
		t.Errorf("%s", b.String())
	}
}

func TestText(t *testing.T) {
	want := `example.com:1: 2 clients, round trips of 1024 bytes, 0.5 a second each, 1 in all, TLS, interrupted after 2.0 s

round trips  3        1.50 a second
verified     3.10 kB  1.55 kB a second each way
connections  4        2 a second
unsent       1        of 2 that were due

latency  p50     p90     p99     p99.9   max     mean
         150 µs  352 µs  352 µs  352 µs  352 µs  200 µs

2 errors
  connect_failed: 1
    0.500 s, client 0: connecting: no route <&>
  wrong_byte: 1
    0.250 s, client 1 at 127.0.0.1:5: byte 28 of the connection is 0x00, not 0x01
`
	if got := textOf(t, aReport()); got != want {
		t.Errorf("%s", got)
	}
	r := aReport()
	r.Parameters.To = "\x1b]0;x\x07:1"
	if got := textOf(t, r); strings.ContainsAny(got, "\x1b\x07") {
		t.Errorf("%q", got)
	}
}

func TestUnits(t *testing.T) {
	for us, want := range map[float64]string{
		0: "0 µs", 0.5: "0.50 µs", 12.34: "12.3 µs", 999.4: "999 µs", 1000: "1 ms", 1234: "1.23 ms",
		56_789: "56.8 ms", 999.7: "1.00 ms", 999_700: "1.00 s", 2e6: "2 s", 12.34e6: "12.3 s", 100e6: "100 s", 7200e6: "7200 s",
	} {
		if got := duration(us); got != want {
			t.Errorf("%v us is %s, not %s", us, got, want)
		}
	}
	for bytes, want := range map[float64]string{0: "0 B", 999: "999 B", 999.6: "1.00 kB", 999_700: "1.00 MB", 999.7e6: "1.00 GB", 1024: "1.02 kB", 65.5e3: "65.5 kB", 3e6: "3 MB", 123.4e9: "123 GB"} {
		if got := amount(bytes); got != want {
			t.Errorf("%v bytes are %s, not %s", bytes, got, want)
		}
	}
}
