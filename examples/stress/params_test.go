package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestUsage(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, of := range []struct {
		args string
		want string // in what it says
	}{
		{"", "-to is missing"},
		{"-to :1 -tls", "no host"},
		{"-to localhost", `-to "localhost" is not host:port`},
		{"-to localhost:", `-to "localhost:" is not host:port`},
		{"-to :1 more", `unexpected argument "more"`},
		{"-to :1 -none", "-none"},
		{"-to :1 -mode fast", `-mode "fast"`},
		{"-to :1 -clients 0", "-clients 0"},
		{"-to :1 -clients 1000001", "-clients 1000001"},
		{"-to :1 -clients many", `"many"`},
		{"-to :1 -size 0", "-size 0"},
		{"-to :1 -size 2000000000", "-size 2000000000"},
		{"-to :1 -mode bulk -inflight 0", "-inflight 0"},
		{"-to :1 -mode bulk -inflight 65537", "-inflight 65537"},
		{"-to :1 -inflight 2", "-inflight is of -mode bulk"},
		{"-to :1 -rate -1", "-rate -1"},
		{"-to :1 -rate NaN", "-rate NaN"},
		{"-to :1 -rate 1e-9", "-rate 1e-09"},
		{"-to :1 -rate 1e9", "-rate 1e+09"},
		{"-to :1 -time 0s", "-time 0s"},
		{"-to :1 -timeout -1s", "-timeout -1s"},
		{"-to :1 -ramp -1s", "-ramp -1s"},
		{"-to :1 -time 5s -ramp 5s", "-ramp 5s"},
		{"-to :1 -seed -1", "-seed"},
		{"-to :1 -svg -", "-svg takes a file"},
		{"-to :1 -svg a -json ./a", "the same file"},
		{"-to a:1 -ca " + empty, "no certificate"},
		{"-to a:1 -ca " + empty + ".none", "-ca"},
		{"-to :1 -insecure -ca " + empty, "exclude each other"},
	} {
		var stdout, stderr strings.Builder
		status := command(t.Context(), strings.Fields(of.args), nothing, &stdout, &stderr, false)
		if said := stderr.String(); status != 2 || !strings.Contains(said, of.want) || !strings.Contains(said, "\"stress -h\"") || stdout.Len() > 0 {
			t.Errorf("%s: status %d, %s%s", of.args, status, stdout.String(), said)
		}
	}
}

func TestHelp(t *testing.T) {
	var stdout, stderr strings.Builder
	if status := command(t.Context(), []string{"-h"}, nothing, &stdout, &stderr, false); status != 0 || !strings.Contains(stdout.String(), "-clients number") || stderr.Len() > 0 {
		t.Errorf("status %d, %s%s", status, stdout.String(), stderr.String())
	}
	stdout.Reset()
	if status := command(t.Context(), []string{"-version"}, nothing, &stdout, &stderr, false); status != 0 || !strings.HasPrefix(stdout.String(), "stress ") || stderr.Len() > 0 {
		t.Errorf("status %d, %s%s", status, stdout.String(), stderr.String())
	}
}

// nothing is an environment.
func nothing(string) (string, bool) { return "", false }

func TestEnvironment(t *testing.T) {
	env := map[string]string{"STRESS_TO": "localhost:1", "STRESS_MODE": "bulk", "STRESS_SIZE": "5", "STRESS_SEED": "7", "STRESS_INFLIGHT": "3"}
	p, _, err := parse(nil, func(name string) (string, bool) { v, ok := env[name]; return v, ok })
	if err != nil || p.to != "localhost:1" || p.mode != bulk || p.size != 5 || p.seed != 7 || p.inflight != 3 {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestDefaults(t *testing.T) {
	for _, of := range []struct {
		mode mode
		want parameters
	}{
		{roundTrips, parameters{Size: 1024}},
		{connections, parameters{Size: 1024}},
		{bulk, parameters{Size: 65536, Inflight: 16}},
	} {
		p, _, err := parse([]string{"-to", "localhost:1", "-mode", string(of.mode)}, nothing)
		if err != nil {
			t.Fatal(err)
		}
		want := of.want
		want.To, want.Mode, want.Clients, want.Time, want.Timeout = "localhost:1", of.mode, 100, 10, 10
		got := p.parameters()
		got.Seed = 0 // random
		if got != want {
			t.Errorf("%+v, not %+v", got, want)
		}
	}
}

// paramsFor returns those of a run of one client against addr that ends when its test
// wants it to.
func paramsFor(addr string, mode mode) *params {
	p := &params{to: addr, mode: mode, clients: 1, size: 3000, inflight: 4, time: time.Hour, timeout: patience, pause: time.Millisecond, seed: 1}
	p.dial = dialer(addr, p.timeout, nil)
	return p
}
