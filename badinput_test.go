package relay_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

// The fields of a muxado frame's header, and the id of a session's first stream, on
// which a service registers.
const (
	typeRst, typeData, typeWndInc, typeGoAway = 0, 1, 2, 3

	fin, syn = 1, 2

	controlID = 3
)

// rawFrame returns a frame that says it is length bytes long, right or wrong.
func rawFrame(typ, flags byte, id uint32, length int, body ...byte) []byte {
	b := []byte{byte(length >> 16), byte(length >> 8), byte(length), typ<<4 | flags}
	b = binary.BigEndian.AppendUint32(b, id)
	return append(b, body...)
}

func rawData(flags byte, id uint32, s string) []byte {
	return rawFrame(typeData, flags, id, len(s), []byte(s)...)
}

// What is no registration is told from one at once, or else when the time is over;
// it costs one line in the log and leaves nothing.
func TestRegistrationGarbage(t *testing.T) {
	hello := string(clientHello(t))
	for name, in := range map[string]string{
		"zeroes":                    strings.Repeat("\x00", 64),
		"ones":                      strings.Repeat("\xff", 64),
		"HTTP":                      "GET / HTTP/1.1\r\nHost: relay.example\r\n\r\n",
		"TLS":                       hello,
		"SSH":                       "SSH-2.0-OpenSSH_9.9\r\n",
		"SYN of our parity":         string(rawData(syn, 2, `{"version":1}`+"\n")),
		"SYN of the top bit":        string(rawData(syn, 1<<31|3, `{"version":1}`+"\n")),
		"DATA for no stream":        string(rawData(0, 3, `{"version":1}`+"\n")),
		"RST for no stream":         string(rawFrame(typeRst, 0, 3, 4, 0, 0, 0, 1)),
		"WNDINC for no stream":      string(rawFrame(typeWndInc, 0, 3, 4, 0, 0, 0, 1)),
		"more than the window":      string(rawFrame(typeData, syn, 3, mux.Window+1)),
		"stream reset before hello": string(rawData(syn, 3, "")) + string(rawFrame(typeRst, 0, 3, 4, 0, 0, 0, 7)),
	} {
		t.Run(name, func(t *testing.T) {
			srv, addr, log := startLogged(t)
			check := nothingLeft(t)
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := io.WriteString(c, in); err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(patience))
			if _, err := io.Copy(io.Discard, c); err != nil && !isReset(err) {
				t.Errorf("the relay does not hang up: %v", err)
			}
			c.Close()
			expectRefusalLogged(t, srv, log)
			check()
			register(t, addr)
		})
	}
}

// clientHello returns what a TLS client sends first.
func clientHello(t *testing.T) []byte {
	near, far := net.Pipe()
	defer far.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		tls.Client(near, &tls.Config{ServerName: "relay.example"}).Handshake()
	}()
	b := make([]byte, 4<<10)
	n, err := far.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	far.Close()
	<-done
	return b[:n]
}

// startLogged is startRelay with a log, in which it stands already where services
// register.
func startLogged(t testing.TB, opts ...relay.ServerOption) (*relay.Server, string, *logbook) {
	t.Helper()
	log := new(logbook)
	srv, addr := startRelay(t, append(opts, relay.WithLogger(log.logger()))...)
	log.wait(t, "listening", 1)
	return srv, addr, log
}

// One who hangs up without a word is no service.
func TestRegistrationHangsUp(t *testing.T) {
	srv, addr, log := startLogged(t)
	check := nothingLeft(t)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	expectRefusalLogged(t, srv, log)
	check()
}

// Who says nothing that makes sense within the handshake time is cut off when that
// is over, on the dot.
func TestRegistrationSilence(t *testing.T) {
	certs := relayTLS() // made outside of the bubbles
	for _, tt := range []struct {
		name string
		opts []relay.ServerOption
		in   string
	}{
		{"nothing", nil, ""},
		{"nothing to TLS", []relay.ServerOption{relay.WithTLSConfig(certs)}, ""},
		{"part of a header", nil, "\x00\x00"},
		{"a stream without a hello", nil, string(rawData(syn, 3, ""))},
		{"half a hello", nil, string(rawData(syn, 3, `{"version":`))},
		{"half a frame", nil, string(rawFrame(typeData, syn, 3, 100, '{'))},
		{"HTTP whose header looks like one of a later version's frame", nil, "POST / HTTP/1.1\r\n\r\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log logbook
				srv, err := relay.NewServer(append(tt.opts, relay.WithLogger(log.logger()))...)
				if err != nil {
					t.Fatal(err)
				}
				ln := listenInMemory()
				serveOn(t, srv, ln)
				start := time.Now()
				c, err := ln.dial(t.Context(), "", "")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.WriteString(c, tt.in); err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, c)
				if took := time.Since(start); took != 10*time.Second {
					t.Errorf("cut off after %v", took)
				}
				expectRefusalLogged(t, srv, &log)
				c.Close()
			})
		})
	}
}

