package greeting

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

const limit = 16 << 10

// clientHello returns what package tls says first.
func clientHello(t testing.TB, config *tls.Config) []byte {
	t.Helper()
	var b bytes.Buffer
	config.InsecureSkipVerify = true
	err := tls.Client(&mute{w: &b}, config).Handshake()
	if err == nil || b.Len() == 0 {
		t.Fatalf("%d bytes, %v", b.Len(), err)
	}
	return b.Bytes()
}

// A mute is a connection on which nothing comes.
type mute struct {
	net.Conn
	w io.Writer
}

func (m *mute) Read([]byte) (int, error)    { return 0, io.EOF }
func (m *mute) Write(b []byte) (int, error) { return m.w.Write(b) }
func (m *mute) Close() error                { return nil }
func (m *mute) SetDeadline(time.Time) error { return nil }

type sample struct {
	name string
	said []byte
	kind Kind
	host string
	err  error // that it matches
}

func samples(t testing.TB) []sample {
	hello := func(config *tls.Config) []byte { return clientHello(t, config) }
	many := make([]string, 300)
	for i := range many {
		many[i] = strings.Repeat("p", 100)
	}
	first := hello(&tls.Config{ServerName: "app.example.com"})
	all := []sample{
		{"TLS", first, TLS, "app.example.com", nil},
		{"TLS 1.2", hello(&tls.Config{ServerName: "a.b", MaxVersion: tls.VersionTLS12}), TLS, "a.b", nil},
		{"TLS 1.0", hello(&tls.Config{ServerName: "old.example", MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10}), TLS, "old.example", nil},
		{"TLS without a name", hello(&tls.Config{ServerName: "10.1.2.3"}), TLS, "", nil},
		{"TLS in capitals", hello(&tls.Config{ServerName: "App.Example.COM"}), TLS, "app.example.com", nil},
		{"TLS with much", hello(&tls.Config{ServerName: "app.example.com", NextProtos: many[:100]}), TLS, "app.example.com", nil},
		{"TLS with too much", hello(&tls.Config{ServerName: "app.example.com", NextProtos: many}), TLS, "", ErrTooLong},
		{"TLS and more", append(bytes.Clone(first), "early"...), TLS, "app.example.com", nil},
		{"TLS, cut", first[:len(first)-1], TLS, "", io.EOF},
		{"TLS, garbled", append(append(bytes.Clone(first[:43]), 0xff), first[44:]...), TLS, "", ErrMalformed},
		{"a handshake of another sort", []byte{22, 3, 1, 0, 4, 2, 0, 0, 0}, TLS, "", ErrMalformed},
		{"nothing", nil, None, "", io.EOF},
		{"binary", []byte{0, 0, 0, 8, 4, 210, 22, 47}, None, "", ErrMalformed},
		{"SSH", []byte("SSH-2.0-OpenSSH_9.9\r\n"), HTTP, "", ErrMalformed},
		{"HTTP/2", []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), HTTP2, "", nil},
		{"endless", []byte("GET /" + strings.Repeat("a", limit)), HTTP, "", ErrTooLong},
		{"endless fields", []byte("GET / HTTP/1.1\r\n" + strings.Repeat("A: b\r\n", limit)), HTTP, "", ErrTooLong},
		{"a line and no end", []byte("GET / HTTP/1.1\r\nHost: a.example\r\n"), HTTP, "", io.EOF},
	}
	for request, host := range map[string]string{
		"GET / HTTP/1.1\r\nHost: app.example.com\r\n\r\n":                                "app.example.com",
		"GET / HTTP/1.1\r\nhOsT:\tApp.Example.com:8080 \r\n\r\n":                         "app.example.com",
		"GET / HTTP/1.0\r\n\r\n":                                                         "",
		"GET / HTTP/1.1\r\nHost:\r\n\r\n":                                                "",
		"GET / HTTP/1.1\r\nAccept: */*\r\nHost: a.example.\r\nX: y\r\n\r\nHost: b":       "a.example",
		"POST /x HTTP/1.1\r\nContent-Length: 20\r\nHost: a.example\r\n\r\nHost: b\r\n":   "a.example",
		"GET http://b.example/x HTTP/1.1\r\nHost: a.example\r\n\r\n":                     "b.example",
		"GET http://b.example?x HTTP/1.1\r\nHost: a.example\r\n\r\n":                     "b.example",
		"GET /http://b.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n":                     "a.example",
		"CONNECT b.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n":                      "b.example",
		"OPTIONS * HTTP/1.1\r\nHost: a.example\r\n\r\n":                                  "a.example",
		"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n":                                       "[::1]",
		"GET / HTTP/1.1\r\nX-Host: b.example\r\nHost: a.example\r\nHosts: c\r\n\r\nmore": "a.example",
	} {
		all = append(all, sample{request, []byte(request), HTTP, host, nil})
	}
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n",
		"GET / HTTP/1.1\r\nHost : a.example\r\n\r\n",
		"GET / HTTP/1.1\r\nX: y\r\n Host: a.example\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a.example\r\nnonsense\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a.example, b.example\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: user@a.example\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a.example/b\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: ::1\r\n\r\n",
		"GET  / HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"GET / HTTP/3.0\r\nHost: a.example\r\n\r\n",
		"GET /\r\nHost: a.example\r\n\r\n",
		"G@T / HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"GET / HTTP/1.1\nHost: a.example\n\n\r\n",
	} {
		all = append(all, sample{request, []byte(request), HTTP, "", ErrMalformed})
	}
	return all
}

