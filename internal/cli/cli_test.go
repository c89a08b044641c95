package cli

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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
	port         int
	rate         float64
	seed         uint64
}

func flags() (*Flags, *settings) {
	s := new(settings)
	f := New("relayd", "Relayd is a relay.\n")
	f.Group("Where")
	f.StringVar(&s.listen, "listen", "127.0.0.1:8080", "`address` that services register at")
	f.Var(&s.hosts, "hosts", "`address` for hosts, of which there may be many, and a text that does not fit the line it is on")
	f.IntVar(&s.port, "port", 0, "its port")
	f.Group("How")
	f.StringVar(&s.self, "tls-self", "", "`file`")
	f.DurationVar(&s.drain, "drain", 30*time.Second, "how `long`")
	f.BoolVar(&s.wait, "wait", false, "wait")
	f.Float64Var(&s.rate, "rate", 0, "a rate")
	f.Uint64Var(&s.seed, "seed", 0, "a seed")
	return f, s
}

func TestParse(t *testing.T) {
	env := map[string]string{"RELAYD_LISTEN": "of the environment", "RELAYD_TLS_SELF": "file",
		"RELAYD_HOSTS": ":443, :80", "RELAYD_WAIT": "true", "RELAYD_DRAIN": "",
		"RELAYD_PORT": "tcp://10.0.0.1:80", "LISTEN": "of another"}
	lookup := func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	for _, tt := range []struct {
		args []string
		want settings
	}{
		{nil, settings{"of the environment", "file", List{":443", ":80"}, 30 * time.Second, true, 0, 0, 0}},
		{[]string{"-listen=x", "-hosts", "a,b", "-hosts=c", "-drain", "1s", "-wait=false", "-port", "1", "-rate", "2", "-seed", "3"},
			settings{"x", "file", List{"a,b", "c"}, time.Second, false, 1, 2, 3}},
	} {
		f, got := flags()
		if err := f.Parse(tt.args, lookup); err != nil {
			t.Fatal(err)
		}
		if got.listen != tt.want.listen || got.self != tt.want.self || !slices.Equal(got.hosts, tt.want.hosts) ||
			got.drain != tt.want.drain || got.wait != tt.want.wait || got.port != tt.want.port || got.rate != tt.want.rate || got.seed != tt.want.seed {
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
		{"a port that is none", nil, map[string]string{"RELAYD_PORT": "tcp"}, "RELAYD_PORT"},
		{"an empty element", nil, map[string]string{"RELAYD_HOSTS": "a,,b"}, "RELAYD_HOSTS"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, _ := flags()
			err := f.Parse(tt.args, func(name string) (string, bool) { v, ok := tt.env[name]; return v, ok })
			if err == nil || errors.Is(err, flag.ErrHelp) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v", err)
			}
		})
	}
	f, _ := flags()
	if err := f.Parse([]string{"-h"}, func(string) (string, bool) { return "", false }); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-h: %v", err)
	}
}

// What the program says, and the status that it exits with.
func TestTell(t *testing.T) {
	f, _ := flags()
	for _, tt := range []struct {
		err            error
		status         int
		stdout, stderr string
	}{
		{flag.ErrHelp, 0, "Relayd is a relay.", ""},
		{errors.New("odd"), 2, "", "relayd: odd\n\"relayd -h\" lists the flags.\n"},
	} {
		var stdout, stderr strings.Builder
		status := f.Tell(tt.err, &stdout, &stderr)
		if status != tt.status || !strings.HasPrefix(stdout.String(), tt.stdout) || (stdout.Len() > 0) != (tt.stdout != "") || stderr.String() != tt.stderr {
			t.Errorf("%v: %d, %q, %q", tt.err, status, stdout.String(), stderr.String())
		}
	}
}

// asProgram in the environment has the tests' executable parse its own command line.
const asProgram = "RELAYD_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) == "" {
		os.Exit(m.Run())
	}
	f, s := flags()
	f.ParseOrExit()
	fmt.Println(s.listen)
}

// A program ends with what it was asked for, or does not understand.
func TestParseOrExit(t *testing.T) {
	for _, tt := range []struct {
		arg    string
		status int
		says   string
	}{
		{"-listen=x", 0, "x\n"},
		{"-h", 0, "Relayd is a relay."},
		{"-none", 2, "relayd: flag provided but not defined: -none\n"},
	} {
		cmd := exec.CommandContext(t.Context(), os.Args[0], tt.arg)
		cmd.Env = append(os.Environ(), asProgram+"=1")
		said, _ := cmd.CombinedOutput()
		if status := cmd.ProcessState.ExitCode(); status != tt.status || !strings.HasPrefix(string(said), tt.says) {
			t.Errorf("%s: status %d, %s", tt.arg, status, said)
		}
	}
}

func TestCAs(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for file, says := range map[string]string{empty: "no certificate", empty + ".none": "-ca: "} {
		if pool, err := CAs("ca", file); pool != nil || err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", file, err)
		}
	}
}

func TestHelp(t *testing.T) {
	const want = `Relayd is a relay.

Where:
  -listen address       address that services register at (default
                        127.0.0.1:8080)
  -hosts address        address for hosts, of which there may be many, and a
                        text that does not fit the line it is on
  -port int             its port

How:
  -tls-self file        file
  -drain long           how long (default 30s)
  -wait                 wait
  -rate float           a rate
  -seed uint            a seed

The environment can give each flag too, -listen as RELAYD_LISTEN.
Several values of -hosts have commas between them there.
`
	f, _ := flags()
	var b strings.Builder
	f.Help(&b)
	if b.String() != want {
		t.Errorf("%s", b.String())
	}
}

// The version is asked for on the command line alone: the images of containers have a
// variable of that name.
func TestVersionVariable(t *testing.T) {
	lookup := func(string) (string, bool) { return "1.2.3", true }
	for _, args := range [][]string{nil, {"-version"}} {
		f := New("relayd", "")
		f.Group("What it does")
		version := false
		f.BoolVar(&version, "version", false, "print the version")
		if err := f.Parse(args, lookup); err != nil || version != (len(args) > 0) {
			t.Errorf("%q: %v, %v", args, version, err)
		}
	}
}