// One who does not even read is no burden for longer.
func TestRegistrationStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logbook
		srv, err := relay.NewServer(relay.WithLogger(log.logger()))
		if err != nil {
			t.Fatal(err)
		}
		ln := listenInMemory()
		serveOn(t, srv, ln)
		start := time.Now()
		c, err := ln.dial(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		// A hello that is refused, so that the relay would answer.
		c.Write(rawData(syn, 3, `{"version":2}`+"\n"))
		expectRefusalLogged(t, srv, &log)
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("cut off after %v", took)
		}
		c.Close()
	})
}

// A hello that is understood to be one, and is wrong, is answered.
func TestBadHello(t *testing.T) {
	free := freePorts(t, 1)
	name256 := strings.Repeat("n", 256)
	for _, tt := range []struct {
		name, hello string
		want        string
	}{
		{"too long", `{"version":1,"name":"` + strings.Repeat("x", 16<<10) + `"}` + "\n", wire.CodeMalformed},
		{"too long, no end", strings.Repeat("x", 17<<10), wire.CodeMalformed},
		{"not JSON", "hello\n", wire.CodeMalformed},
		{"empty", "\n", wire.CodeMalformed},
		{"an array", "[1]\n", wire.CodeMalformed},
		{"a version of another type", `{"version":"1"}` + "\n", wire.CodeMalformed},
		{"a port of another type", `{"version":1,"port":{}}` + "\n", wire.CodeMalformed},
		{"no version", "{}\n", wire.CodeVersion},
		{"a later version", `{"version":2}` + "\n", wire.CodeVersion},
		{"a negative version", `{"version":-1}` + "\n", wire.CodeVersion},
		{"a negative port", `{"version":1,"port":-1}` + "\n", wire.CodePortUnavailable},
		{"a port too high", `{"version":1,"port":65536}` + "\n", wire.CodePortUnavailable},
		{"a port out of range", fmt.Sprintf(`{"version":1,"port":%d}`+"\n", free+1), wire.CodePortUnavailable},
		{"a name too long", fmt.Sprintf(`{"version":1,"name":%q}`+"\n", name256), wire.CodeMalformed},
		{"a line that is cut", `{"version":1}`, wire.CodeMalformed}, // and half-closed
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv, addr, log := startLogged(t, relay.WithPorts(free, free))
			check := nothingLeft(t)
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			sess := mux.Client(c, mux.Config{})
			defer sess.Close()
			control, err := sess.Open(nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(control, tt.hello); err != nil {
				t.Fatal(err)
			}
			if err := control.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			control.SetReadDeadline(time.Now().Add(patience))
			var reply wire.Reply
			line, err := bufio.NewReader(control).ReadBytes('\n')
			if err != nil || json.Unmarshal(line, &reply) != nil {
				t.Fatalf("the relay says %q, %v", line, err)
			}
			if reply.Version != wire.Version || reply.Address != "" || reply.Error == nil || reply.Error.Code != tt.want {
				t.Errorf("the relay says %q", line)
			}
			sess.Close()
			expectRefusalLogged(t, srv, log)
			check()
			if l := register(t, addr); port(l) != free { // the one port there is
				t.Errorf("port %d, want %d", port(l), free)
			}
		})
	}
}

