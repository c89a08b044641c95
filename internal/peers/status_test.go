package peers

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/tcprelay/relay"
)

// nasty is a name that would do something in a page that took it for more than text, and
// in the formats of programs too.
const nasty = "<script>document.title='taken over'</script> \"quoted\\ \n second line"

// A statusSite is a relayd with a status page, and what registers there.
type statusSite struct {
	relayd *program
	at     string // that services register at
	url    string // of the page
}

func startStatus(t *testing.T, relayd string, args ...string) *statusSite {
	t.Helper()
	s := &statusSite{relayd: startExample(t, relayd, append([]string{"-listen", "127.0.0.1:0", "-status", "127.0.0.1:0"}, args...)...)}
	s.at = s.relayd.awaitLine(t, "the relay's address", listening)
	s.url = s.relayd.awaitLine(t, "the page's address", func(line string) (string, bool) {
		_, url, ok := strings.Cut(line, "url=")
		return url, ok
	})
	return s
}

func (s *statusSite) register(t *testing.T, opts ...relay.RegisterOption) *relay.Listener {
	t.Helper()
	ln, err := relay.Register(t.Context(), s.at, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go serveEcho(ln)
	return ln
}

func (s *statusSite) get(t *testing.T, path string) (status int, kind string, body []byte) {
	t.Helper()
	resp, err := http.Get(s.url + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header.Get("Content-Type"), body
}

// A breakable is an app that can be taken off the network, and stays away.
type breakable struct {
	mu    sync.Mutex
	conns []net.Conn
	away  bool
}

func (b *breakable) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.away {
		return nil, fmt.Errorf("the app is away")
	}
	c, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err == nil {
		b.conns = append(b.conns, c)
	}
	return c, err
}

func (b *breakable) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.away = true
	for _, c := range b.conns {
		c.Close()
	}
}

// visitors connects clients, which send and receive until end is called.
func visitors(t *testing.T, addr string, n int) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	end = func() {
		cancel()
		all.Wait()
	}
	t.Cleanup(end)
	for range n {
		c := dialTCP(t, addr)
		all.Go(func() {
			defer c.Close()
			b := bytes.Repeat([]byte("traffic."), 2048)
			for ctx.Err() == nil {
				if _, err := c.Write(b); err != nil {
					t.Errorf("a client: %v", err)
					return
				}
				if _, err := io.ReadFull(c, b); err != nil {
					t.Errorf("a client: %v", err)
					return
				}
				time.Sleep(20 * time.Millisecond) // its pace
			}
		})
	}
	return end
}

func TestStatus(t *testing.T) {
	relayd := filepath.Join(buildExamples(t, "relayd"), "relayd")
	t.Run("Page", func(t *testing.T) { statusPage(t, relayd) })
	t.Run("Metrics", func(t *testing.T) { statusMetrics(t, relayd) })
	t.Run("Loopback", func(t *testing.T) { statusLoopback(t, relayd) })
}

