package greeting

import (
	"bytes"
	"fmt"
	"strings"
)

// preface is what a client of HTTP/2 begins with (RFC 9113, section 3.4).
const preface = "PRI * HTTP/2.0\r\n"

// readRequest reads the head of a request. It is stricter than a server has to be: where
// two readers could find two hosts, there is none.
func (g *Greeting) readRequest(rec *recorder) error {
	g.Kind = HTTP
	end, checked := -1, false
	for from := 0; end < 0; {
		if bytes.HasPrefix(rec.buf, []byte(preface)) {
			g.Kind = HTTP2
			return nil
		}
		if end = headEnd(rec.buf, from); end >= 0 {
			break
		}
		if line, _, whole := bytes.Cut(rec.buf, []byte("\n")); whole && !checked {
			if _, _, ok := requestLine(line); !ok {
				return ErrMalformed // it may be something else, which goes on otherwise
			}
			checked = true
		}
		from = max(0, len(rec.buf)-3)
		if err := rec.fill(); err != nil {
			return err
		}
	}
	lines := strings.Split(string(rec.buf[:end]), "\n")
	method, target, ok := requestLine([]byte(lines[0]))
	if !ok {
		return ErrMalformed
	}
	g.head = method == "HEAD"
	host, hosts := "", 0
	for _, line := range lines[1:] {
		name, value, ok := strings.Cut(strings.TrimSuffix(line, "\r"), ":")
		if !ok || !isToken(name) { // a space before the colon, or a line that goes on, too
			return fmt.Errorf("%w: field %.40q", ErrMalformed, line)
		}
		if strings.EqualFold(name, "Host") {
			host = strings.Trim(value, " \t")
			hosts++
		}
	}
	if hosts > 1 {
		return fmt.Errorf("%w: %d Host fields", ErrMalformed, hosts)
	}
	switch scheme, rest, ok := strings.Cut(target, "://"); {
	case method == "CONNECT":
		host = target
	case ok && (strings.EqualFold(scheme, "http") || strings.EqualFold(scheme, "https")):
		host, _, _ = strings.Cut(rest, "/")
		host, _, _ = strings.Cut(host, "?")
	}
	g.Host, ok = withoutPort(host)
	if !ok {
		return fmt.Errorf("%w: host %.40q", ErrMalformed, host)
	}
	return nil
}

// headEnd returns where the lines of a head end, behind from at least, and -1 if it is not
// whole.
func headEnd(b []byte, from int) int {
	if i := bytes.Index(b[from:], []byte("\n\r\n")); i >= 0 {
		return from + i
	}
	return -1
}

// requestLine takes the first line of a request apart.
func requestLine(line []byte) (method, target string, ok bool) {
	text, ok := strings.CutSuffix(string(line), "\r")
	if !ok {
		return "", "", false
	}
	fields := strings.Split(text, " ")
	if len(fields) != 3 || !isToken(fields[0]) || fields[1] == "" || fields[2] != "HTTP/1.1" && fields[2] != "HTTP/1.0" {
		return "", "", false
	}
	return fields[0], fields[1], true
}

// isToken reports whether s is one (RFC 9110, section 5.6.2).
func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0) {
			return false
		}
	}
	return s != ""
}

// withoutPort returns the host of host:port. An address is one too, if nobody's name.
func withoutPort(s string) (host string, ok bool) {
	if strings.ContainsAny(s, "@/\\ \t,") {
		return "", false
	}
	if strings.HasPrefix(s, "[") {
		host, _, ok = strings.Cut(s, "]")
		return host + "]", ok
	}
	host, port, _ := strings.Cut(s, ":")
	return host, !strings.Contains(port, ":")
}
