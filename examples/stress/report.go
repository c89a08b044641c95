package main

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"
)

// A report is what is said of a run. Its JSON is an interface: fields may be added, and
// those that are there keep their names, meanings and units. Latencies are microseconds,
// all other durations seconds. What has nothing to be said of, such as the latency of no
// messages, is 0.
type report struct {
	Format      int        `json:"format"` // 1; another if a field should ever change its meaning
	StartedAt   time.Time  `json:"started_at"`
	GoVersion   string     `json:"go_version"`
	OS          string     `json:"os"`
	Arch        string     `json:"arch"`
	CPUs        int        `json:"cpus"` // that the tester may use
	Parameters  parameters `json:"parameters"`
	Elapsed     float64    `json:"elapsed_seconds"` // until the last client had ended
	Span        float64    `json:"span_seconds"`    // until time_seconds were over, or a signal came: messages were begun in it
	Interrupted bool       `json:"interrupted"`     // by a signal, before time_seconds were over
	Totals      totals     `json:"totals"`
	Rates       rates      `json:"rates"`       // of what was done in span_seconds
	Latency     latencies  `json:"latency"`     // of verified messages
	Percentiles []point    `json:"percentiles"` // the same as a curve, rising
	Errors      failures   `json:"errors"`
	Series      []sample   `json:"series"` // one a second
}

// Parameters are the flags, as they were taken.
type parameters struct {
	To       string  `json:"to"`
	Mode     mode    `json:"mode"`
	Clients  int     `json:"clients"`
	Time     float64 `json:"time_seconds"`
	Size     int     `json:"size_bytes"`
	Rate     float64 `json:"rate_per_client"` // messages a second, 0 for as fast as possible
	Inflight int     `json:"inflight"`        // of bulk; 0 in other modes
	Ramp     float64 `json:"ramp_seconds"`
	Timeout  float64 `json:"timeout_seconds"`
	TLS      bool    `json:"tls"`
	Seed     uint64  `json:"seed"`
}

// A message is a round trip, an exchange with a connection of its own, or a message of a
// stream, as the mode is.
type totals struct {
	Messages    int64 `json:"messages"`    // that came back as they were sent
	Bytes       int64 `json:"bytes"`       // that came back and were right, those of messages that then failed included
	Connections int64 `json:"connections"` // opened
	Errors      int64 `json:"errors"`      // each has ended a connection, or there was none
	Due         int64 `json:"due"`         // messages, by rate_per_client, in span_seconds; 0 without
	Unsent      int64 `json:"unsent"`      // of those, messages that were not sent
}

type rates struct {
	Messages    float64 `json:"messages_per_second"`
	Bytes       float64 `json:"bytes_per_second"` // each way
	Connections float64 `json:"connections_per_second"`
}

// Latencies are measured from when a message was due (see schedule) to when its last byte
// was verified, or in connections to the end that follows it, and are off by 0.5 % at most; min, max and mean are exact.
type latencies struct {
	Count int64   `json:"count"`
	Min   float64 `json:"min_us"`
	Mean  float64 `json:"mean_us"`
	P50   float64 `json:"p50_us"`
	P90   float64 `json:"p90_us"`
	P99   float64 `json:"p99_us"`
	P999  float64 `json:"p999_us"`
	Max   float64 `json:"max_us"`
}

// A point says that so many percent of the messages took no longer.
type point struct {
	Percent float64 `json:"percent"`
	Latency float64 `json:"latency_us"`
}

type failures struct {
	ByKind map[string]int64 `json:"by_kind"` // each of kindNames, also those of which there were none
	First  []sampleError    `json:"first"`   // some of each kind
}

type sampleError struct {
	At           float64 `json:"at_seconds"`
	Kind         string  `json:"kind"`
	Client       int     `json:"client"`        // from 0
	LocalAddress string  `json:"local_address"` // empty if there was no connection
	Message      string  `json:"message"`
}

// A sample is what happened between two times since the start.
type sample struct {
	From              float64 `json:"from_seconds"`
	To                float64 `json:"to_seconds"`
	Clients           int64   `json:"clients"` // connected, at the end of it
	Messages          int64   `json:"messages"`
	MessagesPerSecond float64 `json:"messages_per_second"`
	Bytes             int64   `json:"bytes"`
	BytesPerSecond    float64 `json:"bytes_per_second"`
	P50               float64 `json:"p50_us"`
	P99               float64 `json:"p99_us"`
	Max               float64 `json:"max_us"`
	Errors            int64   `json:"errors"`
}

