package relay

import (
	"sync"
	"time"
)

// An EventKind says what happened.
type EventKind string

const (
	// EventRegistered: a service has its public address.
	EventRegistered EventKind = "registered"
	// EventLost: the session between app and relay broke. Err says why. The app tries
	// to resume it, and until it has, or the lease is over, new clients wait.
	EventLost EventKind = "lost"
	// EventResumed: a session took up a lost one's address.
	EventResumed EventKind = "resumed"
	// EventRefused: a registration failed, with Err. An app tries again unless the code
	// is one that stands; then the listener is over. Register itself tells it only of the
	// tries of WithWait, which have no Addr yet.
	EventRefused EventKind = "refused"
	// EventDraining: the relay is going away. The app looks for it anew, and clients
	// that are connected may go on.
	EventDraining EventKind = "draining"
	// EventEnded: an app will not come back, because it closed its listener (Err is nil
	// then), was disconnected, or stayed away for too long. A shared service goes on
	// while there are other apps. A listener tells it when the relay will not have it
	// any longer, and not after its Close.
	EventEnded EventKind = "ended"

	// The others are of a server only.

	// EventClient: a client was connected to an app.
	EventClient EventKind = "client"
	// EventClientLeft: it has left, or the app refused it and there was no other. Err is
	// nil if both sides ended in order.
	EventClientLeft EventKind = "client_left"
	// EventClientRefused: it was not connected to an app, and reset. Err says why.
	EventClientRefused EventKind = "client_refused"
)

// An Event is something that happened to a service, as WithEvents tells it. Fields
// that an event has no use for are zero.
type Event struct {
	Kind     EventKind // what happened
	Time     time.Time // when it did
	Service  string    // its name, or else its hostname or public address
	Addr     string    // the public address
	Identity string    // whose it is; a server's only
	Remote   string    // the address of the app, of the client, or of the relay
	Err      error     // why, if there is a reason; see the kinds

	BytesIn, BytesOut int64 // of a client that left: to the app, and from it
}

// events calls the function of WithEvents, one event at a time.
type events struct {
	f  func(Event)
	mu sync.Mutex
}

func (e *events) send(ev Event) {
	if e.f == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	ev.Time = time.Now()
	e.f(ev)
}
