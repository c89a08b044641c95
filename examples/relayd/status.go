package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/cli"
)

// A status serves what a relay does: to people, to programs and to Prometheus.
type status struct {
	log       *slog.Logger
	relay     *relay.Server
	chronicle *chronicle
	draining  atomic.Bool
	web       *http.Server

	addr string       // empty: nobody is served
	ln   net.Listener // nil if a predecessor is still there
}

func newStatus(log *slog.Logger, srv *relay.Server, c *chronicle) *status {
	s := &status{log: log, relay: srv, chronicle: c}
	s.web = &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	return s
}

// listen takes an address. If there may be a predecessor, the address may be in use until
// that has left it.
func (s *status) listen(addr string, after bool) (err error) {
	if s.addr, err = statusAddr(addr); err != nil {
		return err
	}
	s.ln, err = net.Listen("tcp", s.addr)
	if after && errors.Is(err, syscall.EADDRINUSE) {
		return nil
	}
	return err
}

// serve serves at the address that was taken, until end is called.
func (s *status) serve() (end func()) {
	if s.addr == "" {
		return func() {}
	}
	ctx, stop := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() {
		ln := s.ln
		if ln == nil {
			ln = listenAfter(ctx, s.log, s.addr)
		}
		if ln != nil {
			s.log.Info("status page", "url", "http://"+ln.Addr().String()+"/")
			s.web.Handler = s.handler(isLoopback(ln.Addr()))
			s.web.Serve(ln)
		}
	})
	all.Go(func() { s.sample(ctx) })
	return func() {
		stop()
		s.close()
		all.Wait()
	}
}

// listenAfter listens at an address that somebody is about to leave. It returns nil if
// ctx ends before, or that takes too long.
func listenAfter(ctx context.Context, log *slog.Logger, addr string) net.Listener {
	ctx, cancel := context.WithTimeout(ctx, handoverTime)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		ln, err := net.Listen("tcp", addr)
		if err == nil {
			return ln
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			log.Error("no status page", "err", err)
			return nil
		}
	}
}

// close ends the page, at once.
func (s *status) close() { s.web.Close() }

// drain says that the relay takes nobody any more.
func (s *status) drain() { s.draining.Store(true) }

// statusAddr completes an address: without a host it is this machine's alone.
func statusAddr(addr string) (string, error) {
	if !strings.Contains(addr, ":") {
		addr = ":" + addr
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", err
	}
	return net.JoinHostPort(cmp.Or(host, "127.0.0.1"), port), nil
}

func isLoopback(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}

