package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

func write(t *testing.T, name, content string) string {
	t.Helper()
	if !filepath.IsAbs(name) {
		name = filepath.Join(t.TempDir(), name)
	}
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// A certificate is made once, for this user alone, and its pin stays what it is.
func TestSelfSigned(t *testing.T) {
	file := filepath.Join(t.TempDir(), "relayd.pem")
	now := time.Now()
	first, err := selfSigned(file, []string{"relay.example.com", "10.0.0.1"}, true, now)
	if err != nil {
		t.Fatal(err)
	}
	again, err := selfSigned(file, []string{"other.example.com"}, false, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if relay.Pin(first.Leaf) != relay.Pin(again.Leaf) {
		t.Error("the second time the key is another one")
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 && runtime.GOOS != "windows" {
		t.Errorf("the file: %v, %v", info.Mode(), err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(again.Leaf)
	for _, host := range []string{"relay.example.com", "10.0.0.1"} {
		for _, at := range []time.Time{now, now.AddDate(selfYears, 0, -1)} {
			if _, err := again.Leaf.Verify(x509.VerifyOptions{DNSName: host, Roots: roots, CurrentTime: at}); err != nil {
				t.Errorf("%s at %v: %v", host, at, err)
			}
		}
	}
	other, err := selfSigned(file+"2", nil, true, now)
	if err != nil || relay.Pin(other.Leaf) == relay.Pin(first.Leaf) {
		t.Errorf("two files have one key; %v", err)
	}
	if _, err := selfSigned(write(t, "not.pem", "nothing of the kind"), nil, true, now); err == nil || !strings.Contains(err.Error(), "not.pem") {
		t.Errorf("a file of something else: %v", err)
	}
	for _, mayMake := range []bool{false, true} {
		if _, err := selfSigned(filepath.Join(file, "under"), nil, mayMake, now); err == nil {
			t.Error("a file that cannot be")
		}
	}
	if _, err := selfSigned(file+"3", nil, false, now); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is gone: %v", err)
	}
	if err := create(file, []byte("another")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a file that is there: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(file), ".relayd-*")); err != nil || len(left) > 0 {
		t.Errorf("left over: %q, %v", left, err)
	}
}

func TestTokens(t *testing.T) {
	got, err := readTokens(write(t, "tokens", "\n# the first\none\n  two \r\n\n#three"))
	if err != nil || strings.Join(got, ",") != "one,two" {
		t.Errorf("%q, %v", got, err)
	}
	for _, content := range []string{"", "# none\n", strings.Repeat("x", 100_000),
		"-----BEGIN CERTIFICATE-----\nAAAA\n", "one\n\x00two\n", "\xff\xfe\n"} {
		if got, err := readTokens(write(t, "tokens", content)); err == nil {
			t.Errorf("of %.20q: %.20q", content, got)
		}
	}
}

func TestPorts(t *testing.T) {
	for s, want := range map[string][2]int{"1-2": {1, 2}, "80": {80, 80}} {
		if first, last, err := parsePorts(s); err != nil || first != want[0] || last != want[1] {
			t.Errorf("%q: %d, %d, %v", s, first, last, err)
		}
	}
	for _, s := range []string{"", "-", "1-", "-2", "a-b", "1-2-3"} {
		if _, _, err := parsePorts(s); err == nil || !strings.Contains(err.Error(), "-ports") {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestTLSFlags(t *testing.T) {
	file := filepath.Join(t.TempDir(), "self.pem")
	if _, err := selfSigned(file, []string{"localhost"}, true, time.Now()); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		c    config
		says string // of the error
	}{
		{config{}, ""},
		{config{cert: file, key: file}, ""},
		{config{self: file}, ""},
		{config{self: file, clientCA: file}, ""},
		{config{cert: file}, "-key"},
		{config{key: file}, "-cert"},
		{config{clientCA: file}, "-cert"},
		{config{self: file, cert: file}, "-tls-self"},
		{config{cert: file, key: file + "x"}, "-key"},
		{config{self: file, clientCA: write(t, "empty.pem", "")}, "-client-ca"},
		{config{self: file, clientCA: file + "x"}, "-client-ca"},
	} {
		got, err := tt.c.tls(true)
		if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%+v: %v", tt.c, err)
		}
		if err == nil && got != nil && got.MinVersion != tls.VersionTLS13 {
			t.Errorf("%+v: TLS from version %x", tt.c, got.MinVersion)
		}
	}
}

// What is read anew holds as a whole, or not at all.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	c := &config{listen: "127.0.0.1:0", self: filepath.Join(dir, "self.pem"), tokens: []string{write(t, filepath.Join(dir, "tokens"), "old\nnew\n")}}
	creds := &credentials{config: c}
	if err := creds.load(); err != nil {
		t.Fatal(err)
	}
	srv, err := relay.NewServer(creds.options()...)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", c.listen)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	defer func() {
		srv.Close()
		if err := <-served; err != relay.ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
	}()
	pin := func() string { return relay.Pin(creds.now.Load().tls.Certificates[0].Leaf) }
	register := func(token string) (*relay.Listener, error) {
		return relay.Register(t.Context(), ln.Addr().String(), relay.WithPin(pin()), relay.WithToken(token))
	}
	must := func(token string) *relay.Listener {
		t.Helper()
		l, err := register(token)
		if err != nil {
			t.Fatalf("with the token %q: %v", token, err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	old, stays := must("old"), must("new")
	var said bytes.Buffer
	log := slog.New(slog.NewTextHandler(&said, nil))

	// Bad files change nothing.
	before := pin()
	write(t, c.tokens[0], "# none\n")
	creds.reload(log, srv)
	if !strings.Contains(said.String(), "not reloaded") || !strings.Contains(said.String(), "no token") {
		t.Errorf("logged %s", said.String())
	}
	write(t, c.tokens[0], "new\n")
	write(t, c.self, "no certificate")
	creds.reload(log, srv)
	must("old").Close()
	if pin() != before {
		t.Error("the certificate is another one")
	}

	if err := os.Remove(c.self); err != nil {
		t.Fatal(err)
	}
	creds.reload(log, srv)
	if pin() != before {
		t.Error("a new certificate was made for one that is gone")
	}

	// The new key, and without the old token.
	if _, err := selfSigned(c.self, []string{"localhost"}, true, time.Now()); err != nil {
		t.Fatal(err)
	}
	said.Reset()
	creds.reload(log, srv)
	if !strings.Contains(said.String(), "msg=reloaded") {
		t.Errorf("logged %s", said.String())
	}
	if pin() == before {
		t.Error("the certificate is still the old one")
	}
	_, err = old.Accept()
	expectCode(t, "Accept of who had the old token", err, relay.CodeUnauthorized)
	_, err = register("old")
	expectCode(t, "registering with the old token", err, relay.CodeUnauthorized)
	must("new")
	_, err = relay.Register(t.Context(), ln.Addr().String(), relay.WithPin(before), relay.WithToken("new"))
	expectCode(t, "registering with the old pin", err, relay.CodeTLS)
	if !stays.Stats().Connected || stays.Stats().Reconnects != 0 {
		t.Errorf("who stays: %+v", stays.Stats())
	}
}

func expectCode(t *testing.T, what string, err error, want relay.Code) {
	t.Helper()
	if e, ok := asRegisterError(err); !ok || e.Code != want {
		t.Errorf("%s: %v, want %s", what, err, want)
	}
}

func TestTellOwners(t *testing.T) {
	for _, tt := range []struct{ listen, advertise, want string }{
		{"127.0.0.1:0", "", "forward -relay 127.0.0.1:"},
		{"127.0.0.1:0", "relay.example.com", "forward -relay relay.example.com:"},
		{"127.0.0.1:0", "2001:db8::1", "forward -relay [2001:db8::1]:"},
	} {
		c := &config{listen: tt.listen, advertise: tt.advertise, self: filepath.Join(t.TempDir(), "self.pem"), tokens: []string{write(t, "tokens", "t")}}
		creds := &credentials{config: c}
		if err := creds.load(); err != nil {
			t.Fatal(err)
		}
		ln, err := net.Listen("tcp", c.listen)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		c.tellOwners(&b, creds, ln)
		ln.Close()
		pin := relay.Pin(creds.now.Load().tls.Certificates[0].Leaf)
		if !strings.HasPrefix(b.String(), tt.want) || !strings.Contains(b.String(), " -pin "+pin+" -token token.txt -to ") ||
			!strings.Contains(b.String(), `relay.WithPin("`+pin+`"), relay.WithToken(token))`) {
			t.Errorf("%+v: %s", tt, b.String())
		}
	}
}

// The unit of systemd sets what there is to set.
func TestUnit(t *testing.T) {
	b, err := os.ReadFile("relayd.service")
	if err != nil {
		t.Fatal(err)
	}
	f := flags(new(config))
	n := 0
	for line := range strings.Lines(string(b)) {
		setting, ok := strings.CutPrefix(strings.TrimSpace(line), "Environment=RELAYD_")
		if !ok {
			continue
		}
		n++
		name, value, _ := strings.Cut(setting, "=")
		name = strings.ReplaceAll(strings.ToLower(name), "_", "-")
		if err := f.Set(name, value); err != nil {
			t.Errorf("%s: %v", setting, err)
		}
	}
	if n < 5 {
		t.Errorf("only %d settings", n)
	}
}
