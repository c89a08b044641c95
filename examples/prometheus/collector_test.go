package main

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/tcprelay/relay"
)

func TestCollector(t *testing.T) {
	srv, err := relay.NewServer(relay.WithTokens("secret"))
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	defer func() {
		srv.Close()
		if err := <-served; err != relay.ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
	}()
	const name = "two \"lines\"\nand a \\"
	service := func() *relay.Listener {
		t.Helper()
		l, err := relay.Register(t.Context(), ln.Addr().String(), relay.WithToken("secret"), relay.WithName(name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go io.Copy(c, c)
			}
		}()
		return l
	}
	client := func(l *relay.Listener) {
		t.Helper()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		fmt.Fprint(c, "hello")
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := relay.Register(t.Context(), ln.Addr().String()); err == nil {
		t.Fatal("registered without a token")
	}
	// Two services of one name, of which one takes no more clients and has one.
	first := service()
	client(first)
	first.Close()
	for giveUp := time.Now().Add(time.Minute); !srv.Services()[0].Draining; time.Sleep(time.Millisecond) {
		if time.Now().After(giveUp) {
			t.Fatal("the first service still takes clients")
		}
	}
	second := service()
	client(second)

	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(NewCollector(srv))
	const label = `service="two \"lines\"\nand a \\"`
	want := `
# HELP relay_refusals_total Registrations and clients that were refused or cut off, by why.
# TYPE relay_refusals_total counter
relay_refusals_total{reason="unauthorized"} 1
# HELP relay_service_apps Apps of a service that are there.
# TYPE relay_service_apps gauge
relay_service_apps{` + label + `} 2
# HELP relay_service_clients Clients of a service that are connected.
# TYPE relay_service_clients gauge
relay_service_clients{` + label + `} 2
# HELP relay_service_received_bytes_total Bytes from clients of a service to its apps.
# TYPE relay_service_received_bytes_total counter
relay_service_received_bytes_total{` + label + `} 5
# HELP relay_service_sent_bytes_total Bytes from apps of a service to its clients.
# TYPE relay_service_sent_bytes_total counter
relay_service_sent_bytes_total{` + label + `} 5
`
	compare := func() error {
		return testutil.GatherAndCompare(registry, strings.NewReader(want), "relay_refusals_total", "relay_service_apps",
			"relay_service_clients", "relay_service_received_bytes_total", "relay_service_sent_bytes_total")
	}
	// The relay counts a byte a moment after the client has it.
	for giveUp := time.Now().Add(time.Minute); compare() != nil && time.Now().Before(giveUp); {
		time.Sleep(time.Millisecond)
	}
	if err := compare(); err != nil {
		t.Error(err)
	}
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Errorf("the linter says %v, %v", problems, err)
	}
}
