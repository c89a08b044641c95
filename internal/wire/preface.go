package wire

import (
	"encoding/hex"
	"fmt"
	"io"
)

// preface is what a dedicated connection begins with, in place of a muxado frame: with
// these bytes none begins that muxado knows. A Secret follows.
const preface = "relay/1d"

// A Secret is what a dedicated connection shows that it was asked for. The relay makes
// it, tells it on the control stream, in hexadecimal, and takes it once.
type Secret [16]byte

// MarshalText implements encoding.TextMarshaler.
func (s Secret) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, s[:]), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Secret) UnmarshalText(b []byte) error {
	if hex.DecodedLen(len(b)) != len(s) {
		return fmt.Errorf("a secret of %d digits", len(b))
	}
	_, err := hex.Decode(s[:], b)
	return err
}

// AppendPreface appends what a dedicated connection begins with.
func AppendPreface(b []byte, s Secret) []byte {
	return append(append(b, preface...), s[:]...)
}

// ReadPreface reads the beginning of a connection as far as it has to, to know what that
// is. For a dedicated connection it returns its secret and ok, and otherwise what it has
// read, which belongs to a session; if that is all there is, it returns no error.
func ReadPreface(r io.Reader) (head []byte, s Secret, ok bool, err error) {
	buf := make([]byte, len(preface)+len(s))
	for n := 0; ; {
		m, err := r.Read(buf[n:])
		n += m
		known := min(n, len(preface))
		switch {
		case string(buf[:known]) != preface[:known], err == io.EOF:
			return buf[:n], s, false, nil
		case n == len(buf):
			return nil, Secret(buf[len(preface):]), true, nil
		case err != nil:
			return buf[:n], s, false, err
		}
	}
}

// ReadProxy reads a header like that of AppendProxy from r, and nothing behind it, and
// returns it.
func ReadProxy(r io.Reader) ([]byte, error) {
	buf := make([]byte, proxyFixed, MaxProxyHeader)
	if _, err := io.ReadFull(r, buf); err != nil {
		return nil, err
	}
	size := int(buf[proxyFixed-2])<<8 | int(buf[proxyFixed-1])
	if string(buf[:len(proxySignature)]) != proxySignature || proxyFixed+size > MaxProxyHeader {
		return nil, ErrNotProxy
	}
	buf = buf[:proxyFixed+size]
	_, err := io.ReadFull(r, buf[proxyFixed:])
	return buf, err
}
