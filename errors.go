package relay

import (
	"fmt"
	"net"
	"os"

	"github.com/tcprelay/relay/internal/wire"
)

// A Code says why Register failed.
type Code string

const (
	// CodeUnreachable: nobody could be connected to at the relay's address.
	CodeUnreachable Code = "unreachable"
	// CodeTLS: the TLS handshake with the relay failed, or only one of the two speaks
	// TLS.
	CodeTLS Code = "tls"
	// CodeNotRelay: what was connected to does not speak the relay's protocol, or
	// hung up before it answered.
	CodeNotRelay Code = "not_relay"
	// CodeTimeout: no answer in time, be it the context's or ten seconds.
	CodeTimeout Code = "timeout"
	// CodeCanceled: the context was canceled.
	CodeCanceled Code = "canceled"
	// CodeInsecure: the token would have been sent in clear; see WithToken.
	CodeInsecure Code = "insecure"

	// The others are the relay's answers.

	// CodeMalformed: the relay did not understand the registration.
	CodeMalformed Code = wire.CodeMalformed
	// CodeVersion: the relay speaks another version of the protocol.
	CodeVersion Code = wire.CodeVersion
	// CodeUnauthorized: the relay does not accept the token, certificate or whatever
	// else was shown, or not for that name.
	CodeUnauthorized Code = wire.CodeUnauthorized
	// CodePortUnavailable: the port asked for is not one of the relay's, not allowed,
	// or in use.
	CodePortUnavailable Code = wire.CodePortUnavailable
	// CodeHostUnavailable: the relay serves no hostnames.
	CodeHostUnavailable Code = wire.CodeHostUnavailable
	// CodeNameTaken: another service has the name, or the hostname.
	CodeNameTaken Code = wire.CodeNameTaken
	// CodeServerFull: the relay has no port left, or takes no more services.
	CodeServerFull Code = wire.CodeServerFull
	// CodeClosing: the relay is going away.
	CodeClosing Code = wire.CodeClosing
	// CodeUnavailable: the relay cannot tell now whether the app may register.
	CodeUnavailable Code = wire.CodeUnavailable

	// These end a listener that was registered.

	// CodeDisconnected: the relay's operator ended the service.
	CodeDisconnected Code = wire.CodeDisconnected
	// CodeSuperseded: another session has taken up this one's lease.
	CodeSuperseded Code = wire.CodeSuperseded
)

// stands reports that trying again would not help.
func (c Code) stands() bool {
	switch c {
	case CodeMalformed, CodeVersion, CodeUnauthorized, CodeInsecure, CodeDisconnected, CodeSuperseded:
		return true
	}
	return false
}

// A RegisterError is why Register failed, or why a listener could not go on. Codes
// that this version does not know may come from a later relay.
type RegisterError struct {
	Addr    string // of the relay, as Register was given it
	Code    Code   // why
	Message string // the relay's, if it gave one
	Err     error  // what lies behind it; nil if the relay refused
}

// Error tells at which relay it failed, and why, with what the relay said in quotes.
func (e *RegisterError) Error() string {
	s := "relay: register at " + e.Addr + ": " + string(e.Code)
	if e.Message != "" {
		s += fmt.Sprintf(" (%.200q)", e.Message)
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns Err.
func (e *RegisterError) Unwrap() error { return e.Err }

// Timeout reports whether there was no answer in time.
func (e *RegisterError) Timeout() bool { return e.Code == CodeTimeout }

// Temporary is Timeout. It makes a RegisterError a net.Error.
func (e *RegisterError) Temporary() bool { return e.Timeout() }

// Is makes a timeout match os.ErrDeadlineExceeded, whosever deadline it was.
func (e *RegisterError) Is(target error) bool {
	return target == os.ErrDeadlineExceeded && e.Timeout()
}

var _ net.Error = (*RegisterError)(nil)