// What a relay of this version does not know is no error.
func TestLaterHello(t *testing.T) {
	srv, addr, log := startLogged(t)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	sess := mux.Client(c, mux.Config{})
	defer sess.Close()
	control, err := sess.Open([]byte(`{"version":1,"name":"later","colour":{"of":"magic"}}` + "\n" +
		`{"type":"sing","verse":2}` + "\n" + `{"type":"ping","id":7}` + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	control.SetReadDeadline(time.Now().Add(patience))
	r := bufio.NewReader(control)
	var reply wire.Reply
	var pong wire.Control
	for _, v := range []any{&reply, &pong, &pong} {
		if pong.Type == wire.Pong {
			break // which its own ping comes before or behind
		}
		line, err := r.ReadBytes('\n')
		if err != nil || json.Unmarshal(line, v) != nil {
			t.Fatalf("the relay says %q, %v", line, err)
		}
	}
	if reply.Error != nil || reply.Address == "" || !reflect.DeepEqual(pong, wire.Control{Type: wire.Pong, ID: 7}) {
		t.Errorf("the relay says %+v and %+v", reply, pong)
	}
	if got := serviceNames(srv); len(got) != 1 || got[0] != "later" {
		t.Errorf("services %q", got)
	}
	sess.Close()
	log.wait(t, "session ended", 1)
}

// A malformed frame ends the session that it came in, and no other.
func TestMalformedFrames(t *testing.T) {
	srv, addr, log := startLogged(t, relay.WithLease(-1))
	check := nothingLeft(t)
	other := register(t, addr, relay.WithName("other"))
	go serveEcho(other)
	otherClient := dial(t, other)

	ended := 0
	for _, tt := range []struct {
		name string
		in   []byte
	}{
		{"HTTP", []byte("GET / HTTP/1.1\r\n\r\n")},
		{"top bit of the id", rawData(0, 1<<31|controlID, "x")},
		{"SYN of the relay's parity", rawData(syn, 1000, "")},
		{"SYN that does not rise", rawData(syn, 1, "")},
		{"SYN again", rawData(syn, controlID, "")},
		{"a second stream", rawData(syn, 1001, "")},
		{"DATA for a stream of ours to come", rawData(0, 1001, "x")},
		{"DATA for a stream of the relay's to come", rawData(0, 1000, "x")},
		{"RST for a stream to come", rawFrame(typeRst, 0, 1001, 4, 0, 0, 0, 7)},
		{"WNDINC for a stream to come", rawFrame(typeWndInc, 0, 1000, 4, 0, 0, 0, 7)},
		{"RST too long", rawFrame(typeRst, 0, controlID, 5, 0, 0, 0, 7, 0)},
		{"RST too short", rawFrame(typeRst, 0, controlID, 3, 0, 0, 7)},
		{"WNDINC too long", rawFrame(typeWndInc, 0, controlID, 8, 0, 0, 0, 7, 0, 0, 0, 0)},
		{"WNDINC of nothing", rawFrame(typeWndInc, 0, controlID, 4, 0, 0, 0, 0)},
		{"WNDINC beyond measure", rawFrame(typeWndInc, 0, controlID, 4, 0x7f, 0xff, 0xff, 0xff)},
		{"GOAWAY too short", rawFrame(typeGoAway, 0, 0, 4, 0, 0, 0, 0)},
		{"DATA beyond the window", rawFrame(typeData, 0, controlID, 1<<24-1)},
		{"control line that is not JSON", rawData(0, controlID, "nonsense\n")},
		{"control line too long", rawData(0, controlID, strings.Repeat(" ", 17<<10))},
		{"control line that is cut", rawData(fin, controlID, `{"type":"pi`)},
		{"a flood of empty frames", bytes.Repeat(rawData(0, controlID, ""), 600_000)}, // too many in a second on any machine
		{"RST of the control stream", rawFrame(typeRst, 0, controlID, 4, 0, 0, 0, 7)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			told, events := watch(relay.EventLost)
			l, transport := registerTapped(t, addr, told, relay.WithBackoff(never, never))
			client := dial(t, l)
			app := accept(t, l)
			sendAndExpect(t, client, app)
			transport.Write(tt.in) // which the relay may cut short
			expectLost(t, events)
			expectReset(t, client)
			if _, err := app.Read(make([]byte, 1)); err == nil || err == io.EOF {
				t.Errorf("the app reads %v", err)
			}
			ended++
			if e := log.wait(t, "session ended", ended)[ended-1]; e.attrs["err"] == nil || e.attrs["addr"] != l.Addr().String() {
				t.Errorf("logged %+v", e)
			}
			echoes(t, otherClient)
			eventually(t, "one service", func() bool { return len(srv.Services()) == 1 })
			client.Close()
			app.Close()
			l.Close()
		})
	}
	next := dial(t, other)
	echoes(t, next)
	for _, c := range []io.Closer{other, otherClient, next} {
		c.Close()
	}
	check()
}

// registerTapped registers over a connection of which the test has the app's end. It
// does not get those that the listener makes later.
func registerTapped(t testing.TB, addr string, opts ...relay.RegisterOption) (*relay.Listener, net.Conn) {
	t.Helper()
	first := make(chan net.Conn, 1)
	tap := func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err == nil {
			select {
			case first <- c:
			default:
			}
		}
		return c, err
	}
	l := register(t, addr, append(opts, relay.WithDialer(tap))...)
	return l, <-first
}

