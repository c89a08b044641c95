package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// httpReadTimeout is a client that stops in the middle of its request's body. The
// handler's read times out, and its answer still arrives.
func httpReadTimeout(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var timeout net.Error
		if string(body) != "half" || !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("handler read %q, %v, want half and a timeout", body, err)
		}
		w.WriteHeader(http.StatusRequestTimeout)
	}, func(srv *http.Server) { srv.ReadTimeout = 150 * time.Millisecond })
	c := s.dial(t)
	c.send(t, "POST / HTTP/1.1\nHost: test\nContent-Length: 8\n\nhalf")
	c.wantResponse(t, 408, "")
	c.wantEOF(t)
	s.wantStates(t, "new active closed")
}

func httpReadHeaderTimeout(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, echoPath, func(srv *http.Server) { srv.ReadHeaderTimeout = 150 * time.Millisecond })
	c := s.dial(t)
	c.send(t, "GET / HTTP/1.1\nHost: te")
	c.wantEOF(t)
	s.wantStates(t, "new active closed")
}

// httpWriteTimeout is a client that does not read until the server has lost its
// patience. What it reads then must not look like a whole answer.
func httpWriteTimeout(t *testing.T, ln net.Listener) {
	wrote := make(chan error, 1)
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(w, testData(11, 1<<40))
		wrote <- err
	}, func(srv *http.Server) { srv.WriteTimeout = 150 * time.Millisecond })
	c := s.dial(t)
	c.send(t, "GET / HTTP/1.1\nHost: test\n\n")
	err := await(t, wrote, "the handler's write to fail")
	var timeout net.Error
	if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("handler's write ended with %v, want a timeout", err)
	}
	s.wantStates(t, "new active closed")
	resp := c.response(t)
	got, err := io.ReadAll(resp.Body)
	if err == nil {
		t.Error("the client read a clean end of a body that was cut off")
	}
	if !bytes.Equal(got, testBytes(11, int64(len(got)))) {
		t.Errorf("the %d bytes before the cut are not those that were sent", len(got))
	}
}

func httpIdleTimeout(t *testing.T, ln net.Listener) {
	s := startHTTP(t, ln, echoPath, func(srv *http.Server) { srv.IdleTimeout = 150 * time.Millisecond })
	c := s.dial(t)
	c.send(t, "GET /only HTTP/1.1\nHost: test\n\n")
	c.wantResponse(t, 200, "/only")
	c.wantEOF(t)
	s.wantStates(t, "new active idle closed")
}

// leave runs a handler that waits for the end of its request's context, and has
// the client end the conn by way of end meanwhile. states is what the server sees.
func leave(t *testing.T, ln net.Listener, end func(*httpConn), states string) {
	started, cause := make(chan struct{}), make(chan error, 1)
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		close(started)
		<-r.Context().Done()
		cause <- r.Context().Err()
	})
	c := s.dial(t)
	c.send(t, "GET / HTTP/1.1\nHost: test\n\n")
	await(t, started, "the handler to start")
	end(c)
	if err := await(t, cause, "the request's context to end"); err != context.Canceled {
		t.Errorf("the context ended with %v", err)
	}
	s.wantStates(t, states)
}

func httpClientLeaves(t *testing.T, ln net.Listener) {
	// The server learns only from its answer's fate that nobody reads it.
	leave(t, ln, func(c *httpConn) { c.Close() }, "new active idle closed")
}

func httpClientResets(t *testing.T, ln net.Listener) {
	leave(t, ln, func(c *httpConn) {
		c.SetLinger(0)
		c.Close()
	}, "new active closed")
}

func httpClientLeavesDownload(t *testing.T, ln net.Listener) {
	wrote, cause := make(chan error, 1), make(chan error, 1)
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(w, testData(12, 1<<40))
		wrote <- err
		<-r.Context().Done()
		cause <- r.Context().Err()
	})
	c := s.dial(t)
	c.send(t, "GET / HTTP/1.1\nHost: test\n\n")
	io.CopyN(io.Discard, c.response(t).Body, 1<<20)
	c.Close() // with bytes unread: a reset
	if err := await(t, wrote, "the handler's write to fail"); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("handler's write ended with %v, want a reset", err)
	}
	if err := await(t, cause, "the request's context to end"); err != context.Canceled {
		t.Errorf("the context ended with %v", err)
	}
	s.wantStates(t, "new active closed")
}

