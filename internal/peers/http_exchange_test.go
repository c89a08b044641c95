package peers

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func httpKeepAlive(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.URL.Path, " ", r.RemoteAddr)
	})
	c := s.dial(t)
	for _, path := range []string{"/one", "/two"} {
		c.send(t, "GET "+path+" HTTP/1.1\nHost: test\n\n")
		c.wantResponse(t, 200, path+" "+c.LocalAddr().String())
	}
	c.Close()
	s.wantStates(t, "new active idle active idle closed")
}

func httpConnectionClose(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, echoPath)
	c := s.dial(t)
	c.send(t, "GET /last HTTP/1.1\nHost: test\nConnection: close\n\n")
	if resp := c.wantResponse(t, 200, "/last"); !resp.Close {
		t.Error("the response does not say Connection: close")
	}
	c.wantEOF(t)
	s.wantStates(t, "new active closed")
}

func httpTen(t *testing.T, ln net.Listener) {
	const size = 4 << 20
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, testData(1, size)) })
	c := s.dial(t)
	c.send(t, "GET / HTTP/1.0\n\n")
	resp := c.response(t)
	if resp.Proto != "HTTP/1.0" || resp.ContentLength != -1 {
		t.Errorf("got %s with Content-Length %d, want HTTP/1.0 without", resp.Proto, resp.ContentLength)
	}
	if sum, n, err := digest(resp.Body); err != nil || n != size || sum != testDigest(1, size) {
		t.Errorf("body of %d bytes, SHA-256 %s, %v, want %d bytes, %s", n, sum, err, size, testDigest(1, size))
	}
	s.wantStates(t, "new active closed")
}

func httpTenKeepAlive(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "2")
		io.WriteString(w, "ok")
	})
	c := s.dial(t)
	for range 2 {
		c.send(t, "GET / HTTP/1.0\nConnection: keep-alive\n\n")
		c.wantResponse(t, 200, "ok")
	}
	c.send(t, "GET / HTTP/1.0\n\n")
	c.wantResponse(t, 200, "ok")
	c.wantEOF(t)
	s.wantStates(t, "new active idle active idle active closed")
}

// httpHalfClose is a client that says all it has to say, ends its direction and
// then waits for the answer.
func httpHalfClose(t *testing.T, ln net.Listener) {
	const size = 4 << 20
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		sum, n, err := digest(r.Body)
		fmt.Fprint(w, sum, n, err)
	})
	c := s.dial(t)
	c.send(t, fmt.Sprintf("POST / HTTP/1.0\nContent-Length: %d\n\n", size))
	if _, err := io.Copy(c.TCPConn, testData(2, size)); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	c.wantResponse(t, 200, fmt.Sprint(testDigest(2, size), int64(size), nil))
	c.wantEOF(t)
	s.wantStates(t, "new active closed")
}

func httpPipelining(t *testing.T, ln net.Listener) {
	const requests = 50
	s := startHTTP(t, ln, echoPath)
	c := s.dial(t)
	var all strings.Builder
	for i := range requests {
		fmt.Fprintf(&all, "GET /%d HTTP/1.1\nHost: test\n\n", i)
	}
	c.send(t, all.String())
	for i := range requests {
		c.wantResponse(t, 200, fmt.Sprint("/", i))
	}
	c.Close()
	s.wantStates(t, "new"+strings.Repeat(" active idle", requests)+" closed")
}

func httpContinue(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	c := s.dial(t)
	c.send(t, "POST / HTTP/1.1\nHost: test\nContent-Length: 5\nExpect: 100-continue\n\n")
	// Nothing of the body is sent before the server asked for it.
	c.wantResponse(t, 100, "")
	c.send(t, "hello")
	c.wantResponse(t, 200, "hello")
	c.Close()
	s.wantStates(t, "new active idle closed")
}

func httpContinue417(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) { t.Error("the handler was called") })
	c := s.dial(t)
	c.send(t, "POST / HTTP/1.1\nHost: test\nContent-Length: 5\nExpect: the-unexpected\n\nhello")
	c.wantResponse(t, 417, "")
	c.wantEOF(t)
	s.wantStates(t, "new active closed")
}

func httpContinue413(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		io.WriteString(w, "too much")
	})
	c := s.dial(t)
	c.send(t, "POST / HTTP/1.1\nHost: test\nContent-Length: 5000000\nExpect: 100-continue\n\n")
	c.wantResponse(t, 413, "too much")
	c.wantEOF(t)
	s.wantStates(t, "new active closed")
}

// httpEarlyAnswer refuses an upload whose client goes on sending. The server then
// ends its direction first and the connection a moment later, so that the answer
// is not lost to the reset that the rest of the upload causes.
func httpEarlyAnswer(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		io.WriteString(w, "too much")
	})
	c := s.dial(t)
	c.send(t, "POST / HTTP/1.1\nHost: test\nContent-Length: 1000000000000\n\n")
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(struct{ io.Writer }{c.TCPConn}, testData(3, 1e12))
		sent <- err
	}()
	c.wantResponse(t, 413, "too much")
	c.wantEOF(t)
	if err := await(t, sent, "the upload to fail"); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("sending ended with %v, want a reset", err)
	}
	s.wantStates(t, "new active closed")
}

