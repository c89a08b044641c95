package relay_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// arrivals notes when connections come to a listener.
type arrivals struct {
	net.Listener
	mu    sync.Mutex
	times []time.Time
}

// raceDetector reports whether this program was built with it.
func raceDetector() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

func manyApps() int {
	n := figure(1000, 200, 50)
	if raceDetector() {
		n = min(n, 700) // it ends a program of more than 8128 goroutines
	}
	return n
}

// A relay that is started anew has all its apps come back to it, each with the port it
// had. They do not try all the time, and while they do, and most are refused because too
// many are registering, the relay does its work.
func TestReconnectingApps(t *testing.T) {
	n := manyApps()
	const minWait, maxWait = time.Second, 2 * time.Second
	check := nothingLeft(t)
	ports := freePorts(t, n)
	opts := []relay.ServerOption{relay.WithPorts(ports, ports+n-1), relay.WithLease(time.Hour)}
	srv, addr := startRelay(t, opts...)
	apps := make([]*relay.Listener, n)
	addrs := make([]string, n)
	for i := range apps {
		apps[i] = register(t, addr, relay.WithBackoff(minWait, maxWait))
		addrs[i] = apps[i].Addr().String()
	}
	begin := time.Now()
	srv.Close()

	const perIP = 16 // the default
	next, err := relay.NewServer(relay.WithLimits(relay.Limits{PendingPerIP: perIP}))
	if err != nil {
		t.Fatal(err)
	}
	unix, err := net.Listen("unix", filepath.Join(t.TempDir(), "relay"))
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, next, unix)
	bystander := register(t, "unix", relay.WithName("bystander"), relay.WithDialer(func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", unix.Addr().String())
	}))
	go serveEcho(bystander)
	client := dial(t, bystander)
	works := func() { // for who is there, and for who comes
		t.Helper()
		echoes(t, client)
		c := dial(t, bystander)
		echoes(t, c)
		c.Close()
	}

	// All that may be registering from this address are there already, and silent.
	before := serve(t, next, "127.0.0.1:0")
	var silent []net.Conn
	for range perIP + 1 {
		c, err := net.Dial("tcp", before)
		if errors.Is(err, syscall.ECONNRESET) {
			break // so soon
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	eventually(t, "one refusal", func() bool { return next.Refusals()["pending_per_ip"] == 1 })

	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	came := &arrivals{Listener: ln}
	serveOn(t, next, came)
	eventually(t, "as many refusals as there are apps", func() bool {
		works()
		return next.Refusals()["pending_per_ip"] > int64(n)
	})
	if s := next.Services(); len(s) != 1 {
		t.Fatalf("%d services", len(s))
	}
	for _, c := range silent {
		c.Close()
	}
	eventually(t, "all back", func() bool {
		works()
		return len(next.Services()) == n+1
	})
	took := time.Since(begin)
	attempts := len(came.all())
	t.Logf("%d apps came back in %v and %d attempts", n, took, attempts)
	if limit := n * int(1+took/(minWait/10)); attempts > limit {
		t.Errorf("%d attempts in %v, where none waits less than %v", attempts, took, minWait/10)
	}

	for i, l := range apps {
		eventually(t, "the app's knowing", func() bool { return l.Stats().Reconnects == 1 })
		if got := l.Addr().String(); got != addrs[i] {
			t.Fatalf("app %d is at %s and was at %s", i, got, addrs[i])
		}
		c, err := net.Dial("tcp", addrs[i])
		if err != nil {
			t.Fatalf("app %d: %v", i, err)
		}
		a := accept(t, l)
		sendAndExpect(t, c, a)
		a.Close()
		c.Close()
	}
	client.Close()
	for _, l := range append(apps, bystander) {
		l.Close()
	}
	for _, l := range append(apps, bystander) {
		within(t, "Done", l.Done())
	}
	next.Close()
	check()
}

// Apps that lost their relay together do not come back together: they are spread over
// the longest wait, when the relay was away for long.
func TestReconnectingAppsSpread(t *testing.T) {
	ofSessions(t)
	synctest.Test(t, func(t *testing.T) {
		n := manyApps()
		const minWait, maxWait = time.Second, time.Minute
		network := memnet.New()
		listen := func(address string) net.Listener {
			ln, err := network.Listen(t.Context(), "tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			return ln
		}
		start := func(ln net.Listener) *relay.Server {
			srv, err := relay.NewServer(relay.WithListen(network.Listen))
			if err != nil {
				t.Fatal(err)
			}
			serveOn(t, srv, ln)
			return srv
		}
		ln := listen("10.0.0.1:0")
		srv := start(ln)
		apps := make([]*relay.Listener, n)
		addrs := make([]string, n)
		for i := range apps {
			apps[i] = register(t, ln.Addr().String(), relay.WithBackoff(minWait, maxWait), relay.WithDialer(network.Dial))
			addrs[i] = apps[i].Addr().String()
		}
		srv.Close()
		time.Sleep(10 * maxWait)
		back := time.Now()
		came := &arrivals{Listener: listen(ln.Addr().String())}
		start(came)
		time.Sleep(maxWait)
		synctest.Wait()
		for i, l := range apps {
			if s := l.Stats(); !s.Connected || s.Reconnects != 1 || l.Addr().String() != addrs[i] {
				t.Errorf("app %d, of %s, is at %v: %+v", i, addrs[i], l.Addr(), s)
			}
		}
		times := came.all()
		if len(times) != n {
			t.Errorf("%d attempts of %d apps", len(times), n)
		}
		quarters := make([]int, 4)
		for _, at := range times {
			quarters[min(3, 4*at.Sub(back)/maxWait)]++
		}
		if slices.Max(quarters) > n*3/4 || quarters[2]+quarters[3] < n/20 {
			t.Errorf("in the quarters of the longest wait came %d", quarters)
		}
	})
}
