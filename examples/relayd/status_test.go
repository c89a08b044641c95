package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

func asRegisterError(err error) (*relay.RegisterError, bool) {
	return errors.AsType[*relay.RegisterError](err)
}

func TestStatusAddr(t *testing.T) {
	for addr, want := range map[string]string{
		"9800": "127.0.0.1:9800", ":9800": "127.0.0.1:9800", "localhost:1": "localhost:1", "[::1]:1": "[::1]:1", "0.0.0.0:9800": "0.0.0.0:9800",
	} {
		if got, err := statusAddr(addr); got != want || err != nil {
			t.Errorf("%q: %q, %v", addr, got, err)
		}
	}
	if _, err := statusAddr("a:b:c"); err == nil {
		t.Error("a:b:c is an address")
	}
}

// What is for this machine alone is told by where it is bound, however that was written.
func TestIsLoopback(t *testing.T) {
	for addr, want := range map[string]bool{"127.0.0.1:1": true, "127.0.1.1:1": true, "[::1]:1": true, "0.0.0.0:1": false, "[::]:1": false, "10.0.0.1:1": false} {
		if got := isLoopback(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(addr))); got != want {
			t.Errorf("%s: %v", addr, got)
		}
	}
}

func TestIsLocal(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "LOCALHOST:80": true, "127.0.0.1:9090": true, "127.9.9.9": true, "[::1]:1": true, "[::1]": true,
		"": false, "localhost.example.com": false, "127.0.0.1.example.com:1": false, "10.0.0.1": false, "example.com:80": false,
	} {
		if isLocal(host) != want {
			t.Errorf("%q: %v", host, !want)
		}
	}
}

// The points of a plot are what was moved in between, also if a sample comes late; a
// service that is new began at nothing, and one that is gone is forgotten.
func TestSamples(t *testing.T) {
	now := time.Unix(1000, 0)
	c := newChronicle(now)
	since := now.Add(-time.Hour)
	at := func(seconds int, services ...relay.ServiceInfo) {
		c.sample(now.Add(time.Duration(seconds)*time.Second), services)
	}
	info := func(name string, in, out int64) relay.ServiceInfo {
		return relay.ServiceInfo{Name: name, Since: since, BytesIn: in, BytesOut: out}
	}
	expect := func(name string, in, out []int64) {
		t.Helper()
		p := c.plots[serviceKey{name, since}]
		if p == nil || !slices.Equal(p.in, in) || !slices.Equal(p.out, out) {
			t.Errorf("%s: %+v, want %v and %v", name, p, in, out)
		}
	}
	at(0, info("a", 1000, 0))
	expect("a", nil, nil)
	at(2, info("a", 1200, 20), info("b", 600, 0))
	expect("a", []int64{100}, []int64{10})
	expect("b", []int64{300}, []int64{0})
	at(12, info("b", 600, 100))
	expect("b", []int64{300, 0}, []int64{0, 10})
	if len(c.plots) != 1 {
		t.Errorf("%d plots", len(c.plots))
	}
	for i := range points + 10 {
		at(14+2*i, info("b", 600, int64(100+2*i)))
	}
	if p := c.plots[serviceKey{"b", since}]; len(p.in) != points || len(p.out) != points || p.out[points-1] != 1 {
		t.Errorf("%d and %d points, the last %v", len(p.in), len(p.out), p.out[len(p.out)-1])
	}
}

// Totals count who has left and who is there, nobody twice, and never shrink.
func TestTotals(t *testing.T) {
	c := newChronicle(time.Now())
	expect := func(gone moved, services []relay.ServiceInfo, want moved) {
		t.Helper()
		if got := c.total(gone, services); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	here := []relay.ServiceInfo{{Clients: []relay.ClientInfo{{BytesIn: 10, BytesOut: 1}, {BytesIn: 5}}}}
	expect(c.gone(), here, moved{15, 1})
	gone := c.gone()
	c.note(relay.Event{Kind: relay.EventClientLeft, BytesIn: 10, BytesOut: 2})
	expect(gone, here, moved{15, 1}) // it left behind the snapshot
	here[0].Clients = here[0].Clients[1:]
	expect(gone, here, moved{15, 1}) // or before that
	expect(c.gone(), here, moved{15, 2})
	here[0].Clients[0].BytesIn = 100
	expect(c.gone(), here, moved{110, 2})
	expect(c.gone(), nil, moved{110, 2})
}

// The last events are kept, and a flood of refusals is one of them.
func TestHappenings(t *testing.T) {
	c := newChronicle(time.Now())
	for i := range maxHappenings + 5 {
		c.note(relay.Event{Kind: relay.EventRegistered, Service: strings.Repeat("x", i)})
	}
	c.note(relay.Event{Kind: relay.EventClient})
	if len(c.happened) != maxHappenings || len(c.happened[0].Service) != 5 || c.registered != maxHappenings+5 || c.clients != 1 {
		t.Errorf("%d events, the first %q; %d registered, %d clients", len(c.happened), c.happened[0].Service, c.registered, c.clients)
	}
	for i := range 1000 {
		c.note(relay.Event{Kind: relay.EventRefused, Remote: fmt.Sprint(i)})
	}
	last := c.happened[maxHappenings-1]
	if len(c.happened[0].Service) != 6 || last.times != 1000 || last.Remote != "999" || last.Kind != relay.EventRefused {
		t.Errorf("the first is of %q, the last %+v", c.happened[0].Service, last)
	}
	c.note(relay.Event{Kind: relay.EventLost})
	if last := c.happened[maxHappenings-1]; last.Kind != relay.EventLost || last.times != 1 {
		t.Errorf("the last is %+v", last)
	}
}

func TestLabels(t *testing.T) {
	for _, tt := range []struct {
		pairs []string
		want  string
	}{
		{nil, ""},
		{[]string{"a", "b"}, `{a="b"}`},
		{[]string{"a", "\"\\\n", "b", "\xff"}, `{a="\"\\\n",b="` + "\uFFFD" + `"}`},
	} {
		if got := labels(tt.pairs...); got != tt.want {
			t.Errorf("%q: %s", tt.pairs, got)
		}
	}
}

// The page may use what is in it, and nothing else.
func TestPolicy(t *testing.T) {
	for _, element := range []string{"style", "script"} {
		if n := strings.Count(string(page), "<"+element); n != 1 || strings.Count(string(page), "<"+element+">") != 1 {
			t.Errorf("the page has %d elements %s", n, element)
		}
	}
	for _, outside := range []string{"http:", "https:", "//cdn", "innerHTML", "style=\"", " onclick"} {
		if strings.Contains(strings.ReplaceAll(string(page), "http://www.w3.org/2000/svg", ""), outside) {
			t.Errorf("the page has %q in it", outside)
		}
	}
}
