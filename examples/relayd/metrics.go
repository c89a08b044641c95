package main

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/tcprelay/relay"
)

// A family is a metric of Prometheus' text format, version 0.0.4, with its samples by
// their labels.
type family struct {
	name, kind, help string
	samples          map[string]float64
}

// labels returns names and values, given in turn, as the format has them.
func labels(pairs ...string) string {
	if len(pairs) == 0 {
		return ""
	}
	var all []string
	for i := 0; i < len(pairs); i += 2 {
		all = append(all, pairs[i]+`="`+escapeLabel.Replace(strings.ToValidUTF8(pairs[i+1], "\uFFFD"))+`"`)
	}
	return "{" + strings.Join(all, ",") + "}"
}

var escapeLabel = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

func (f *family) write(b *bytes.Buffer) {
	fmt.Fprintf(b, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", f.name, f.help, f.kind)
	for _, labels := range slices.Sorted(maps.Keys(f.samples)) {
		fmt.Fprintf(b, "%s%s %s\n", f.name, labels, strconv.FormatFloat(f.samples[labels], 'g', -1, 64))
	}
}

// metrics returns what Prometheus reads. A service that drains and its successor have one
// name, and are one there, for a sample that comes twice makes all of them invalid: what
// there is now is that of both, and what was counted that of the successor alone, so that
// nothing falls when the other one ends.
func (s *status) metrics(infos []relay.ServiceInfo, total moved) []byte {
	var families []*family
	metric := func(name, kind, help string) map[string]float64 {
		f := &family{name, kind, help, make(map[string]float64)}
		families = append(families, f)
		return f.samples
	}
	const counter, gauge = "counter", "gauge"

	c := s.chronicle
	c.mu.Lock()
	registered, clients := c.registered, c.clients
	c.mu.Unlock()
	metric("relay_start_time_seconds", gauge, "When the relay was started, in seconds since 1970.")[""] = float64(c.since.UnixNano()) / 1e9
	draining := metric("relay_draining", gauge, "1 if the relay takes no more services and clients.")
	draining[""] = 0
	if s.draining.Load() {
		draining[""] = 1
	}
	metric("relay_services", gauge, "Services that are registered.")[""] = float64(len(infos))
	metric("relay_registrations_total", counter, "Registrations, also of one service by several apps.")[""] = float64(registered)
	metric("relay_clients_total", counter, "Clients that were connected to an app.")[""] = float64(clients)
	metric("relay_received_bytes_total", counter, "Bytes from clients to apps.")[""] = float64(total.in)
	metric("relay_sent_bytes_total", counter, "Bytes from apps to clients.")[""] = float64(total.out)
	refusals := metric("relay_refusals_total", counter, "Registrations and clients that were refused or cut off, by why.")
	for reason, n := range s.relay.Refusals() {
		refusals[labels("reason", reason)] = float64(n)
	}

	info := metric("relay_service_info", gauge, "1, with what a service is.")
	apps := metric("relay_service_apps", gauge, "Apps of a service that are there.")
	now := metric("relay_service_clients", gauge, "Clients of a service that are connected.")
	waiting := metric("relay_service_clients_waiting", gauge, "Clients that wait for an app that is away.")
	trip := metric("relay_service_round_trip_seconds", gauge, "Round trip to the farthest app of a service.")
	accepted := metric("relay_service_accepted_clients_total", counter, "Clients of a service that were connected to an app.")
	refused := metric("relay_service_refusals_total", counter, "Clients of a service that were refused or cut off, by why.")
	in := metric("relay_service_received_bytes_total", counter, "Bytes from clients of a service to its apps.")
	out := metric("relay_service_sent_bytes_total", counter, "Bytes from apps of a service to its clients.")
	for i := range infos {
		sv := &infos[i]
		name := labels("service", sv.Name)
		info[labels("service", sv.Name, "address", sv.Address, "hostname", sv.Hostname, "identity", sv.Identity)] = 1
		apps[name] += float64(len(sv.Sessions))
		now[name] += float64(len(sv.Clients))
		waiting[name] += float64(sv.Waiting)
		for _, m := range sv.Sessions {
			trip[name] = max(trip[name], m.RoundTrip.Seconds())
		}
		if i+1 < len(infos) && infos[i+1].Name == sv.Name { // by name, and then by age
			continue
		}
		accepted[name] = float64(sv.Accepted)
		in[name] = float64(sv.BytesIn)
		out[name] = float64(sv.BytesOut)
		for reason, n := range sv.Refusals {
			refused[labels("service", sv.Name, "reason", reason)] = float64(n)
		}
	}
	var b bytes.Buffer
	for _, f := range families {
		f.write(&b)
	}
	return b.Bytes()
}