// statusPage reads the page in a browser while there is traffic.
func statusPage(t *testing.T, relayd string) {
	s := startStatus(t, relayd, "-lease", "10m")
	b := openBrowser(t, nil)
	b.look(1280, 800, "light")
	b.do(chromedp.Navigate(s.url))
	b.until(`document.getElementById("none").textContent === "No service is registered."`)

	// It follows what happens without being loaded again.
	web := s.register(t, relay.WithName("web"))
	s.register(t, relay.WithName(nasty))
	s.register(t) // without a name
	lost := new(breakable)
	s.register(t, relay.WithName("laptop"), relay.WithDialer(lost.dial), relay.WithBackoff(time.Hour, time.Hour))
	end := visitors(t, web.Addr().String(), 3)
	b.until(`document.getElementById("services").textContent === "4" && document.getElementById("clients").textContent === "3"`)
	lost.leave()
	b.until(`[...document.querySelectorAll("details")].some((d) => d.querySelector(".name").textContent === "laptop" && d.querySelector(".badge").textContent === "away")`)
	row := `[...document.querySelectorAll("details")].find((d) => d.querySelector(".name").textContent === "web")`
	b.until(row + `.querySelector(".count").textContent === "3 clients"`)
	b.until(`/^↑ [0-9.]+ [kM]B\/s$/.test(` + row + `.querySelector(".in").textContent)`)
	b.until(`document.querySelector("#plot .i").getAttribute("d").split("L").length > 3 && ` +
		row + `.querySelector(".spark .o").getAttribute("d").split("L").length > 3`)
	b.until(`document.getElementById("events").innerText.includes("laptop")`)

	// What peers say is text.
	if got := eval[string](b, `[...document.querySelectorAll(".name")].map((e) => e.textContent).find((s) => s.includes("script"))`); got != nasty {
		t.Errorf("the name is shown as %q", got)
	}
	if title, scripts := eval[string](b, "document.title"), eval[int](b, `document.querySelectorAll("script").length`); title != "relay" || scripts != 1 {
		t.Errorf("the page has %d scripts and the title %q", scripts, title)
	}

	// With the keyboard alone: "/" to the filter, on to the row, and open it.
	b.slash()
	b.do(chromedp.KeyEvent("web"))
	b.until(`[...document.querySelectorAll("details")].filter((d) => !d.hidden).length === 1`)
	b.do(chromedp.KeyEvent("\t"), chromedp.KeyEvent("\r"))
	b.until(row + `.open && ` + row + `.querySelectorAll("table").length === 2 && ` + row + `.innerText.includes("127.0.0.1:")`)
	before := eval[string](b, `document.getElementById("moved").textContent`)
	b.until(`document.getElementById("moved").textContent !== ` + quoted(before)) // it goes on
	if !eval[bool](b, row+`.open && document.activeElement === `+row+`.querySelector("summary")`) {
		t.Error("the row did not stay open and in focus")
	}
	b.slash()
	b.do(chromedp.KeyEvent("\x1b"))
	b.until(`[...document.querySelectorAll("details")].filter((d) => !d.hidden).length === 4`)
	b.shoot("wide-light")

	// In the dark, and on a phone, where nothing is wider than it.
	light := eval[string](b, "getComputedStyle(document.body).backgroundColor")
	b.look(1280, 800, "dark")
	if dark := eval[string](b, "getComputedStyle(document.body).backgroundColor"); dark == light {
		t.Errorf("dark mode has the background %s too", dark)
	}
	b.shoot("wide-dark")
	for _, scheme := range []string{"light", "dark"} {
		b.look(360, 740, scheme)
		if wide := eval[int](b, "document.documentElement.scrollWidth"); wide > 360 {
			t.Errorf("the page is %d pixels wide on a phone of 360", wide)
		}
		b.shoot("phone-" + scheme)
	}

	if said := b.console(); len(said) > 0 {
		t.Errorf("the console has %q", said)
	}
	end()
	s.relayd.stop(t)
	b.until(`!document.getElementById("silent").hidden`)
}

