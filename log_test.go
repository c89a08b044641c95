package relay_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
	"github.com/tcprelay/relay/internal/mux"
)

// A relay at which anybody may register says so, once, unless only this machine can.
func TestOpenRelayWarning(t *testing.T) {
	certs := func(auth tls.ClientAuthType) relay.ServerOption {
		config := relayTLS()
		config.ClientAuth, config.ClientCAs = auth, theCerts().pool
		return relay.WithTLSConfig(config)
	}
	anybody := relay.WithAuthorizer(func(context.Context, relay.Registration) (relay.Grant, error) { return relay.Grant{}, nil })
	for _, tt := range []struct {
		name  string
		opts  []relay.ServerOption
		addrs []string
		warn  string // of which address
	}{
		{"loopback", nil, []string{"127.0.0.1:1", "127.5.5.5:1", "[::1]:1"}, ""},
		{"an address", nil, []string{"10.0.0.1:1"}, "10.0.0.1:1"},
		{"all addresses", nil, []string{"0.0.0.0:1"}, "0.0.0.0:1"},
		{"all IPv6 addresses", nil, []string{"[::]:1"}, "[::]:1"},
		{"several", nil, []string{"127.0.0.1:1", "10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"}, "10.0.0.1:1"},
		{"tokens", []relay.ServerOption{relay.WithTokens(tokenA)}, []string{"10.0.0.1:1"}, ""},
		{"authorizer", []relay.ServerOption{anybody}, []string{"10.0.0.1:1"}, ""},
		{"no authorizer", []relay.ServerOption{relay.WithAuthorizer(nil)}, []string{"10.0.0.1:1"}, "10.0.0.1:1"},
		{"TLS", []relay.ServerOption{relay.WithTLSConfig(relayTLS())}, []string{"10.0.0.1:1"}, "10.0.0.1:1"},
		{"mutual TLS", []relay.ServerOption{certs(tls.RequireAndVerifyClientCert)}, []string{"10.0.0.1:1"}, ""},
		{"any certificate", []relay.ServerOption{certs(tls.RequireAnyClientCert)}, []string{"10.0.0.1:1"}, "10.0.0.1:1"},
		{"a certificate if there is one", []relay.ServerOption{certs(tls.VerifyClientCertIfGiven)}, []string{"10.0.0.1:1"}, "10.0.0.1:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var log logbook
			srv, err := relay.NewServer(append(tt.opts, relay.WithLogger(log.logger()))...)
			if err != nil {
				t.Fatal(err)
			}
			for n, addr := range tt.addrs {
				ln, err := memnet.New().Listen(t.Context(), "tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				serveOn(t, srv, sameAddr{ln, addr})
				log.wait(t, "listening", n+1)
			}
			var warned []string
			for _, e := range log.with("") {
				if e.level >= slog.LevelWarn {
					warned = append(warned, fmt.Sprint(e.attrs["addr"]))
					if !strings.Contains(e.msg, "anybody") || !strings.Contains(e.msg, "WithTokens") {
						t.Errorf("logged %q", e.msg)
					}
				}
			}
			if tt.warn == "" && warned != nil || tt.warn != "" && !slices.Equal(warned, []string{tt.warn}) {
				t.Errorf("warned of %q, want %q", warned, tt.warn)
			}
		})
	}
}

// sameAddr is a listener whose address is what it was asked to be.
type sameAddr struct {
	net.Listener
	addr string
}

func (l sameAddr) Addr() net.Addr {
	a, _ := net.ResolveTCPAddr("tcp", l.addr)
	return a
}

// A lockedBuffer is a log's.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) lines() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Split(strings.TrimSuffix(b.b.String(), "\n"), "\n")
}

