package main

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// interval is how often the meter is read, which is what a sample of the series spans.
const interval = time.Second

// keptErrors is how many errors of each kind are kept as text.
const keptErrors = 3

// A meter counts what clients do. They record in shards of it, so that they are not in
// each other's way; whoever reads it empties those into the totals.
type meter struct {
	start       time.Time
	shards      []shard
	connected   atomic.Int64 // now
	connections atomic.Int64 // opened so far
	due         atomic.Int64
	unsent      atomic.Int64

	mu     sync.Mutex
	errors [kinds]int64
	first  []sampleError // keptErrors of each kind, in order of time

	ended  chan struct{} // closed by end, which sets these
	span   time.Duration
	inSpan totals

	reading sync.Mutex // held by read and end
	total   histogram
	current histogram // of the last sample
	bytes   int64
	failed  int64
	series  []sample
}

// A shard is what some of the clients record in.
type shard struct {
	bytes atomic.Int64 // verified since the meter was read

	mu  sync.Mutex
	new histogram // the same of messages
}

func newMeter(clients int) *meter {
	return &meter{start: time.Now(), ended: make(chan struct{}), shards: make([]shard, min(clients, 2*runtime.GOMAXPROCS(0)))}
}

func (m *meter) shard(client int) *shard { return &m.shards[client%len(m.shards)] }

// record counts a message that took d.
func (s *shard) record(d time.Duration) {
	s.mu.Lock()
	s.new.add(d)
	s.mu.Unlock()
}

// fail counts what ended a connection, whose local address is local if there was one.
func (m *meter) fail(client int, local string, err error) {
	k := kindOf(err)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.errors[k]++
	if m.errors[k] <= keptErrors {
		m.first = append(m.first, sampleError{
			At: seconds(time.Since(m.start)), Kind: k.String(), Client: client, LocalAddress: local, Message: printable(err.Error()),
		})
	}
}

// failures returns how many errors there were so far.
func (m *meter) failures() (n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, of := range m.errors {
		n += of
	}
	return n
}

// read adds a sample of what happened since the last one, and returns it. With final, a
// short rest becomes part of the last one.
func (m *meter) read(final bool) sample {
	m.reading.Lock()
	defer m.reading.Unlock()
	s := sample{To: seconds(time.Since(m.start))}
	if n := len(m.series); n > 0 {
		last := m.series[n-1]
		if final && s.To-last.To < seconds(interval)/2 {
			s.From, s.Bytes, s.Errors = last.From, last.Bytes, last.Errors
			m.series = m.series[:n-1]
		} else {
			s.From = last.To
			m.current = histogram{}
		}
	}
	var bytes int64
	for i := range m.shards {
		shard := &m.shards[i]
		bytes += shard.bytes.Swap(0)
		shard.mu.Lock()
		m.current.merge(&shard.new)
		m.total.merge(&shard.new)
		shard.new = histogram{}
		shard.mu.Unlock()
	}
	failed := m.failures()
	s.Bytes += bytes
	s.Errors += failed - m.failed
	m.bytes += bytes
	m.failed = failed

	s.Clients = m.connected.Load()
	s.Messages = m.current.count
	span := s.To - s.From
	s.MessagesPerSecond = perSecond(s.Messages, span)
	s.BytesPerSecond = perSecond(s.Bytes, span)
	s.P50 = microseconds(m.current.quantile(50, 100))
	s.P99 = microseconds(m.current.quantile(99, 100))
	s.Max = microseconds(m.current.max)
	m.series = append(m.series, s)
	return s
}

// end notes that no more messages are begun from at on, and what was done by then.
func (m *meter) end(at time.Time) {
	m.reading.Lock()
	defer m.reading.Unlock()
	m.span = at.Sub(m.start)
	m.inSpan = totals{Messages: m.total.count, Bytes: m.bytes, Connections: m.connections.Load()}
	for i := range m.shards {
		shard := &m.shards[i]
		m.inSpan.Bytes += shard.bytes.Load()
		shard.mu.Lock()
		m.inSpan.Messages += shard.new.count
		shard.mu.Unlock()
	}
	close(m.ended)
}

// watch reads the meter once an interval until stop is closed, and shows each sample.
func (m *meter) watch(stop <-chan struct{}, show func(sample)) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			show(m.read(false))
		case <-stop:
			return
		}
	}
}

func perSecond(n int64, seconds float64) float64 {
	if seconds <= 0 {
		return 0
	}
	return float64(n) / seconds
}

func seconds(d time.Duration) float64 { return d.Seconds() }

func microseconds(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