// Each greeting is understood, however it comes, and nothing of it is lost.
func TestRead(t *testing.T) {
	for _, s := range samples(t) {
		for how, wrap := range map[string]func(io.Reader) io.Reader{
			"whole":       func(r io.Reader) io.Reader { return r },
			"by bytes":    iotest.OneByteReader,
			"with an end": iotest.DataErrReader,
		} {
			rest := bytes.NewReader(s.said)
			g, err := Read(wrap(rest), limit)
			if g.Kind != s.kind || g.Host != s.host || !errors.Is(err, s.err) || (err != nil) != (s.err != nil) {
				t.Errorf("%.80q %s: kind %d, host %q, %v; want %d, %q, %v", s.name, how, g.Kind, g.Host, err, s.kind, s.host, s.err)
			}
			took := len(s.said) - rest.Len()
			if how == "with an end" { // which reads ahead
				took = min(took, limit)
			}
			if !bytes.Equal(g.Head, s.said[:took]) || len(g.Head) > limit {
				t.Errorf("%.80q %s: kept %d bytes of the %d that were read", s.name, how, len(g.Head), took)
			}
		}
	}
}

// Errors of the reader come out as they are: they say why, as a deadline's does.
func TestReadError(t *testing.T) {
	for _, said := range [][]byte{nil, []byte("GET"), clientHello(t, &tls.Config{ServerName: "a.example"})[:20]} {
		g, err := Read(io.MultiReader(bytes.NewReader(said), iotest.ErrReader(os.ErrDeadlineExceeded)), limit)
		if err != os.ErrDeadlineExceeded || ReasonOf(err) != Slow || !bytes.Equal(g.Head, said) {
			t.Errorf("after %d bytes: %v, and %d kept", len(said), err, len(g.Head))
		}
	}
	if _, err := Read(emptyReader{}, limit); err != io.ErrNoProgress {
		t.Errorf("of a reader that returns nothing: %v", err)
	}
}

type emptyReader struct{}

func (emptyReader) Read([]byte) (int, error) { return 0, nil }

// Answers are what the client's own library takes for what they mean.
func TestAnswer(t *testing.T) {
	for why, status := range map[Reason]int{
		Unknown: 404, Away: 503, Refused: 503, Bad: 400, Long: 431, Slow: 408,
	} {
		for _, method := range []string{"GET", "HEAD"} {
			g, err := Read(strings.NewReader(method+" / HTTP/1.1\r\nHost: a.example\r\n\r\n"), limit)
			if err != nil {
				t.Fatal(err)
			}
			req, _ := http.NewRequest(method, "http://a.example/", nil)
			b := bufio.NewReader(bytes.NewReader(g.Answer(why)))
			resp, err := http.ReadResponse(b, req)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			if resp.StatusCode != status || !resp.Close || err != nil || (len(body) > 0) != (method == "GET") || b.Buffered() > 0 {
				t.Errorf("%s: %s, close: %t, %d bytes of body, %v, and %d behind", method, resp.Status, resp.Close, len(body), err, b.Buffered())
			}
		}
		client, server := net.Pipe()
		go func() {
			defer server.Close()
			g, err := Read(server, limit)
			if err != nil {
				t.Error(err)
			}
			server.Write(g.Answer(why))
		}()
		err := tls.Client(client, &tls.Config{ServerName: "a.example"}).Handshake()
		if want := map[Reason]string{
			Unknown: "unrecognized name", Away: "internal error", Refused: "internal error",
		}[why]; !strings.Contains(err.Error(), cmp.Or(want, "error decoding message")) {
			t.Errorf("reason %d: %v", why, err)
		}
		client.Close()
	}
	if b := new(Greeting).Answer(Unknown); b != nil {
		t.Errorf("%q to whom nobody understands", b)
	}
}

// FuzzRead finds nothing that is read beyond the limit, or differently by bytes.
func FuzzRead(f *testing.F) {
	for _, s := range samples(f) {
		f.Add(s.said)
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		const limit = 2000
		g, err := Read(bytes.NewReader(said), limit)
		by, byErr := Read(iotest.OneByteReader(bytes.NewReader(said)), limit)
		if g.Kind != by.Kind || g.Host != by.Host || (err == nil) != (byErr == nil) {
			t.Errorf("%d, %q, %v whole, and %d, %q, %v by bytes", g.Kind, g.Host, err, by.Kind, by.Host, byErr)
		}
		if len(g.Head) > limit || !bytes.HasPrefix(said, g.Head) || !bytes.HasPrefix(said, by.Head) {
			t.Errorf("kept %d bytes of %d", len(g.Head), len(said))
		}
		if strings.ToLower(g.Host) != g.Host || strings.ContainsAny(g.Host, "/@ \r\n") && g.Kind == HTTP {
			t.Errorf("host %q", g.Host)
		}
		for why := Unknown; why <= Slow; why++ {
			if len(g.Answer(why)) > 400 {
				t.Errorf("%d bytes of an answer", len(g.Answer(why)))
			}
		}
	})
}