func httpChunked(t *testing.T, ln net.Listener) {
	const size = 4 << 20
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		if fmt.Sprint(r.TransferEncoding) != "[chunked]" {
			t.Errorf("request's transfer encoding is %v", r.TransferEncoding)
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error("reading the request:", err)
		}
		w.Header().Set("Trailer", "Sent")
		for part := range slices.Chunk(body, 100_000) {
			w.Write(part)
		}
		w.Header().Set("Sent", r.Trailer.Get("Sent"))
	})
	req, _ := http.NewRequest("POST", "http://"+s.addr, struct{ io.Reader }{testData(4, size)})
	req.Trailer = http.Header{"Sent": {"everything"}}
	resp, err := s.client(t).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if fmt.Sprint(resp.TransferEncoding) != "[chunked]" {
		t.Errorf("response's transfer encoding is %v", resp.TransferEncoding)
	}
	if sum, n, err := digest(resp.Body); err != nil || sum != testDigest(4, size) {
		t.Errorf("echo of %d bytes, SHA-256 %s, %v, want %d, %s", n, sum, err, size, testDigest(4, size))
	}
	if got := resp.Trailer.Get("Sent"); got != "everything" {
		t.Errorf("trailer says %q, want %q", got, "everything")
	}
}

// httpFullDuplex sends a request's body line by line, each only after the answer
// to the last: nothing may wait for more bytes on the way.
func httpFullDuplex(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		rc.EnableFullDuplex()
		rc.Flush()
		for lines := bufio.NewScanner(r.Body); lines.Scan(); rc.Flush() {
			fmt.Fprintf(w, "got %s\n", lines.Text())
		}
	})
	body, feed := io.Pipe()
	defer feed.Close()
	resp, err := s.client(t).Post("http://"+s.addr, "text/plain", body)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answers := bufio.NewReader(resp.Body)
	for i := range 100 {
		fmt.Fprintln(feed, i)
		if line, err := answers.ReadString('\n'); line != fmt.Sprintf("got %d\n", i) {
			t.Fatalf("answer %d is %q, %v", i, line, err)
		}
	}
	feed.Close()
	if rest, err := io.ReadAll(answers); err != nil || len(rest) > 0 {
		t.Errorf("the answer ends with %q, %v", rest, err)
	}
}

const httpBig = 64 << 20

// wantBody downloads url and compares the body with testData.
func wantBody(t *testing.T, client *http.Client, url string, seed uint64, size int64) {
	t.Helper()
	resp, err := client.Get(url)
	if err != nil {
		t.Error(err)
		return
	}
	defer resp.Body.Close()
	if resp.ContentLength != size {
		t.Errorf("Content-Length is %d, want %d", resp.ContentLength, size)
	}
	if sum, n, err := digest(resp.Body); err != nil || sum != testDigest(seed, size) {
		t.Errorf("body of %d bytes, SHA-256 %s, %v, want %d, %s", n, sum, err, size, testDigest(seed, size))
	}
}

func httpDownload(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(httpBig))
		io.Copy(w, testData(5, httpBig))
	})
	wantBody(t, s.client(t), "http://"+s.addr, 5, httpBig)
}

// httpDownloadFile goes the way of the conn's ReadFrom.
func httpDownloadFile(t *testing.T, ln net.Listener) {
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, testBytes(6, httpBig), 0o600); err != nil {
		t.Fatal(err)
	}
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, name) })
	wantBody(t, s.client(t), "http://"+s.addr, 6, httpBig)
}

func httpUpload(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		sum, n, err := digest(r.Body)
		fmt.Fprint(w, sum, n, err)
	})
	req, _ := http.NewRequest("PUT", "http://"+s.addr, testData(7, httpBig))
	req.ContentLength = httpBig
	resp, err := s.client(t).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if want := fmt.Sprint(testDigest(7, httpBig), int64(httpBig), nil); string(got) != want || err != nil {
		t.Errorf("answer is %q, %v, want %q", got, err, want)
	}
}

func httpManyClients(t *testing.T, ln net.Listener) {
	const size = 1 << 20
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(size))
		io.Copy(w, testData(8, size))
	})
	var wg sync.WaitGroup
	for range 64 {
		client := s.client(t) // each with a conn of its own
		wg.Go(func() {
			for range 2 {
				wantBody(t, client, "http://"+s.addr, 8, size)
			}
		})
	}
	wg.Wait()
}

func httpRemoteAddr(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.RemoteAddr, " at ", r.Context().Value(http.LocalAddrContextKey))
	})
	for range 3 {
		c := s.dial(t)
		c.send(t, "GET / HTTP/1.1\nHost: test\nConnection: close\n\n")
		c.wantResponse(t, 200, fmt.Sprint(c.LocalAddr(), " at ", c.RemoteAddr()))
	}
}