// httpClientResetsUpload aborts a body that only the connection's end delimits
// from the app's point of view once it is hijacked: the app must not take the
// half for the whole.
func httpClientResetsUpload(t *testing.T, ln net.Listener) {
	halfRead, ended := make(chan struct{}), make(chan error, 1)
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		c, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		io.CopyN(io.Discard, buf, 4)
		close(halfRead)
		_, err = io.ReadAll(buf)
		ended <- err
	})
	c := s.dial(t)
	c.send(t, "POST / HTTP/1.0\n\nhalf")
	await(t, halfRead, "the handler to read the first half")
	c.SetLinger(0)
	c.Close()
	if err := await(t, ended, "the handler's read to end"); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("handler's read ended with %v, want a reset", err)
	}
}

// abort answers with half a body and a panic, and checks that the client gets the
// half and then an error.
func abort(t *testing.T, ln net.Listener, header http.Header) {
	half := string(testBytes(13, 100_000))
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		maps.Copy(w.Header(), header)
		io.WriteString(w, half)
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	resp, err := s.client(t).Get("http://" + s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err == nil {
		t.Error("the client read a clean end of a body that was cut off")
	}
	if string(got) != half {
		t.Errorf("got %d bytes before the cut, want %d", len(got), len(half))
	}
	s.wantStates(t, "new active closed")
}

func httpAbortChunked(t *testing.T, ln net.Listener) { abort(t, ln, nil) }

func httpAbortContentLength(t *testing.T, ln net.Listener) {
	abort(t, ln, http.Header{"Content-Length": {"200000"}})
}

// httpAbortUntilClose aborts a body that ends with the connection. Only a reset
// tells the client that it does not have all of it.
func httpAbortUntilClose(t *testing.T, ln net.Listener) {
	halfRead := make(chan struct{})
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\nhalf")
		<-halfRead
		if err := c.(interface{ SetLinger(int) error }).SetLinger(0); err != nil {
			t.Error(err)
		}
		c.Close()
	})
	c := s.dial(t)
	c.send(t, "GET / HTTP/1.0\n\n")
	body := c.response(t).Body
	half := make([]byte, 4)
	if _, err := io.ReadFull(body, half); err != nil {
		t.Error(err)
	}
	close(halfRead)
	if rest, err := io.ReadAll(body); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after %q the client read %q, %v, want a reset", half, rest, err)
	}
}

// httpShutdown drains a server: requests that run finish whole, idle conns end
// and new clients are refused.
func httpShutdown(t *testing.T, ln net.Listener) {
	const requests, size = 4, 4 << 20
	running := make(chan struct{}, requests)
	goOn, shuttingDown := make(chan struct{}), make(chan struct{})
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/quick" {
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(size))
		w.(http.Flusher).Flush()
		running <- struct{}{}
		<-goOn
		io.Copy(w, testData(14, size))
	}, func(srv *http.Server) { srv.RegisterOnShutdown(func() { close(shuttingDown) }) })

	idle := s.dial(t)
	idle.send(t, "GET /quick HTTP/1.1\nHost: test\n\n")
	idle.wantResponse(t, 200, "")
	var wg sync.WaitGroup
	defer wg.Wait()
	for range requests {
		client := s.client(t)
		wg.Go(func() { wantBody(t, client, "http://"+s.addr, 14, size) })
	}
	for range requests {
		await(t, running, "the requests to run")
	}
	down := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() { down <- s.srv.Shutdown(ctx) }()
	await(t, shuttingDown, "the shutdown to begin")
	if err := await(t, s.served, "Serve to return"); err != http.ErrServerClosed {
		t.Errorf("Serve returned %v, want ErrServerClosed", err)
	}
	wantRefused(t, s.addr)
	select {
	case err := <-down:
		t.Errorf("Shutdown returned %v while requests ran", err)
	default:
	}
	idle.wantEOF(t)
	close(goOn)
	if err := await(t, down, "Shutdown to return"); err != nil {
		t.Error("Shutdown:", err)
	}
}

// httpCloseStoppedReader closes a conn on which a Write waits for a client that
// reads nothing.
func httpCloseStoppedReader(t *testing.T, ln net.Listener) {
	wrote := make(chan error, 1)
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		// After a write that timed out no more fits, and the next one blocks.
		c.SetWriteDeadline(time.Now().Add(150 * time.Millisecond))
		if _, err := io.Copy(c, testData(15, 1<<40)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("writing to a client that does not read ended with %v, want a timeout", err)
		}
		c.SetWriteDeadline(time.Time{})
		go c.Close()
		_, err = io.Copy(c, testData(15, 1<<40))
		wrote <- err
	})
	c := s.dial(t)
	c.send(t, "GET / HTTP/1.1\nHost: test\n\n")
	if err := await(t, wrote, "the blocked write to end"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the blocked write ended with %v, want net.ErrClosed", err)
	}
}
