// Command quickstart does the library's main job in one process. It runs a relay on
// loopback, and an http.Server behind it that never listens on a port of its own.
// Then it uses that server as an outside client would, through its public address
// alone, and checks every byte: a page, a large download, a large upload, and a
// connection that is upgraded to another protocol.
//
//	go run ./examples/quickstart
//
// With -serve the server stays up for a browser, until SIGINT.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"html/template"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tcprelay/relay"
)

const (
	size    = 64 << 20 // bytes of a transfer
	crowd   = 100      // clients at once
	upgrade = "line-echo"
)

func main() {
	serve := flag.Bool("serve", false, "stay up for a browser, until SIGINT")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *serve); err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

// run starts the relay and the app, which would be two programs on two machines
// otherwise, and uses the app.
func run(ctx context.Context, serve bool) error {
	// The relay. Its address is the only thing that an app needs to know.
	srv, err := relay.NewServer()
	if err != nil {
		return err
	}
	registration, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go srv.Serve(registration)
	defer srv.Close()

	// The app. But for Register it is any http.Server.
	public, err := relay.Register(ctx, registration.Addr().String(), relay.WithName("quickstart"))
	if err != nil {
		return err
	}
	app := &http.Server{Handler: routes()}
	go app.Serve(public)
	defer app.Close()

	url := "http://" + public.Addr().String()
	report("relay", "services register at %v", registration.Addr())
	report("app", "registered, its public address is %v", public.Addr())
	if serve {
		report("serving", "%s until SIGINT", url)
		<-ctx.Done()
		return shutdown(app)
	}
	if err := useAll(ctx, url); err != nil {
		return err
	}
	if err := shutdown(app); err != nil {
		return err
	}
	stats := public.Stats()
	report("totals", "%d connections, %s in, %s out", stats.Accepted, human(stats.BytesIn), human(stats.BytesOut))
	return nil
}

// shutdown ends the app as any http.Server ends: requests that run may finish.
func shutdown(app *http.Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return app.Shutdown(ctx)
}

// The app's side.

func routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", servePage)
	mux.HandleFunc("GET /download", serveDownload)
	mux.HandleFunc("POST /upload", serveUpload)
	mux.HandleFunc("GET /echo", serveEcho)
	return mux
}

var page = template.Must(template.New("page").Parse(`<!doctype html>
<meta name="viewport" content="width=device-width">
<title>relay quickstart</title>
<h1>It works</h1>
<p>You are {{.RemoteAddr}}, and this server listens on no port of its own.
<p><a href="download">Download 64 MiB</a>
<p><label>SHA-256 of a file: <input type="file"></label> <output></output>
<script>
document.querySelector("input").onchange = async e => {
	const answer = await fetch("upload", {method: "POST", body: e.target.files[0]})
	document.querySelector("output").value = await answer.text()
}
</script>
`))

// servePage shows the client's address, which is that of the client, not the relay's.
func servePage(w http.ResponseWriter, r *http.Request) {
	page.Execute(w, r)
}

func serveDownload(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", fmt.Sprint(size))
	io.Copy(w, content())
}

func serveUpload(w http.ResponseWriter, r *http.Request) {
	sum, err := hash(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	io.WriteString(w, sum)
}

// serveEcho takes the connection over from HTTP, as a WebSocket library does, and
// sends every line back.
func serveEcho(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") != upgrade {
		http.Error(w, "upgrade to "+upgrade, http.StatusUpgradeRequired)
		return
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer conn.Close()
	fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", upgrade)
	for rw.Flush() == nil {
		line, err := rw.ReadString('\n')
		if err != nil {
			return
		}
		rw.WriteString(line)
	}
}

// The outside client's side. It knows nothing but the public address.

func useAll(ctx context.Context, url string) error {
	defer http.DefaultClient.CloseIdleConnections()
	want, err := hash(content())
	if err != nil {
		return err
	}
	if err := usePage(ctx, url); err != nil {
		return err
	}
	if err := useDownload(ctx, url, want); err != nil {
		return err
	}
	if err := useUpload(ctx, url, want); err != nil {
		return err
	}
	if err := useEcho(ctx, url); err != nil {
		return err
	}
	return useCrowd(ctx, url)
}

func usePage(ctx context.Context, url string) error {
	self, n, err := getPage(ctx, url)
	if err != nil {
		return err
	}
	report("page", "%s, and it names its client, %s", human(n), self)
	return nil
}

// getPage gets the page on a connection of its own and checks that it names this end
// of it. It returns that address and the size of the page.
func getPage(ctx context.Context, url string) (self string, n int64, err error) {
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) { self = info.Conn.LocalAddr().String() },
	})
	body, err := fetch(ctx, "GET", url, http.Header{"Connection": {"close"}}, nil)
	if err != nil {
		return "", 0, err
	}
	defer body.Close()
	text, err := io.ReadAll(body)
	if err != nil {
		return "", 0, err
	}
	if !strings.Contains(string(text), "You are "+self+",") {
		return "", 0, fmt.Errorf("page does not name its client %s: %s", self, text)
	}
	return self, int64(len(text)), nil
}