// statusMetrics has Prometheus' own library read the metrics while they change, and its
// linter look at them.
func statusMetrics(t *testing.T, relayd string) {
	s := startStatus(t, relayd)
	web := s.register(t, relay.WithName("web"))
	s.register(t, relay.WithName(nasty))
	end := visitors(t, web.Addr().String(), 2)

	// A name that its service gave up, but for a client who stays, and another one has.
	old := s.register(t, relay.WithName("twice"))
	c := dialTCP(t, old.Addr().String())
	wantExchange(t, c, c, "hello")
	old.Close()
	wantRefused(t, old.Addr().String())
	again := s.register(t, relay.WithName("twice"))
	d := dialTCP(t, again.Addr().String())
	wantExchange(t, d, d, "there")

	parse := func() (map[string]*dto.MetricFamily, []byte) {
		t.Helper()
		status, kind, body := s.get(t, "metrics")
		if status != http.StatusOK || !strings.HasPrefix(kind, "text/plain; version=0.0.4") {
			t.Fatalf("%d, %s", status, kind)
		}
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(bytes.NewReader(body))
		if err != nil {
			t.Fatalf("%v\n%s", err, body)
		}
		return families, body
	}
	value := func(families map[string]*dto.MetricFamily, name, service string) float64 {
		t.Helper()
		for _, m := range families[name].GetMetric() {
			if len(m.Label) == 1 && m.Label[0].GetValue() == service || service == "" && len(m.Label) == 0 {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
		t.Fatalf("no %s of %q", name, service)
		return 0
	}
	wants := []struct {
		name, service string
		value         float64
	}{
		{"relay_services", "", 4}, {"relay_registrations_total", "", 4}, {"relay_draining", "", 0},
		{"relay_service_clients", "web", 2}, {"relay_service_accepted_clients_total", "web", 2},
		{"relay_service_clients", nasty, 0}, {"relay_service_apps", nasty, 1},
		{"relay_service_clients", "twice", 2}, {"relay_service_received_bytes_total", "twice", 5}, {"relay_service_sent_bytes_total", "twice", 5},
	}
	families, body := parse()
	for giveUp := time.Now().Add(patience); time.Now().Before(giveUp); families, body = parse() {
		all := true
		for _, want := range wants {
			all = all && value(families, want.name, want.service) == want.value
		}
		if all {
			break
		}
	}
	for _, want := range wants {
		if got := value(families, want.name, want.service); got != want.value {
			t.Errorf("%s of %q is %v, want %v", want.name, want.service, got, want.value)
		}
	}
	for name, f := range families {
		seen := make(map[string]bool)
		for _, m := range f.Metric {
			key := fmt.Sprint(m.Label)
			if seen[key] {
				t.Errorf("%s has the labels %s twice", name, key)
			}
			seen[key] = true
		}
	}
	problems, err := promlint.New(bytes.NewReader(body)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("the linter says %v, %v", problems, err)
	}
	for giveUp := time.Now().Add(patience); ; {
		next, _ := parse()
		grown := true
		for _, name := range []string{"relay_service_received_bytes_total", "relay_service_sent_bytes_total"} {
			grown = grown && value(next, name, "web") > value(families, name, "web")
		}
		for _, name := range []string{"relay_received_bytes_total", "relay_sent_bytes_total"} {
			grown = grown && value(next, name, "") > value(families, name, "")
		}
		if grown {
			break
		}
		if time.Now().After(giveUp) {
			t.Fatal("bytes are not counted")
		}
	}

	// The same as JSON.
	_, kind, body := s.get(t, "status.json?clients=1")
	var r struct {
		Services []struct {
			Name    string
			Clients int
			Top     []struct{ Remote string } `json:"top_clients"`
		}
	}
	if err := json.Unmarshal(body, &r); err != nil || kind != "application/json" {
		t.Fatalf("%v, %s\n%s", err, kind, body)
	}
	got := make(map[string]int)
	for _, sv := range r.Services {
		got[sv.Name] += sv.Clients
		if len(sv.Top) != min(1, sv.Clients) {
			t.Errorf("%q shows %d clients of %d", sv.Name, len(sv.Top), sv.Clients)
		}
	}
	if want := map[string]int{"web": 2, nasty: 0, "twice": 2}; !maps.Equal(got, want) {
		t.Errorf("clients of services %v, want %v", got, want)
	}
	if status, _, body := s.get(t, "healthz"); status != http.StatusOK || string(body) != "ok\n" {
		t.Errorf("healthz: %d, %q", status, body)
	}
	end()
	s.relayd.signal(t)
	for giveUp := time.Now().Add(patience); ; {
		if status, _, _ := s.get(t, "healthz"); status == http.StatusServiceUnavailable {
			break
		}
		if time.Now().After(giveUp) {
			t.Fatal("a relay that drains says that it is healthy")
		}
	}
	c.Close()
	d.Close()
	s.relayd.wantDrained(t)
}

// statusLoopback checks that the page is for this machine alone if nothing else is said.
func statusLoopback(t *testing.T, relayd string) {
	for _, addr := range []string{":0", "0"} {
		p := startExample(t, relayd, "-listen", "127.0.0.1:0", "-status", addr)
		url := p.awaitLine(t, "the page's address", func(line string) (string, bool) {
			_, url, ok := strings.Cut(line, "url=")
			return url, ok
		})
		if !strings.HasPrefix(url, "http://127.0.0.1:") {
			t.Errorf("-status %s is at %s", addr, url)
		}
		// A page of somebody else's, whose name leads here, does not get to read it.
		for host, want := range map[string]int{"": 200, "localhost": 200, "evil.example": 403, "127.0.0.1.evil.example": 403} {
			req, err := http.NewRequestWithContext(t.Context(), "GET", url+"status.json", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = host
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != want {
				t.Errorf("for the host %q: %s, want %d", host, resp.Status, want)
			}
		}
	}
}
