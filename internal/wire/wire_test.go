package wire

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func TestLines(t *testing.T) {
	hello := Hello{Version: 1, Name: "a\nb", Port: 8081, Features: []string{"x"}}
	a, err := Line(hello)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Line(Control{Type: Ping, ID: 7})
	if err != nil {
		t.Fatal(err)
	}
	r := NewReader(bytes.NewReader(append(a, b...)))
	var h Hello
	if err := r.Read(&h); err != nil || !reflect.DeepEqual(h, hello) {
		t.Fatalf("read %+v, %v", h, err)
	}
	var c Control
	if err := r.Read(&c); err != nil || !reflect.DeepEqual(c, Control{Type: Ping, ID: 7}) {
		t.Fatalf("read %+v, %v", c, err)
	}
	if err := r.Read(&c); err != io.EOF {
		t.Fatalf("at the end: %v", err)
	}
}

func TestBadLines(t *testing.T) {
	var syntax *SyntaxError
	for _, tt := range []struct {
		name, in string
		is       func(error) bool
	}{
		{"too long", strings.Repeat(" ", MaxLine) + "\n", func(err error) bool { return err == ErrTooLong }},
		{"no newline", `{"version":1}`, func(err error) bool { return err == ErrCut }},
		{"not JSON", "hello\n", func(err error) bool { return errors.As(err, &syntax) }},
		{"another type", `{"version":"one"}` + "\n", func(err error) bool { return errors.As(err, &syntax) }},
		{"empty line", "\n", func(err error) bool { return errors.As(err, &syntax) }},
		{"nothing", "", func(err error) bool { return err == io.EOF }},
	} {
		var h Hello
		if err := NewReader(strings.NewReader(tt.in)).Read(&h); !tt.is(err) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	if _, err := Line(Hello{Name: strings.Repeat("x", MaxLine)}); err != ErrTooLong {
		t.Errorf("writing too long a line: %v", err)
	}
	// The longest line fits.
	var h Hello
	in := `{"version":1}` + strings.Repeat(" ", MaxLine-len(`{"version":1}`)-1) + "\n"
	if err := NewReader(strings.NewReader(in)).Read(&h); err != nil || h.Version != 1 {
		t.Errorf("longest line: %+v, %v", h, err)
	}
	// What a version does not know is ignored.
	if err := NewReader(strings.NewReader(`{"version":1,"later":{"x":1}}` + "\n")).Read(&h); err != nil {
		t.Errorf("unknown field: %v", err)
	}
}

func tcp(s string) *net.TCPAddr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(s)) }

func TestProxyRoundTrip(t *testing.T) {
	for _, tt := range []struct {
		src, dst         net.Addr
		wantSrc, wantDst *net.TCPAddr
		size             int
	}{
		{tcp("192.0.2.1:1"), tcp("198.51.100.2:65535"), tcp("192.0.2.1:1"), tcp("198.51.100.2:65535"), 28},
		{tcp("[2001:db8::1]:443"), tcp("[::1]:80"), tcp("[2001:db8::1]:443"), tcp("[::1]:80"), 52},
		{tcp("[::ffff:192.0.2.1]:7"), tcp("192.0.2.9:8"), tcp("192.0.2.1:7"), tcp("192.0.2.9:8"), 28},
		{tcp("192.0.2.1:7"), tcp("[2001:db8::1]:8"), tcp("192.0.2.1:7"), tcp("[2001:db8::1]:8"), 52},
		{&net.UnixAddr{Name: "x", Net: "unix"}, tcp("192.0.2.9:8"), nil, nil, 16},
		{nil, nil, nil, nil, 16},
	} {
		b := AppendProxy(nil, tt.src, tt.dst)
		n, src, dst, err := ParseProxy(append(b, "more"...))
		if err != nil || n != tt.size || len(b) != tt.size {
			t.Errorf("%v %v: length %d of %d, %v", tt.src, tt.dst, n, len(b), err)
		}
		if !reflect.DeepEqual(src, tt.wantSrc) || !reflect.DeepEqual(dst, tt.wantDst) {
			t.Errorf("%v %v came back as %v %v", tt.src, tt.dst, src, dst)
		}
		for i := range b {
			if _, _, _, err := ParseProxy(b[:i]); err != ErrProxyShort {
				t.Errorf("first %d bytes: %v", i, err)
			}
		}
	}
}