func useDownload(ctx context.Context, url, want string) error {
	start := time.Now()
	body, err := fetch(ctx, "GET", url+"/download", nil, nil)
	if err != nil {
		return err
	}
	defer body.Close()
	got, err := hash(body)
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("download: SHA-256 is %s, not %s", got, want)
	}
	report("download", "%s, SHA-256 as expected, %s", human(size), rate(start))
	return nil
}

func useUpload(ctx context.Context, url, want string) error {
	start := time.Now()
	body, err := fetch(ctx, "POST", url+"/upload", nil, content())
	if err != nil {
		return err
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	if string(got) != want {
		return fmt.Errorf("upload: the app's SHA-256 is %s, not %s", got, want)
	}
	report("upload", "%s, the app's SHA-256 is the same, %s", human(size), rate(start))
	return nil
}

// useEcho upgrades a connection and talks over it, a line at a time.
func useEcho(ctx context.Context, url string) error {
	header := http.Header{"Connection": {"Upgrade"}, "Upgrade": {upgrade}}
	body, err := fetch(ctx, "GET", url+"/echo", header, nil)
	if err != nil {
		return err
	}
	defer body.Close()
	conn, ok := body.(io.ReadWriter) // as net/http says of a 101
	if !ok {
		return errors.New("echo: the connection was not upgraded")
	}
	r := bufio.NewReader(conn)
	lines := []string{"one", "two", "three"}
	for _, line := range lines {
		if _, err := fmt.Fprintln(conn, line); err != nil {
			return fmt.Errorf("echo: %w", err)
		}
		got, err := r.ReadString('\n')
		if err != nil {
			return fmt.Errorf("echo: %w", err)
		}
		if got != line+"\n" {
			return fmt.Errorf("echo: sent %q, got %q", line, got)
		}
	}
	report("upgrade", "to %s, %d lines there and back", upgrade, len(lines))
	return nil
}

// useCrowd has many clients, each on a connection of its own, at the same time.
func useCrowd(ctx context.Context, url string) error {
	g, ctx := errgroup.WithContext(ctx)
	for range crowd {
		g.Go(func() error {
			_, _, err := getPage(ctx, url)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	report("crowd", "%d clients at once, each got the page that names it", crowd)
	return nil
}

// fetch makes a request and returns the body of a good answer.
func fetch(ctx context.Context, method, url string, header http.Header, body io.Reader) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	req.Header = header
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= 300 {
		resp.Body.Close()
		return nil, fmt.Errorf("%s %s: %s", method, url, resp.Status)
	}
	return resp.Body, nil
}

// What both sides know.

// content returns the bytes of a transfer: random ones, the same every time.
func content() io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{}), size)
}

func hash(r io.Reader) (string, error) {
	h := sha256.New()
	_, err := io.Copy(h, r)
	return fmt.Sprintf("%x", h.Sum(nil)), err
}

func report(what, format string, args ...any) {
	fmt.Printf("%-9s "+format+"\n", append([]any{what}, args...)...)
}

func human(n int64) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}

// rate returns that of a transfer that began at start.
func rate(start time.Time) string {
	return fmt.Sprintf("%.0f MB/s", size/1e6/time.Since(start).Seconds())
}