// A second stream is not one too many only when the relay has seen the first:
// both may come at once.
func TestTwoStreamsAtOnce(t *testing.T) {
	for range 50 {
		srv, addr, log := startLogged(t, relay.WithLease(-1))
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		c.Write(append(rawData(syn, 3, `{"version":1}`+"\n"), rawData(syn, 5, "x")...))
		if _, err := io.Copy(io.Discard, c); err != nil && !isReset(err) {
			t.Fatalf("the relay does not hang up: %v", err)
		}
		c.Close()
		// It is the same to us if that was in time to be no registration.
		eventually(t, "the end in the log", func() bool {
			return len(log.with("session ended"))+len(log.with("registration failed")) == 1
		})
		eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
		srv.Close()
	}
}

// expectRegisterError checks what every failure of Register has to be.
func expectRegisterError(t testing.TB, err error, addr string, want relay.Code) {
	t.Helper()
	re, ok := errors.AsType[*relay.RegisterError](err)
	if !ok || re.Code != want || re.Addr != addr {
		t.Fatalf("Register: %v, want code %q", err, want)
	}
	if want == relay.CodeTimeout {
		expectTimeout(t, "Register", err)
	} else if re.Timeout() || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Register: %v; a timeout", err)
	}
}

// What does not answer like a relay is not taken for one.
func TestRegisterAtOthers(t *testing.T) {
	handle := func(f func(net.Conn)) func(t *testing.T) string {
		return func(t *testing.T) string {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					f(c)
					c.Close()
				}
			}()
			t.Cleanup(func() { ln.Close(); <-done })
			return ln.Addr().String()
		}
	}
	says := func(s string) func(t *testing.T) string {
		return handle(func(c net.Conn) {
			io.WriteString(c, s)
			io.Copy(io.Discard, c)
		})
	}
	for _, tt := range []struct {
		name  string
		start func(*testing.T) string
		want  relay.Code
		is    error
	}{
		{"a web server", func(t *testing.T) string {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			web := &http.Server{Handler: http.NotFoundHandler()}
			done := make(chan struct{})
			go func() { defer close(done); web.Serve(ln) }()
			t.Cleanup(func() { web.Close(); <-done })
			return ln.Addr().String()
		}, relay.CodeNotRelay, nil},
		{"an SSH server", says("SSH-2.0-OpenSSH_9.9\r\n"), relay.CodeNotRelay, nil},
		{"a mail server", says("220 mail.example ESMTP\r\n"), relay.CodeNotRelay, nil},
		{"an echo server", handle(func(c net.Conn) { io.Copy(c, onlyReader{c}) }), relay.CodeNotRelay, nil},
		{"one that hangs up", handle(func(c net.Conn) {}), relay.CodeNotRelay, nil},
		{"one that hangs up after the hello", handle(func(c net.Conn) { c.Read(make([]byte, 1000)) }), relay.CodeNotRelay, nil},
		{"one that goes away", says(string(rawFrame(typeGoAway, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 2))), relay.CodeNotRelay, nil},
		{"one that resets the stream", handle(func(c net.Conn) {
			c.Read(make([]byte, 1000)) // the hello
			c.Write(rawFrame(typeRst, 0, controlID, 4, 0, 0, 0, 5))
			io.Copy(io.Discard, c)
		}), relay.CodeNotRelay, syscall.ECONNRESET},
		{"a closed port", func(t *testing.T) string {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ln.Close()
			return ln.Addr().String()
		}, relay.CodeUnreachable, syscall.ECONNREFUSED},
		{"no address", func(t *testing.T) string { return "no address" }, relay.CodeUnreachable, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr := tt.start(t)
			check := nothingLeft(t)
			l, err := signUp(t.Context(), addr)
			if l != nil {
				t.Fatal("registered")
			}
			expectRegisterError(t, err, addr, tt.want)
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("Register: %v, want %v in it", err, tt.is)
			}
			check()
		})
	}
}