// The bytes of another implementation's header, written by hand from the
// specification, with an extension behind the addresses.
func TestProxyBytes(t *testing.T) {
	in := "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x10\x0a\x00\x00\x01\x0a\x00\x00\x02\x00\x50\x01\xbb\x04\x00\x01\x00"
	n, src, dst, err := ParseProxy([]byte(in))
	if err != nil || n != len(in) || src.String() != "10.0.0.1:80" || dst.String() != "10.0.0.2:443" {
		t.Errorf("%d %v %v %v", n, src, dst, err)
	}
	local := "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"
	if n, src, dst, err := ParseProxy([]byte(local)); err != nil || n != 16 || src != nil || dst != nil {
		t.Errorf("LOCAL: %d %v %v %v", n, src, dst, err)
	}
	for name, bad := range map[string]string{
		"version 1":         "PROXY TCP4 10.0.0.1 10.0.0.2 80 443\r\n",
		"another version":   "\r\n\r\n\x00\r\nQUIT\n\x31\x11\x00\x0c\x0a\x00\x00\x01\x0a\x00\x00\x02\x00\x50\x01\xbb",
		"UDP":               "\r\n\r\n\x00\r\nQUIT\n\x21\x12\x00\x0c\x0a\x00\x00\x01\x0a\x00\x00\x02\x00\x50\x01\xbb",
		"addresses too few": "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x04\x0a\x00\x00\x01",
		"far too long":      "\r\n\r\n\x00\r\nQUIT\n\x21\x11\xff\xff\x0a\x00\x00\x01",
	} {
		if _, _, _, err := ParseProxy([]byte(bad)); err != ErrNotProxy {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzProxy(f *testing.F) {
	f.Add(AppendProxy(nil, tcp("192.0.2.1:1"), tcp("198.51.100.2:65535")))
	f.Add(AppendProxy(nil, tcp("[2001:db8::1]:443"), tcp("[::1]:80")))
	f.Add(AppendProxy(nil, nil, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, src, dst, err := ParseProxy(b)
		if err != nil {
			return
		}
		if n < proxyFixed || n > len(b) || n > MaxProxyHeader || (src == nil) != (dst == nil) {
			t.Fatalf("%d of %d bytes, %v %v", n, len(b), src, dst)
		}
		if src == nil {
			return
		}
		_, src2, dst2, err := ParseProxy(AppendProxy(nil, src, dst))
		if err != nil || src.String() != src2.String() || dst.String() != dst2.String() {
			t.Fatalf("%v %v came back as %v %v, %v", src, dst, src2, dst2, err)
		}
	})
}

func FuzzHello(f *testing.F) {
	f.Add([]byte(`{"version":1,"name":"web","port":8081}` + "\n"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var h Hello
		if err := NewReader(bytes.NewReader(b)).Read(&h); err != nil {
			return
		}
		line, err := Line(h)
		if err == ErrTooLong {
			return // escapes made it longer
		}
		if err != nil {
			t.Fatal(err)
		}
		var again Hello
		if err := NewReader(bytes.NewReader(line)).Read(&again); err != nil {
			t.Fatalf("%q came back as %q: %v", b, line, err)
		}
		if !reflect.DeepEqual(normal(h), normal(again)) {
			t.Fatalf("%+v came back as %+v", h, again)
		}
	})
}

func normal(h Hello) Hello {
	if len(h.Features) == 0 {
		h.Features = nil
	}
	return h
}
