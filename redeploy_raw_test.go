package relay_test

import (
	"slices"
	"sync"
	"testing"

	"github.com/tcprelay/relay"
)

// A protocol is one of those that raw clients and apps speak: a request of an 8-byte
// number, a 4-byte size, and so many bytes, and an answer of the number and the bytes'
// sum.
type protocol struct {
	name   string
	greets bool // the app speaks first, and the client waits for that
	size   int  // of the request's bytes, sent all at once
	ends   bool // the client half-closes behind the request
}

var protocols = []protocol{
	{name: "client first"},
	{name: "server first", greets: true},
	{name: "40 KB at once", size: 40_000},
	{name: "40 KB and the end", size: 40_000, ends: true},
	{name: "server first, then 40 KB", greets: true, size: 40_000},
}

const greeting = "220 ready\n"

// A rawPeer is an app that speaks a protocol to whom it accepts.
type rawPeer struct {
	ln      *relay.Listener
	p       protocol
	served  *ledger
	enough  chan struct{}
	clients sync.WaitGroup // and who accepts them
}

func startRaw(t testing.TB, addr string, p protocol, b *ledger, opts ...relay.RegisterOption) *rawPeer {
	t.Helper()
	opts = append(opts, relay.WithName("raw"), relay.WithShared())
	return &rawPeer{ln: register(t, addr, opts...), p: p, served: b, enough: make(chan struct{})}
}

// Clients whom an app has not accepted when it closes its listener are given to
// another, with all that they have sent.
func TestCloseGivesClientsAway(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			srv, addr := startRelay(t)
			check := nothingLeft(t)
			var served ledger
			old := startRaw(t, addr, p, &served)
			const n = 20
			var clients sync.WaitGroup
			for i := range n {
				clients.Go(func() {
					if err := p.request(old.ln.Addr().String(), int64(i+1)); err != nil {
						t.Errorf("client %d: %v", i+1, err)
					}
				})
			}
			var sent int64
			if !p.greets {
				sent = n * int64(12+p.size)
			}
			eventually(t, "all at the old app", func() bool {
				s := srv.Services()[0]
				return s.Sessions[0].Clients == n && s.BytesIn == sent
			})
			next := startRaw(t, addr, p, &served)
			next.accept(t)
			old.close(t)
			clients.Wait()
			served.expectOnce(t, n)
			expectNoneRefused(t, srv)
			if o, n_ := old.ln.Stats(), next.ln.Stats(); o.Accepted != 0 || o.Refused != n || n_.Accepted != n || n_.Refused != 0 {
				t.Errorf("the old app %+v, the next %+v", o, n_)
			}
			eventually(t, "the clients' leaving", func() bool { return len(srv.Services()[0].Clients) == 0 })
			if s := srv.Services()[0]; s.Accepted != n || s.Refused != 0 || s.BytesIn != n*int64(12+p.size) || s.BytesOut != next.ln.Stats().BytesOut {
				t.Errorf("service %+v", s)
			}
			next.close(t)
			check()
		})
	}
}

// The same while clients come and go, and apps do, too. An app that is to go is slow,
// so that each leaves some clients unaccepted.
func TestRedeployRaw(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			srv, addr := startRelay(t)
			check := nothingLeft(t)
			var served ledger
			app := startRaw(t, addr, p, &served)
			app.accept(t)
			public := app.ln.Addr().String()
			load := startLoad(t, 8, func(int) func(int64) error {
				return func(id int64) error { return p.request(public, id) }
			})
			moved := int64(0)
			for range 10 {
				load.more(20)
				next := startRaw(t, addr, p, &served)
				next.accept(t)
				close(app.enough)
				eventually(t, "clients that the app has not accepted", func() bool {
					s := slices.DeleteFunc(sessions(t, srv), func(s relay.SessionInfo) bool { return s.Draining })
					return len(s) == 2 && app.ln.Stats().Live == 0 && s[0].Clients > 1 || t.Failed()
				})
				app.close(t)
				moved += app.ln.Stats().Refused
				app = next
			}
			load.more(20)
			load.end()
			served.expectOnce(t, load.ids.Load())
			expectNoneRefused(t, srv)
			if moved == 0 {
				t.Error("every client was accepted by the app that it was first given to")
			}
			app.close(t)
			check()
		})
	}
}
