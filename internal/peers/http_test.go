package peers

import (
	"bufio"
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// TestHTTP runs one table of cases over a plain TCP listener and over a relay's,
// which carries clients in its session or each on a connection of its own. No case
// knows which it got: what is expected of one is expected of all.
func TestHTTP(t *testing.T) {
	fronts := []struct {
		name   string
		listen func(*testing.T) net.Listener
	}{
		{"tcp", listenTCP},
		{"relay", listenRelay},
		{"dedicated", listenDedicated},
	}
	for _, front := range fronts {
		t.Run(front.name, func(t *testing.T) {
			for _, c := range httpCases {
				t.Run(c.name, func(t *testing.T) { c.run(t, front.listen(t)) })
			}
		})
	}
}

var httpCases = []struct {
	name string
	run  func(*testing.T, net.Listener)
}{
	{"KeepAlive", httpKeepAlive},
	{"ConnectionClose", httpConnectionClose},
	{"HTTP10", httpTen},
	{"HTTP10KeepAlive", httpTenKeepAlive},
	{"HalfCloseThenAnswer", httpHalfClose},
	{"Pipelining", httpPipelining},
	{"Continue", httpContinue},
	{"Continue417", httpContinue417},
	{"Continue413", httpContinue413},
	{"EarlyAnswer", httpEarlyAnswer},
	{"Chunked", httpChunked},
	{"FullDuplex", httpFullDuplex},
	{"Download", httpDownload},
	{"DownloadFile", httpDownloadFile},
	{"Upload", httpUpload},
	{"ManyClients", httpManyClients},
	{"RemoteAddr", httpRemoteAddr},
	{"Hijack", httpHijack},
	{"WebSocket", httpWebSocket},
	{"WebSocketServerCloses", httpWebSocketServerCloses},
	{"HTTP2ServeTLS", func(t *testing.T, ln net.Listener) {
		httpTwo(t, ln, func(srv *http.Server, ln net.Listener) error { return srv.ServeTLS(ln, "", "") })
	}},
	{"HTTP2TLSListener", func(t *testing.T, ln net.Listener) {
		httpTwo(t, ln, func(srv *http.Server, ln net.Listener) error {
			return srv.Serve(tls.NewListener(ln, srv.TLSConfig))
		})
	}},
	{"ReadTimeout", httpReadTimeout},
	{"ReadHeaderTimeout", httpReadHeaderTimeout},
	{"WriteTimeout", httpWriteTimeout},
	{"IdleTimeout", httpIdleTimeout},
	{"ClientLeaves", httpClientLeaves},
	{"ClientResets", httpClientResets},
	{"ClientLeavesDownload", httpClientLeavesDownload},
	{"ClientResetsUpload", httpClientResetsUpload},
	{"AbortChunked", httpAbortChunked},
	{"AbortContentLength", httpAbortContentLength},
	{"AbortUntilClose", httpAbortUntilClose},
	{"Shutdown", httpShutdown},
	{"CloseStoppedReader", httpCloseStoppedReader},
}

// httpSite is a running http.Server.
type httpSite struct {
	srv    *http.Server
	addr   string
	served chan error // what Serve returned

	mu     sync.Mutex
	states []string      // of all conns, in order; the cases that look have one conn
	ended  chan struct{} // closed when the first conn was closed or hijacked
}

// startHTTP serves handler on ln until the test ends. Each of setup may change
// the server before it starts.
func startHTTP(t *testing.T, ln net.Listener, handler http.HandlerFunc, setup ...func(*http.Server)) *httpSite {
	t.Helper()
	s := &httpSite{
		srv:    &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)},
		addr:   ln.Addr().String(),
		served: make(chan error, 1),
		ended:  make(chan struct{}),
	}
	s.srv.ConnState = s.connState
	for _, f := range setup {
		f(s.srv)
	}
	go func() { s.served <- s.srv.Serve(ln) }()
	t.Cleanup(func() { s.srv.Close() })
	return s
}

func (s *httpSite) connState(_ net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states = append(s.states, state.String())
	if state == http.StateClosed || state == http.StateHijacked {
		select {
		case <-s.ended:
		default:
			close(s.ended)
		}
	}
}

// wantStates waits until the site's only conn has ended and compares the states
// it went through.
func (s *httpSite) wantStates(t *testing.T, want string) {
	t.Helper()
	await(t, s.ended, "the server to end the conn")
	s.mu.Lock()
	defer s.mu.Unlock()
	if got := strings.Join(s.states, " "); got != want {
		t.Errorf("server saw the conn as %q, want %q", got, want)
	}
}

// client returns an http.Client that gives its conns up when the test ends.
func (s *httpSite) client(t *testing.T) *http.Client {
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

// httpConn is a client that sees the bytes of one connection.
type httpConn struct {
	*net.TCPConn
	r *bufio.Reader
}

func (s *httpSite) dial(t *testing.T) *httpConn {
	t.Helper()
	c := dialTCP(t, s.addr)
	return &httpConn{c, bufio.NewReader(c)}
}

// send writes text with its line ends turned into those of HTTP.
func (c *httpConn) send(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(c.TCPConn, strings.ReplaceAll(text, "\n", "\r\n")); err != nil {
		t.Fatal(err)
	}
}

// response reads a response's head.
func (c *httpConn) response(t *testing.T) *http.Response {
	t.Helper()
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		t.Fatalf("reading the response: %v", err)
	}
	return resp
}

// wantResponse reads a whole response and compares its status and body.
func (c *httpConn) wantResponse(t *testing.T, status int, body string) *http.Response {
	t.Helper()
	resp := c.response(t)
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading the body: %v", err)
	}
	if resp.StatusCode != status || string(got) != body {
		t.Fatalf("got %d %q, want %d %q", resp.StatusCode, got, status, body)
	}
	return resp
}

// wantEOF checks that the server ended the connection in good order.
func (c *httpConn) wantEOF(t *testing.T) {
	t.Helper()
	if b, err := c.r.ReadByte(); err != io.EOF {
		t.Fatalf("read %q, %v, want a clean end", b, err)
	}
}

// echoPath answers with the request's path.
func echoPath(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.URL.Path) }
