package greeting

import (
	"errors"
	"fmt"
	"os"
)

// A Reason is why a client cannot be served.
type Reason int

const (
	Unknown Reason = iota // nobody has the host
	Away                  // who has it is not there
	Refused               // over a limit
	Bad                   // the greeting is none
	Long                  // it is too long
	Slow                  // it took too long
)

// ReasonOf returns the reason that an error of Read is. There may be nobody to tell it.
func ReasonOf(err error) Reason {
	switch {
	case errors.Is(err, ErrTooLong):
		return Long
	case errors.Is(err, os.ErrDeadlineExceeded):
		return Slow
	}
	return Bad
}

// Alerts of TLS (RFC 8446, section 6).
const (
	alertDecodeError      = 50
	alertInternalError    = 80
	alertUnrecognizedName = 112
)

var answers = map[Reason]struct {
	alert  byte
	status string
	text   string
	fields string
}{
	Unknown: {alertUnrecognizedName, "404 Not Found", "There is no service of this name here.", ""},
	Away:    {alertInternalError, "503 Service Unavailable", "The service is away. Try again later.", "Retry-After: 10\r\n"},
	Refused: {alertInternalError, "503 Service Unavailable", "The service takes no more clients now. Try again later.", "Retry-After: 10\r\n"},
	Bad:     {alertDecodeError, "400 Bad Request", "This is no request that names a host.", ""},
	Long:    {alertDecodeError, "431 Request Header Fields Too Large", "The head of the request is too long.", ""},
	Slow:    {alertDecodeError, "408 Request Timeout", "The head of the request took too long.", ""},
}

// Answer returns what a client is told, in its own language, before it is hung up on. It
// is nothing if it has none that is known.
func (g *Greeting) Answer(why Reason) []byte {
	a := answers[why]
	switch g.Kind {
	case TLS:
		const typeAlert, fatal = 21, 2
		return []byte{typeAlert, 3, 3, 0, 2, fatal, a.alert}
	case HTTP:
		body := a.text + "\n"
		head := fmt.Sprintf("HTTP/1.1 %s\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n%sConnection: close\r\n\r\n",
			a.status, len(body), a.fields)
		if g.head {
			body = ""
		}
		return []byte(head + body)
	case HTTP2:
		// SETTINGS, empty, and GOAWAY with HTTP_1_1_REQUIRED (RFC 9113, sections 6.5, 6.8
		// and 7): it has to come with TLS, or with a request that names the host.
		return []byte{
			0, 0, 0, 4, 0, 0, 0, 0, 0,
			0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x0d,
		}
	}
	return nil
}