// sample keeps the plots up to date until ctx ends.
func (s *status) sample(ctx context.Context) {
	tick := time.NewTicker(sampleTime)
	defer tick.Stop()
	for {
		s.chronicle.sample(time.Now(), s.relay.Services())
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// page is all of it: styles and script are in it.
//
//go:embed page.html
var page []byte

// policy lets a browser run and use just what is in the page.
var policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" +
	"; style-src '" + hashOf("style") + "'; script-src '" + hashOf("script") + "'"

// hashOf returns what a policy calls the content of the page's one element of that name.
func hashOf(element string) string {
	_, s, _ := strings.Cut(string(page), "<"+element+">")
	s, _, _ = strings.Cut(s, "</"+element+">")
	sum := sha256.Sum256([]byte(s))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// handler serves the page. Local says that only this machine is to see it.
func (s *status) handler(local bool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", policy)
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Write(page)
	})
	mux.HandleFunc("GET /status.json", s.json)
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		w.Write(s.metrics(s.snapshot()))
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		if s.draining.Load() {
			http.Error(w, "draining", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		if local && !isLocal(r.Host) && r.URL.Path != "/healthz" { // which tells nothing
			// A name of somebody else's that leads here: DNS rebinding, by which a page in
			// a browser of this machine could read what this one shows.
			http.Error(w, "This page is for localhost. A proxy in front of it has to say that it wants localhost, in Host.", http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// isLocal reports whether a Host names this machine.
func isLocal(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return strings.EqualFold(host, "localhost") || err == nil && ip.IsLoopback()
}

// A report is what /status.json says. Times are RFC 3339, bytes are counted from clients
// to apps ("in") and back ("out").
type report struct {
	Version  string           `json:"version"`
	Since    time.Time        `json:"since"`
	Now      time.Time        `json:"now"`
	Draining bool             `json:"draining"`
	Totals   totals           `json:"totals"`
	Refusals map[string]int64 `json:"refusals"`
	Services []service        `json:"services"`
	Events   []event          `json:"events"` // oldest first
}

// totals are since the start.
type totals struct {
	Registrations int64 `json:"registrations"`
	Clients       int64 `json:"clients"`
	BytesIn       int64 `json:"bytes_in"`
	BytesOut      int64 `json:"bytes_out"`
}

type service struct {
	Name     string           `json:"name"`
	Address  string           `json:"address"`
	Hostname string           `json:"hostname,omitempty"`
	Identity string           `json:"identity,omitempty"`
	Shared   bool             `json:"shared,omitempty"`
	State    string           `json:"state"` // live, away or draining
	Since    time.Time        `json:"since"`
	Clients  int              `json:"clients"` // now
	Waiting  int              `json:"waiting"`
	Accepted int64            `json:"accepted"`
	Refused  int64            `json:"refused"`
	Refusals map[string]int64 `json:"refusals,omitempty"`
	BytesIn  int64            `json:"bytes_in"`
	BytesOut int64            `json:"bytes_out"`
	RateIn   int64            `json:"rate_in"` // bytes a second, lately
	RateOut  int64            `json:"rate_out"`
	Sessions []session        `json:"sessions"`
	// Top are those of its clients that have moved most, as many as were asked for.
	Top []client `json:"top_clients,omitempty"`
	// The rates before, if asked for: oldest first, the last one that of now.
	PlotIn  []int64 `json:"plot_in,omitempty"`
	PlotOut []int64 `json:"plot_out,omitempty"`
}

type session struct {
	Remote      string    `json:"remote"`
	Since       time.Time `json:"since"`
	LastHeard   time.Time `json:"last_heard"`
	RoundTripMS float64   `json:"round_trip_ms"` // 0: not known
	Clients     int       `json:"clients"`
	Draining    bool      `json:"draining,omitempty"`
}

type client struct {
	Remote   string    `json:"remote"`
	Since    time.Time `json:"since"`
	BytesIn  int64     `json:"bytes_in"`
	BytesOut int64     `json:"bytes_out"`
}

type event struct {
	Time    time.Time `json:"time"`
	Kind    string    `json:"kind"`
	Times   int       `json:"times"` // how many such came in a row, of which this is the last
	Service string    `json:"service,omitempty"`
	Remote  string    `json:"remote,omitempty"`
	Error   string    `json:"error,omitempty"`
}

// snapshot returns the services, and what was moved in all.
func (s *status) snapshot() ([]relay.ServiceInfo, moved) {
	gone := s.chronicle.gone()
	infos := s.relay.Services()
	return infos, s.chronicle.total(gone, infos)
}

// json answers with a report. The query says how many clients of a service are to be in it,
// 20 if it does not, with service= of which services, and with plots=1 that the rates of
// the last minutes are.
func (s *status) json(w http.ResponseWriter, r *http.Request) {
	top := 20
	if q := r.FormValue("clients"); q != "" {
		n, err := strconv.Atoi(q)
		if err != nil || n < 0 {
			http.Error(w, "clients: a number is wanted", http.StatusBadRequest)
			return
		}
		top = n
	}
	of := r.Form["service"]
	infos, total := s.snapshot()
	services := make([]service, len(infos))
	for i := range infos {
		n := top
		if of != nil && !slices.Contains(of, infos[i].Name) {
			n = 0
		}
		services[i] = describe(&infos[i], n)
	}
	b, err := json.Marshal(s.report(time.Now(), services, total, r.FormValue("plots") == "1"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(b)
}

// report completes what was said of services.
func (s *status) report(now time.Time, services []service, total moved, plots bool) *report {
	r := &report{
		Version:  cli.Version(),
		Since:    s.chronicle.since,
		Now:      now,
		Draining: s.draining.Load(),
		Refusals: s.relay.Refusals(),
		Services: services,
		Events:   []event{},
	}
	c := s.chronicle
	c.mu.Lock()
	defer c.mu.Unlock()
	r.Totals = totals{c.registered, c.clients, total.in, total.out}
	for _, h := range c.happened {
		e := event{Time: h.Time, Kind: string(h.Kind), Times: h.times, Service: h.Service, Remote: h.Remote}
		if h.Err != nil {
			e.Error = h.Err.Error()
		}
		r.Events = append(r.Events, e)
	}
	for i := range services {
		sv := &services[i]
		p := c.plots[serviceKey{sv.Name, sv.Since}]
		if p == nil || len(p.in) == 0 {
			continue // it has just come
		}
		sv.RateIn, sv.RateOut = p.in[len(p.in)-1], p.out[len(p.out)-1]
		if plots {
			sv.PlotIn, sv.PlotOut = slices.Clone(p.in), slices.Clone(p.out)
		}
	}
	return r
}

func describe(info *relay.ServiceInfo, top int) service {
	s := service{
		Name:     info.Name,
		Address:  info.Address,
		Hostname: info.Hostname,
		Identity: info.Identity,
		Shared:   info.Shared,
		State:    stateOf(info),
		Since:    info.Since,
		Clients:  len(info.Clients),
		Waiting:  info.Waiting,
		Accepted: info.Accepted,
		Refused:  info.Refused,
		Refusals: info.Refusals,
		BytesIn:  info.BytesIn,
		BytesOut: info.BytesOut,
		Sessions: make([]session, len(info.Sessions)),
	}
	for i, m := range info.Sessions {
		s.Sessions[i] = session{m.Remote, m.Since, m.LastHeard, float64(m.RoundTrip) / 1e6, m.Clients, m.Draining}
	}
	if top > 0 {
		slices.SortStableFunc(info.Clients, func(a, b relay.ClientInfo) int {
			return cmp.Compare(b.BytesIn+b.BytesOut, a.BytesIn+a.BytesOut)
		})
	}
	for _, c := range info.Clients[:min(top, len(info.Clients))] {
		s.Top = append(s.Top, client(c))
	}
	return s
}

func stateOf(info *relay.ServiceInfo) string {
	switch {
	case info.Draining:
		return "draining"
	case slices.ContainsFunc(info.Sessions, func(m relay.SessionInfo) bool { return !m.Draining }):
		return "live"
	}
	return "away"
}
