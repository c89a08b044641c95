package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tcprelay/relay"
)

// A Collector shows what a relay's services do, as one snapshot at each scrape: nothing
// has to be counted along the way, and nothing is left of a service that is gone.
type Collector struct{ srv *relay.Server }

// NewCollector returns a Collector of the services of srv.
func NewCollector(srv *relay.Server) Collector { return Collector{srv} }

func perService(name, help string, more ...string) *prometheus.Desc {
	return prometheus.NewDesc("relay_service_"+name, help, append([]string{"service"}, more...), nil)
}

var (
	apps     = perService("apps", "Apps of a service that are there.")
	clients  = perService("clients", "Clients of a service that are connected.")
	waiting  = perService("clients_waiting", "Clients that wait for an app that is away.")
	accepted = perService("accepted_clients_total", "Clients of a service that were connected to an app.")
	received = perService("received_bytes_total", "Bytes from clients of a service to its apps.")
	sent     = perService("sent_bytes_total", "Bytes from apps of a service to its clients.")
	cutOff   = perService("refusals_total", "Clients of a service that were refused or cut off, by why.", "reason")
	refused  = prometheus.NewDesc("relay_refusals_total", "Registrations and clients that were refused or cut off, by why.", []string{"reason"}, nil)
)

// Describe is for prometheus.Collector.
func (c Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{apps, clients, waiting, accepted, received, sent, cutOff, refused} {
		ch <- d
	}
}

// figures are a service's.
type figures struct {
	apps, clients, waiting, accepted int64
	received, sent                   int64
	cutOff                           map[string]int64
}

// Collect is for prometheus.Collector.
func (c Collector) Collect(ch chan<- prometheus.Metric) {
	// By name: a service whose last clients stay may have been followed by another one of
	// the same name, and a label must not come twice. What there is now is summed up. What
	// was counted is that of the later one, so that nothing falls when the other one ends.
	services := make(map[string]*figures)
	for _, s := range c.srv.Services() {
		f := services[s.Name]
		if f == nil {
			f = new(figures)
			services[s.Name] = f
		}
		f.apps += int64(len(s.Sessions))
		f.clients += int64(len(s.Clients))
		f.waiting += int64(s.Waiting)
		f.accepted, f.received, f.sent, f.cutOff = s.Accepted, s.BytesIn, s.BytesOut, s.Refusals
	}
	const gauge, counter = prometheus.GaugeValue, prometheus.CounterValue
	put := func(d *prometheus.Desc, kind prometheus.ValueType, n int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, kind, float64(n), labels...)
	}
	for name, f := range services {
		put(apps, gauge, f.apps, name)
		put(clients, gauge, f.clients, name)
		put(waiting, gauge, f.waiting, name)
		put(accepted, counter, f.accepted, name)
		put(received, counter, f.received, name)
		put(sent, counter, f.sent, name)
		for reason, n := range f.cutOff {
			put(cutOff, counter, n, name, reason)
		}
	}
	for reason, n := range c.srv.Refusals() {
		put(refused, counter, n, reason)
	}
}
