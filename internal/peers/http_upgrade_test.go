package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"testing"

	"github.com/coder/websocket"
)

// httpHijack leaves HTTP for raw bytes. The first of them travel with the
// request, so that they are in the server's buffer when the handler takes over.
func httpHijack(t *testing.T, ln net.Listener) {
	const size = 8 << 20
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		c, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n")
		if _, err := io.Copy(c, buf); err != nil {
			t.Errorf("echoing: %v", err)
		}
	})
	c := s.dial(t)
	c.send(t, "GET / HTTP/1.1\nHost: test\nConnection: Upgrade\nUpgrade: raw\n\nearly")
	if resp := c.response(t); resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("got %s", resp.Status)
	}
	go func() {
		if _, err := io.Copy(c.TCPConn, testData(9, size)); err != nil {
			t.Errorf("sending: %v", err)
		}
		c.CloseWrite()
	}()
	early := make([]byte, 5)
	if _, err := io.ReadFull(c.r, early); string(early) != "early" {
		t.Fatalf("read %q, %v", early, err)
	}
	if sum, n, err := digest(c.r); err != nil || sum != testDigest(9, size) {
		t.Errorf("echo of %d bytes, SHA-256 %s, %v, want %d, %s", n, sum, err, size, testDigest(9, size))
	}
	s.wantStates(t, "new active hijacked")
}

func httpWebSocket(t *testing.T, ln net.Listener) {
	ended := make(chan error, 1)
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		ws, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer ws.CloseNow()
		ws.SetReadLimit(2 << 20)
		for {
			kind, message, err := ws.Read(r.Context())
			if err == nil {
				err = ws.Write(r.Context(), kind, message)
			}
			if err != nil {
				ended <- err
				return
			}
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, "ws://"+s.addr, &websocket.DialOptions{HTTPClient: s.client(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	ws.SetReadLimit(2 << 20)
	echo := func(kind websocket.MessageType, message []byte) {
		t.Helper()
		if err := ws.Write(ctx, kind, message); err != nil {
			t.Fatal(err)
		}
		gotKind, got, err := ws.Read(ctx)
		if err != nil || gotKind != kind || !bytes.Equal(got, message) {
			t.Fatalf("echo of %v is %v of %d bytes, %v", kind, gotKind, len(got), err)
		}
	}
	echo(websocket.MessageText, []byte("hello"))
	echo(websocket.MessageBinary, testBytes(10, 1<<20))
	if err := ws.Close(4321, "enough"); err != nil {
		t.Error("close handshake:", err)
	}
	if err := await(t, ended, "the handler to end"); websocket.CloseStatus(err) != 4321 {
		t.Errorf("server's read ended with %v, want close status 4321", err)
	}
	s.wantStates(t, "new active hijacked")
}

func httpWebSocketServerCloses(t *testing.T, ln net.Listener) {
	ended := make(chan error, 1)
	s := startHTTP(t, ln, func(w http.ResponseWriter, r *http.Request) {
		ws, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		// The server speaks first, and says all it has to say.
		if err := ws.Write(r.Context(), websocket.MessageText, []byte("welcome")); err != nil {
			t.Error(err)
		}
		ended <- ws.Close(websocket.StatusPolicyViolation, "and goodbye")
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, "ws://"+s.addr, &websocket.DialOptions{HTTPClient: s.client(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	if _, message, err := ws.Read(ctx); string(message) != "welcome" {
		t.Fatalf("read %q, %v", message, err)
	}
	_, _, err = ws.Read(ctx)
	var closed websocket.CloseError
	if !errors.As(err, &closed) || closed.Code != websocket.StatusPolicyViolation || closed.Reason != "and goodbye" {
		t.Errorf("client's read ended with %v", err)
	}
	if err := await(t, ended, "the handler to end"); err != nil {
		t.Error("close handshake:", err)
	}
}

// httpTwo has the TLS end in the app and 32 requests run at once on one conn.
func httpTwo(t *testing.T, ln net.Listener, serve func(*http.Server, net.Listener) error) {
	const size = 1 << 20
	serverTLS, clientTLS := tlsConfigs()
	var mu sync.Mutex
	remotes := make(map[string]bool)
	srv := &http.Server{
		ErrorLog:  log.New(io.Discard, "", 0),
		TLSConfig: serverTLS.Clone(),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			remotes[r.RemoteAddr] = true
			mu.Unlock()
			w.Header().Set("Content-Length", fmt.Sprint(size))
			io.Copy(w, r.Body)
		}),
	}
	srv.TLSConfig.NextProtos = []string{"h2", "http/1.1"}
	served := make(chan error, 1)
	go func() { served <- serve(srv, ln) }()
	defer func() {
		srv.Close()
		if err := await(t, served, "the server to end"); err != http.ErrServerClosed {
			t.Errorf("serving ended with %v", err)
		}
	}()

	tr := &http.Transport{TLSClientConfig: clientTLS.Clone(), ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr, Timeout: patience}
	url := "https://" + ln.Addr().String()
	exchange := func(seed uint64) {
		resp, err := client.Post(url, "", testData(seed, size))
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close()
		if resp.Proto != "HTTP/2.0" {
			t.Errorf("the answer came by %s", resp.Proto)
		}
		if sum, n, err := digest(resp.Body); err != nil || sum != testDigest(seed, size) {
			t.Errorf("echo of %d bytes, SHA-256 %s, %v, want %d, %s", n, sum, err, size, testDigest(seed, size))
		}
	}
	exchange(0) // alone, so that all others find its conn
	var wg sync.WaitGroup
	for i := range uint64(32) {
		wg.Go(func() { exchange(i) })
	}
	wg.Wait()
	if len(remotes) != 1 {
		t.Errorf("%d connections were used, want 1", len(remotes))
	}
}
