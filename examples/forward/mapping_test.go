package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
)

// What the relay says goes to a terminal or a file as printable characters.
func TestAnnounceClean(t *testing.T) {
	var out transcript
	f := &forwarder{out: &out}
	m := &mapping{f: f}
	m.event(0, relay.Event{Kind: relay.EventRegistered, Addr: "\x1b]0;x\a:80"})
	if got, want := out.String(), `\x1b]0;x\a:80`+"\n"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
}

// What the relay says is a state of its own, unlike that it could not be asked.
func TestStates(t *testing.T) {
	away := &relay.RegisterError{Code: relay.CodeUnreachable, Err: io.EOF}
	no := &relay.RegisterError{Code: relay.CodeNameTaken, Message: "no"}
	synctest.Test(t, func(t *testing.T) {
		m := newMapping(new(forwarder), target{}, slog.New(slog.DiscardHandler))
		for _, tt := range []struct {
			ev   relay.Event
			want state
		}{
			{relay.Event{Kind: relay.EventRefused, Err: away}, registering},
			{relay.Event{Kind: relay.EventRefused, Err: no}, refused},
			{relay.Event{Kind: relay.EventRegistered, Addr: "a:1"}, connected},
			{relay.Event{Kind: relay.EventLost, Addr: "a:1", Err: io.EOF}, reconnecting},
			{relay.Event{Kind: relay.EventRefused, Addr: "a:1", Err: away}, reconnecting},
			{relay.Event{Kind: relay.EventRefused, Addr: "a:1", Err: no}, refused},
			{relay.Event{Kind: relay.EventResumed, Addr: "a:1"}, connected},
			{relay.Event{Kind: relay.EventDraining, Addr: "a:1"}, reconnecting},
			{relay.Event{Kind: relay.EventEnded, Addr: "a:1", Err: no}, ended},
			{relay.Event{Kind: relay.EventResumed, Addr: "a:1"}, ended},
		} {
			since := m.since
			was := m.state
			time.Sleep(time.Second)
			m.event(0, tt.ev)
			m.event(1, relay.Event{Kind: relay.EventLost, Err: errors.New("of another turn")})
			if m.state != tt.want || (m.why == "") != (tt.want == connected) {
				t.Errorf("%s: %v, %q, want %v", tt.ev.Kind, m.state, m.why, tt.want)
			}
			if same := m.since.Equal(since); same != (was == m.state) {
				t.Errorf("%s: since %v, before %v", tt.ev.Kind, m.since, since)
			}
		}
	})
}

// Who could be reached by this machine alone is dialed without a watch.
func TestLookedUp(t *testing.T) {
	for to, want := range map[string]bool{
		"3000": false, ":3000": false, "localhost:1": false, "127.0.0.1:1": false, "[::1]:1": false, "[fe80::1%eth0]:1": false,
		"unix:/example.com:1": false, "example.com:1": true, "db:1": true,
	} {
		if one, err := parseTarget(to); err != nil || one.lookedUp() != want {
			t.Errorf("%s: %v, %v", to, one.lookedUp(), err)
		}
	}
}

// A name server that does not answer does not hold a client for longer than a target may.
func TestLookupDeadline(t *testing.T) {
	before := net.DefaultResolver
	defer func() { net.DefaultResolver = before }()
	silent := make(chan struct{})
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		<-silent
		return nil, io.EOF
	}}
	defer close(silent)
	to, err := parseTarget("app.example.com:1")
	if err != nil {
		t.Fatal(err)
	}
	m := newMapping(new(forwarder), to, slog.New(slog.DiscardHandler))
	failed := make(chan error, 1)
	go func() {
		_, err := m.connect(time.Now().Add(100 * time.Millisecond))
		failed <- err
	}()
	select {
	case err := <-failed:
		if timeout, ok := errors.AsType[net.Error](err); !ok || !timeout.Timeout() {
			t.Errorf("%v", err)
		}
	case <-time.After(patience):
		t.Fatal("it waits for ever")
	}
}
