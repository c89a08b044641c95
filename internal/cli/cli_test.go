package cli

import (
	"errors"
	"flag"
	"slices"
	"strings"
	"testing"
	"time"
)

type settings struct {
	listen, self string
	hosts        List
	drain        time.Duration
	wait         bool
}

func flags() (*Flags, *settings) {
	s := new(settings)
	f := New("relayd", "Relayd is a relay.\n")
	f.Group("Where")
	f.StringVar(&s.listen, "listen", "127.0.0.1:8080", "`address` that services register at")
	f.Var(&s.hosts, "hosts", "`address` for hosts, of which there may be many, and a text that does not fit the line it is on")
	f.Group("How")
	f.StringVar(&s.self, "tls-self", "", "`file`")
	f.DurationVar(&s.drain, "drain", 30*time.Second, "how `long`")
	f.BoolVar(&s.wait, "wait", false, "wait")
	return f, s
}

func TestParse(t *testing.T) {
	env := map[string]string{"RELAYD_LISTEN": "of the environment", "RELAYD_TLS_SELF": "file",
		"RELAYD_HOSTS": ":443, :80", "RELAYD_WAIT": "true", "LISTEN": "of another"}
	lookup := func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	for _, tt := range []struct {
		args []string
		want settings
	}{
		{nil, settings{"of the environment", "file", List{":443", ":80"}, 30 * time.Second, true}},
		{[]string{"-listen=x", "-hosts", "a", "-hosts=b", "-drain", "1s", "-wait=false"},
			settings{"x", "file", List{"a", "b"}, time.Second, false}},
	} {
		f, got := flags()
		if err := f.parse(tt.args, lookup); err != nil {
			t.Fatal(err)
		}
		if got.listen != tt.want.listen || got.self != tt.want.self || !slices.Equal(got.hosts, tt.want.hosts) ||
			got.drain != tt.want.drain || got.wait != tt.want.wait {
			t.Errorf("%q: %+v, want %+v", tt.args, *got, tt.want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		env  map[string]string
		says string
	}{
		{"an argument", []string{"x"}, nil, `"x"`},
		{"a flag that is none", []string{"-x"}, nil, "-x"},
		{"a value that is none", []string{"-drain", "x"}, nil, "-drain"},
		{"a variable that is none", nil, map[string]string{"RELAYD_DRAIN": "x"}, "RELAYD_DRAIN"},
		{"an empty element", nil, map[string]string{"RELAYD_HOSTS": "a,,b"}, "RELAYD_HOSTS"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, _ := flags()
			err := f.parse(tt.args, func(name string) (string, bool) { v, ok := tt.env[name]; return v, ok })
			if err == nil || errors.Is(err, flag.ErrHelp) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v", err)
			}
		})
	}
	f, _ := flags()
	if err := f.parse([]string{"-h"}, func(string) (string, bool) { return "", false }); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-h: %v", err)
	}
}

func TestHelp(t *testing.T) {
	const want = `Relayd is a relay.

Where:
  -hosts address        address for hosts, of which there may be many, and a
                        text that does not fit the line it is on
  -listen address       address that services register at (default
                        127.0.0.1:8080)

How:
  -drain long           how long (default 30s)
  -tls-self file        file
  -wait                 wait

The environment can give each flag too, -hosts as RELAYD_HOSTS.
`
	f, _ := flags()
	var b strings.Builder
	f.Help(&b)
	if b.String() != want {
		t.Errorf("%s", b.String())
	}
}
