package peers

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/coder/websocket"

	"github.com/tcprelay/relay"
)

// TestHostsInBrowser has Chromium use two services with certificates of their own and one
// without TLS, all behind one public port: pages, HTTP/2, WebSockets, and a service that
// goes away.
func TestHostsInBrowser(t *testing.T) {
	srv, err := relay.NewServer(relay.WithLimits(relay.Limits{WaitTime: -1}))
	if err != nil {
		t.Fatal(err)
	}
	registration, public := listenTCP(t), listenTCP(t)
	var serving sync.WaitGroup
	serving.Go(func() { srv.ServeHosts(public) })
	serving.Go(func() { srv.Serve(registration) })
	t.Cleanup(func() {
		srv.Close()
		serving.Wait()
	})
	_, port, _ := net.SplitHostPort(public.Addr().String())

	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "<!doctype html><title>%s</title><link rel=icon href=data:,><p>%s over %s", r.Host, r.Host, r.Proto)
	})
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		ws, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer ws.CloseNow()
		if kind, b, err := ws.Read(r.Context()); err == nil {
			ws.Write(r.Context(), kind, append([]byte(r.Host+" heard "), b...))
			ws.Close(websocket.StatusNormalClosure, "")
		}
	})
	var pins []string
	start := func(host string, withTLS bool) (end func()) {
		t.Helper()
		ln, err := relay.Register(t.Context(), registration.Addr().String(), relay.WithHostname(host), relay.WithWait())
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: mux}
		var all sync.WaitGroup
		if withTLS {
			cert, _, _ := hostCert(t, host)
			leaf, err := x509.ParseCertificate(cert.Certificate[0])
			if err != nil {
				t.Fatal(err)
			}
			pins = append(pins, strings.TrimPrefix(relay.Pin(leaf), "sha256//"))
			s.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}}
			all.Go(func() { s.ServeTLS(ln, "", "") })
		} else {
			all.Go(func() { s.Serve(ln) })
		}
		end = func() {
			s.Close()
			all.Wait()
			<-ln.Done()
		}
		t.Cleanup(end)
		return end
	}
	start("one.example.test", true)
	endTwo := start("two.example.test", true)
	start("plain.example.test", false)

	// The certificates are good for who knows their keys; a wrong one for the host, or
	// another one on the way, would not be.
	b := openBrowser(t, map[string]any{
		"host-resolver-rules":                 "MAP *.example.test 127.0.0.1",
		"ignore-certificate-errors-spki-list": strings.Join(pins, ","),
		"disable-features":                    "HttpsUpgrades,HttpsFirstBalancedModeAutoEnable,Translate",
	})
	for _, tt := range []struct{ scheme, ws, host, proto, next string }{
		{"https", "wss", "one.example.test", "HTTP/2.0", "h2"},
		{"https", "wss", "two.example.test", "HTTP/2.0", "h2"},
		{"http", "ws", "plain.example.test", "HTTP/1.1", "http/1.1"},
	} {
		hostport := tt.host + ":" + port
		b.do(chromedp.Navigate(tt.scheme + "://" + hostport + "/"))
		if got, want := eval[string](b, "document.body.innerText"), hostport+" over "+tt.proto; got != want {
			t.Errorf("%s: the page says %q, want %q", tt.host, got, want)
		}
		if got := eval[string](b, `performance.getEntriesByType("navigation")[0].nextHopProtocol`); got != tt.next {
			t.Errorf("%s: the browser speaks %q, want %q", tt.host, got, tt.next)
		}
		got := eval[string](b, fmt.Sprintf(`new Promise((done, failed) => {
			const ws = new WebSocket(%q);
			ws.onopen = () => ws.send("hello");
			ws.onmessage = (e) => done(e.data);
			ws.onerror = () => failed(new Error("WebSocket"));
		})`, tt.ws+"://"+hostport+"/ws"))
		if want := hostport + " heard hello"; got != want {
			t.Errorf("%s: the WebSocket says %q, want %q", tt.host, got, want)
		}
	}
	if said := b.console(); len(said) > 0 {
		t.Errorf("the console has %q", said)
	}

	// Nobody has a name any more, or never had it: a clear answer, and the others go on.
	endTwo()
	failure := func(url string) string {
		t.Helper()
		err := chromedp.Do(b.ctx, chromedp.Navigate(url))
		if err == nil {
			t.Errorf("%s: a page", url)
			return ""
		}
		return err.Error()
	}
	for _, host := range []string{"two.example.test", "nobody.example.test"} {
		if got := failure("https://" + host + ":" + port + "/again"); !strings.Contains(got, "ERR_SSL_UNRECOGNIZED_NAME_ALERT") {
			t.Errorf("%s: %s", host, got)
		}
	}
	b.do(chromedp.Navigate("http://nobody.example.test:" + port + "/"))
	if got := eval[string](b, "document.body.innerText"); !strings.Contains(got, "no service of this name") {
		t.Errorf("of a name that nobody has: %q", got)
	}
	b.do(chromedp.Navigate("https://one.example.test:" + port + "/"))
}
