// Command prometheus is a relay in a program of your own, whose services show in the
// metrics of that program. (relayd has /metrics built in.)
//
//	go run . -listen 127.0.0.1:8080 -metrics 127.0.0.1:9100
package main

import (
	"flag"
	"log"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/tcprelay/relay"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:8080", "`address` that services register at")
	metrics := flag.String("metrics", "127.0.0.1:9100", "`address` of /metrics")
	flag.Parse()

	srv, err := relay.NewServer()
	if err != nil {
		log.Fatal(err)
	}
	prometheus.MustRegister(NewCollector(srv))
	http.Handle("/metrics", promhttp.Handler())
	go func() { log.Fatal(http.ListenAndServe(*metrics, nil)) }()
	log.Fatal(srv.ListenAndServe(*listen))
}