// newReport reports on a run that is over: nobody records in the meter any more.
func newReport(p *params, m *meter, interrupted bool) *report {
	m.read(true)
	elapsed := m.series[len(m.series)-1].To
	h := &m.total
	r := &report{
		Format:      1,
		StartedAt:   m.start.UTC().Round(time.Millisecond),
		GoVersion:   runtime.Version(),
		OS:          runtime.GOOS,
		Arch:        runtime.GOARCH,
		CPUs:        runtime.GOMAXPROCS(0),
		Parameters:  p.parameters(),
		Elapsed:     elapsed,
		Span:        seconds(m.span),
		Interrupted: interrupted,
		Totals: totals{
			Messages:    h.count,
			Bytes:       m.bytes,
			Connections: m.connections.Load(),
			Errors:      m.failures(),
			Due:         m.due.Load(),
			Unsent:      m.unsent.Load(),
		},
		Latency: latencies{
			Count: h.count,
			Min:   microseconds(h.min),
			Mean:  microseconds(h.mean()),
			P50:   microseconds(h.quantile(50, 100)),
			P90:   microseconds(h.quantile(90, 100)),
			P99:   microseconds(h.quantile(99, 100)),
			P999:  microseconds(h.quantile(999, 1000)),
			Max:   microseconds(h.max),
		},
		Percentiles: curve(h),
		Errors:      failures{ByKind: make(map[string]int64), First: m.first},
		Series:      m.series,
	}
	r.Rates = rates{
		Messages:    perSecond(m.inSpan.Messages, r.Span),
		Bytes:       perSecond(m.inSpan.Bytes, r.Span),
		Connections: perSecond(m.inSpan.Connections, r.Span),
	}
	if r.Errors.First == nil {
		r.Errors.First = []sampleError{} // a list in JSON, too
	}
	for k, n := range m.errors {
		r.Errors.ByKind[kind(k).String()] = n
	}
	return r
}

// curve returns the percentiles of a histogram: nine up to 90 %, nine more up to 99 %, and
// so on, until a single message is left above.
func curve(h *histogram) []point {
	points := []point{}
	if h.count == 0 {
		return points
	}
	for of := uint64(10); of/10 < uint64(h.count); of *= 10 {
		for part := of - 10; part < of-1; part++ { // of 10, 100, and so on
			points = append(points, point{float64(part) / (float64(of) / 100), microseconds(h.quantile(part, of))})
		}
	}
	return append(points, point{100, microseconds(h.max)})
}

func (r *report) writeJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "\t")
	e.SetEscapeHTML(false)
	return e.Encode(r)
}

// done says in a line what was done.
func (r *report) done() string {
	p := &r.Parameters
	s := fmt.Sprintf("%s, %s of %s", plural(int64(p.Clients), "client"), p.Mode.messages(), plural(int64(p.Size), "byte"))
	if p.Rate > 0 {
		s += fmt.Sprintf(", %g a second each, %g in all", p.Rate, p.Rate*float64(p.Clients))
	}
	if p.TLS {
		s += ", TLS"
	}
	if r.Interrupted {
		return s + fmt.Sprintf(", interrupted after %.1f s", r.Elapsed)
	}
	return s + fmt.Sprintf(", %.1f s", r.Elapsed)
}

// summary says in a line what came of it.
func (r *report) summary() string {
	s := fmt.Sprintf("%s each way, %s %s a second, ", amount(r.Rates.Bytes)+"/s", digits(r.Rates.Messages), r.Parameters.Mode.messages())
	s += plural(r.Totals.Connections, "connection") + ", " + plural(r.Totals.Errors, "error")
	if r.Totals.Unsent > 0 {
		s += fmt.Sprintf(", %d of %d due and unsent", r.Totals.Unsent, r.Totals.Due)
	}
	return s
}

func (r *report) writeText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s\n", printable(r.Parameters.To), r.done())
	fmt.Fprintln(&b)
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "%s\t%d\t%s a second\n", r.Parameters.Mode.messages(), r.Totals.Messages, digits(r.Rates.Messages))
	fmt.Fprintf(t, "verified\t%s\t%s a second each way\n", amount(float64(r.Totals.Bytes)), amount(r.Rates.Bytes))
	fmt.Fprintf(t, "connections\t%d\t%s a second\n", r.Totals.Connections, digits(r.Rates.Connections))
	if r.Totals.Unsent > 0 {
		fmt.Fprintf(t, "unsent\t%d\tof %d that were due", r.Totals.Unsent, r.Totals.Due)
		if r.Totals.Unsent > int64(r.Parameters.Clients) { // one each may be under way in the end
			fmt.Fprint(t, ": slower than -rate")
		}
		fmt.Fprintln(t)
	}
	t.Flush()
	if l := &r.Latency; l.Count > 0 {
		fmt.Fprintln(&b)
		fmt.Fprintln(t, "latency\tp50\tp90\tp99\tp99.9\tmax\tmean")
		fmt.Fprintf(t, "\t%s\t%s\t%s\t%s\t%s\t%s\n", duration(l.P50), duration(l.P90), duration(l.P99), duration(l.P999), duration(l.Max), duration(l.Mean))
		t.Flush()
	}
	fmt.Fprintln(&b)
	switch {
	case r.Totals.Errors > 0:
		r.writeErrors(&b)
	case r.Totals.Messages > 0:
		fmt.Fprintln(&b, "no errors: every byte came back as it was sent")
	default:
		fmt.Fprintln(&b, "no errors, and no messages")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// writeErrors writes how many errors there were of each kind, and those that were kept.
func (r *report) writeErrors(b *strings.Builder) {
	fmt.Fprintln(b, plural(r.Totals.Errors, "error"))
	for _, name := range kindNames {
		n := r.Errors.ByKind[name]
		if n == 0 {
			continue
		}
		fmt.Fprintf(b, "  %s: %d\n", name, n)
		for _, e := range r.Errors.First {
			if e.Kind != name {
				continue
			}
			who := fmt.Sprintf("client %d", e.Client)
			if e.LocalAddress != "" {
				who += " at " + e.LocalAddress
			}
			fmt.Fprintf(b, "    %.3f s, %s: %s\n", e.At, who, e.Message)
		}
	}
}
