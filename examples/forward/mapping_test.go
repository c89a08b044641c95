package main

import (
	"testing"

	"github.com/tcprelay/relay"
)

// What the relay says goes to a terminal or a file as printable characters.
func TestAnnounceClean(t *testing.T) {
	var out transcript
	f := &forwarder{out: &out}
	m := &mapping{f: f}
	m.event(relay.Event{Kind: relay.EventRegistered, Addr: "\x1b]0;x\a:80"})
	if got, want := out.String(), `\x1b]0;x\a:80`+"\n"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
}

// What the relay says is a state of its own, unlike that it could not be asked.
func TestStates(t *testing.T) {
	m := &mapping{f: new(forwarder)}
	away := &relay.RegisterError{Code: relay.CodeUnreachable, Err: errCut}
	no := &relay.RegisterError{Code: relay.CodeNameTaken, Message: "no"}
	for _, tt := range []struct {
		ev   relay.Event
		want state
	}{
		{relay.Event{Kind: relay.EventRefused, Err: away}, registering},
		{relay.Event{Kind: relay.EventRefused, Err: no}, refused},
		{relay.Event{Kind: relay.EventRegistered, Addr: "a:1"}, connected},
		{relay.Event{Kind: relay.EventLost, Addr: "a:1", Err: errCut}, reconnecting},
		{relay.Event{Kind: relay.EventRefused, Addr: "a:1", Err: away}, reconnecting},
		{relay.Event{Kind: relay.EventRefused, Addr: "a:1", Err: no}, refused},
		{relay.Event{Kind: relay.EventResumed, Addr: "a:1"}, connected},
		{relay.Event{Kind: relay.EventDraining, Addr: "a:1"}, reconnecting},
		{relay.Event{Kind: relay.EventEnded, Addr: "a:1", Err: no}, ended},
	} {
		since := m.since
		was := m.state
		m.event(tt.ev)
		if m.state != tt.want || (m.why == "") != (tt.want == connected) {
			t.Errorf("%s: %v, %q, want %v", tt.ev.Kind, m.state, m.why, tt.want)
		}
		if same := m.since.Equal(since); same != (was == m.state) {
			t.Errorf("%s: since %v, before %v", tt.ev.Kind, m.since, since)
		}
	}
}