// A relay may answer what is no answer.
func TestBadReply(t *testing.T) {
	for _, tt := range []struct {
		name, reply string
		want        relay.Code
		message     string
	}{
		{"not JSON", "welcome\n", relay.CodeNotRelay, ""},
		{"too long", strings.Repeat(" ", 17<<10), relay.CodeNotRelay, ""},
		{"another version", `{"version":2,"address":"127.0.0.1:1"}` + "\n", relay.CodeNotRelay, ""},
		{"no address", `{"version":1}` + "\n", relay.CodeNotRelay, ""},
		{"no port", `{"version":1,"address":"relay.example"}` + "\n", relay.CodeNotRelay, ""},
		{"a refusal", `{"version":1,"error":{"code":"server_full","message":"come back"}}` + "\n", relay.CodeServerFull, "come back"},
		{"a refusal of a later version", `{"version":2,"error":{"code":"version"}}` + "\n", relay.CodeVersion, ""},
		{"a refusal that is not known", `{"version":1,"error":{"code":"wrong_moon"}}` + "\n", "wrong_moon", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr, sessions := fakeRelay(t, tt.reply)
			check := nothingLeft(t)
			_, err := signUp(t.Context(), addr)
			expectRegisterError(t, err, addr, tt.want)
			if re, ok := errors.AsType[*relay.RegisterError](err); ok && re.Message != tt.message {
				t.Errorf("message %q", re.Message)
			}
			within(t, "the session's end", within(t, "a session", sessions).Done())
			check()
		})
	}
}

// Register waits ten seconds for an answer, or as long as its context says.
func TestRegisterSilence(t *testing.T) {
	cause := errors.New("on second thoughts")
	pool := clientTLS()
	for _, tr := range []struct {
		name string
		opts []relay.RegisterOption
		// Whether the silent one reads. One that does not is given a moment to
		// take the end of the session.
		reads bool
	}{
		{"reads", nil, true},
		{"reads TLS", []relay.RegisterOption{relay.WithTLSConfig(pool)}, true},
		{"does not read", nil, false},
	} {
		for _, tt := range []struct {
			name  string
			ctx   func(context.Context) (context.Context, context.CancelFunc)
			after time.Duration
			want  relay.Code
			is    error
		}{
			{"no answer", context.WithCancel, 10 * time.Second, relay.CodeTimeout, os.ErrDeadlineExceeded},
			{"deadline", func(ctx context.Context) (context.Context, context.CancelFunc) {
				return context.WithTimeout(ctx, 3*time.Second)
			}, 3 * time.Second, relay.CodeTimeout, context.DeadlineExceeded},
			{"later deadline", func(ctx context.Context) (context.Context, context.CancelFunc) {
				return context.WithTimeout(ctx, time.Hour)
			}, 10 * time.Second, relay.CodeTimeout, os.ErrDeadlineExceeded},
			{"cancelled", func(ctx context.Context) (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancel(ctx)
				time.AfterFunc(2*time.Second, cancel)
				return ctx, cancel
			}, 2 * time.Second, relay.CodeCanceled, context.Canceled},
			{"cancelled with a cause", func(ctx context.Context) (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancelCause(ctx)
				time.AfterFunc(2*time.Second, func() { cancel(cause) })
				return ctx, func() { cancel(nil) }
			}, 2 * time.Second, relay.CodeCanceled, cause},
		} {
			t.Run(tr.name+"/"+tt.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					near, far := net.Pipe()
					defer far.Close()
					if tr.reads {
						go io.Copy(io.Discard, far)
					}
					ctx, cancel := tt.ctx(t.Context())
					defer cancel()
					start := time.Now()
					opts := append(tr.opts, relay.WithDialer(func(context.Context, string, string) (net.Conn, error) { return near, nil }))
					_, err := signUp(ctx, "relay.example:1", opts...)
					took := time.Since(start)
					if late := took - tt.after; late != 0 && (tr.reads || late < 0 || late > time.Second) {
						t.Errorf("gave up after %v", took)
					}
					expectRegisterError(t, err, "relay.example:1", tt.want)
					if !errors.Is(err, tt.is) {
						t.Errorf("Register: %v, want %v in it", err, tt.is)
					}
				})
			})
		}
	}
}

// The context bounds dialling, too, and nothing after registering.
func TestRegisterContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		forever := relay.WithDialer(func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		_, err := signUp(ctx, "relay.example:1", forever)
		expectRegisterError(t, err, "relay.example:1", relay.CodeTimeout)
		if took := time.Since(start); took != time.Minute || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %v: %v", took, err)
		}
	})

	// A dialler may see the deadline just before the context does.
	early := relay.WithDialer(func(context.Context, string, string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.ErrDeadlineExceeded}
	})
	_, err := signUp(t.Context(), "relay.example:1", early)
	expectRegisterError(t, err, "relay.example:1", relay.CodeTimeout)

	srv, addr, log := startLogged(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := signUp(ctx, addr); !errors.Is(err, context.Canceled) || code(err) != relay.CodeCanceled {
		t.Errorf("Register with a context that is over: %v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	l, err := signUp(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cancel()
	go serveEcho(l)
	echoes(t, dial(t, l))
	if n := len(srv.Services()); n != 1 || len(log.with("registered")) != 1 {
		t.Errorf("%d services", n)
	}
}