// What strangers say gets into the log quoted and cut, and under the same names
// everywhere.
func TestLogOfUntrusted(t *testing.T) {
	long := strings.Repeat("long", 63) + "er!" // 255 bytes
	names := []string{
		"plain", "two\nlines time=now level=ERROR msg=forged", "\r\x1b[2J\x1b[31mred\x07", "quote\"s \\ and = {}", "right\u202eleft\u2028",
		strings.Repeat("\x01", 255), long, long[:254] + "\n", strings.Repeat("é", 127), "\x00",
	}
	// The attributes that lines of the relay have, by message.
	attrs := map[string][]string{
		"listening":           {"addr"},
		"registered":          {"service", "addr", "identity", "remote", "protocol", "resumed"},
		"session ended":       {"service", "addr", "identity", "remote", "kept", "err"},
		"client left":         {"service", "addr", "identity", "client", "bytes_in", "bytes_out", "seconds", "err"},
		"client refused":      {"kind", "suppressed", "service", "addr", "identity", "client", "err"},
		"client cut off":      {"kind", "suppressed", "service", "addr", "identity", "client"},
		"registration failed": {"kind", "suppressed", "remote", "err"},
		"lease ended":         {"service", "addr", "identity", "err"},
	}
	optional := []string{"suppressed"}
	for _, format := range []string{"json", "text"} {
		t.Run(format, func(t *testing.T) {
			out := new(lockedBuffer)
			all := &slog.HandlerOptions{Level: slog.LevelDebug}
			var h slog.Handler = slog.NewJSONHandler(out, all)
			if format == "text" {
				h = slog.NewTextHandler(out, all)
			}
			onStage(t, func(t *testing.T, s *stage) {
				for _, name := range names {
					time.Sleep(2 * time.Second) // so that nothing is suppressed
					a := s.register(name, relay.WithName(name))
					go serveEcho(a)
					c := s.client(a)
					s.mustServe(c)
					if s.served(s.client(a)) { // refused
						t.Error("two clients")
					}
					if code := s.registers("10.0.0.5", name, relay.WithName(name)); code != relay.CodeNameTaken {
						t.Errorf("the name again: %q", code)
					}
					if info := s.srv.Services(); len(info) != 1 || info[0].Name != name || info[0].Identity != name {
						t.Errorf("services %+v", info)
					}
					time.Sleep(2 * time.Minute) // cut off
					synctest.Wait()
					s.end(a.Listener)
					b := s.register(name, relay.WithName(name))
					b.leave()
					s.end(b.Listener)
					time.Sleep(2 * time.Minute) // expired
				}
				// JSON that is not UTF-8, in which nothing stays as it was sent.
				for _, hello := range []string{
					"{\"version\":1,\"name\":\"\xff\xfe\n\x1b\"}\n", "{\"version\":1,\"name\":\"\xff\xfe\\u001b\"}\n",
					"{\"version\":1,\"name\":\"\\ud800\\u0000\"}\n", "\xff\x00\n", `{"version":"` + strings.Repeat("\x1b", 1000) + `"}` + "\n",
					`{"version":1,"port":` + strings.Repeat("9", 1000) + "}\n", `{"version":1e400}` + "\n",
				} {
					time.Sleep(2 * time.Second)
					sess := mux.Client(s.dialFrom("10.0.0.5", s.addr), mux.Config{})
					sess.Open([]byte(hello))
					time.Sleep(5 * time.Second)
					sess.Close()
				}
			}, relay.WithLogger(slog.New(h)), relay.WithLimits(relay.Limits{ClientsPerService: 1, IdleTime: time.Minute}),
				relay.WithAuthorizer(func(_ context.Context, r relay.Registration) (relay.Grant, error) {
					return relay.Grant{Identity: r.Token}, nil
				}))

			seen := make(map[string]int)
			for _, line := range out.lines() {
				// All is printable, so no line and no terminal is fooled.
				if !utf8.ValidString(line) || strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
					t.Errorf("logged %q", line)
				}
				if strings.Contains(line, long[:200]) || strings.Contains(line, strings.Repeat("é", 70)) {
					t.Errorf("logged uncut: %q", line)
				}
				if format == "text" {
					if !strings.HasPrefix(line, "time=") {
						t.Errorf("logged %q", line)
					}
					continue
				}
				var got map[string]any
				if err := json.Unmarshal([]byte(line), &got); err != nil {
					t.Errorf("logged %q: %v", line, err)
					continue
				}
				msg, _ := got["msg"].(string)
				seen[msg]++
				for k, v := range got {
					if s, ok := v.(string); ok && len(s) > 600 {
						t.Errorf("%s: %s has %d bytes", msg, k, len(s))
					}
					if !slices.Contains(attrs[msg], k) && k != "time" && k != "level" && k != "msg" {
						t.Errorf("%q has the attribute %q", msg, k)
					}
				}
				for _, k := range attrs[msg] {
					if _, ok := got[k]; !ok && !slices.Contains(optional, k) && got["service"] != nil {
						// A nameless service of nobody has no identity.
						if k != "identity" || got["kind"] != nil {
							t.Errorf("%q lacks the attribute %q: %q", msg, k, line)
						}
					}
				}
			}
			for msg := range attrs {
				if format == "json" && seen[msg] == 0 {
					t.Errorf("never logged: %q", msg)
				}
			}
		})
	}
}
