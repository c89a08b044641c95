package main

import (
	"strings"
	"testing"
)

func parsed(args ...string) (targets, error) {
	var c config
	if err := c.flags().Parse(args, nothing); err != nil {
		return nil, err
	}
	return c.services()
}

// nothing is an environment.
func nothing(string) (string, bool) { return "", false }

func TestTargets(t *testing.T) {
	tcp := func(addr string) target { return target{text: addr, network: "tcp", address: addr} }
	for _, tt := range []struct {
		args string
		want targets
	}{
		{"-to 3000", targets{tcp("localhost:3000")}},
		{"-to :3000", targets{tcp(":3000")}},
		{"-to [2001:db8::1]:22", targets{tcp("[2001:db8::1]:22")}},
		{"-to [fe80::1%eth0]:22", targets{tcp("[fe80::1%eth0]:22")}},
		{"-to localhost:http", targets{tcp("localhost:http")}},
		{"-to unix:/run/a=b:c.sock", targets{{text: "unix:/run/a=b:c.sock", network: "unix", address: "/run/a=b:c.sock"}}},
		{"-to a:1,port=8081,name=web,proxy-protocol=v2", targets{{"a:1", "tcp", "a:1", 8081, "web", "", proxyV2}}},
		{"-to a:1,name=x=y", targets{{"a:1", "tcp", "a:1", 0, "x=y", "", proxyUnset}}},
		{"-to a:1 -port 8081 -name web", targets{{"a:1", "tcp", "a:1", 8081, "web", "", proxyUnset}}},
		{"-to a:1 -hostname *.example.com", targets{{"a:1", "tcp", "a:1", 0, "", "*.example.com", proxyUnset}}},
		{"-port 1 -to a:1,hostname=h", targets{{"a:1", "tcp", "a:1", 0, "", "h", proxyUnset}}},
		{"-hostname h -to a:1 -to b:1,port=1", targets{{"a:1", "tcp", "a:1", 0, "", "h", proxyUnset}, {"b:1", "tcp", "b:1", 1, "", "", proxyUnset}}},
		{"-proxy-protocol v1 -to a:1 -to b:1,proxy-protocol=v2 -to c:1,proxy-protocol=off",
			targets{{"a:1", "tcp", "a:1", 0, "", "", proxyV1}, {"b:1", "tcp", "b:1", 0, "", "", proxyV2}, {"c:1", "tcp", "c:1", 0, "", "", proxyOff}}},
		{"-name web -shared -port 1 -to a:1 -to b:1", targets{{"a:1", "tcp", "a:1", 1, "web", "", proxyUnset}, {"b:1", "tcp", "b:1", 1, "web", "", proxyUnset}}},
		{"-name web -shared -to a:1 -to b:1,port=1 -to c:1,name=api", targets{{"a:1", "tcp", "a:1", 1, "web", "", proxyUnset}, {"b:1", "tcp", "b:1", 1, "web", "", proxyUnset}, {"c:1", "tcp", "c:1", 0, "api", "", proxyUnset}}},
		{"-shared -to a:1,hostname=h -to b:1,hostname=h", targets{{"a:1", "tcp", "a:1", 0, "", "h", proxyUnset}, {"b:1", "tcp", "b:1", 0, "", "h", proxyUnset}}},
		{"-to a:1 -to a:1", targets{tcp("a:1"), tcp("a:1")}},
	} {
		got, err := parsed(strings.Fields(tt.args)...)
		if err != nil || len(got) != len(tt.want) {
			t.Errorf("%s: %+v, %v", tt.args, got, err)
			continue
		}
		for i := range got {
			if got[i] != tt.want[i] {
				t.Errorf("%s: %+v, want %+v", tt.args, got[i], tt.want[i])
			}
		}
	}
	// A path may have spaces in it, on the command line.
	if got, err := parsed("-to", "unix:/my socket,port=1"); err != nil || len(got) != 1 || got[0].address != "/my socket" || got[0].port != 1 {
		t.Errorf("with a space in it: %+v, %v", got, err)
	}
}

func TestTargetsOfEnvironment(t *testing.T) {
	for value, want := range map[string]string{
		" a:1,port=1  unix:/x\n": "a:1 unix:/x",
		"":                       "-to is missing",
		" ":                      "FORWARD_TO: empty",
		"a:1 b":                  "FORWARD_TO",
	} {
		var c config
		err := c.flags().Parse(nil, func(name string) (string, bool) { return value, name == "FORWARD_TO" })
		if err == nil {
			_, err = c.services()
		}
		if err == nil && c.to.String() != want || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %s, %v, want %q", value, c.to.String(), err, want)
		}
	}
}

func TestTargetsRefused(t *testing.T) {
	for _, tt := range []struct{ args, says string }{
		{"-to localhost", "neither"},
		{"-to 0", "neither"},
		{"-to 65536", "neither"},
		{"-to -1", "neither"},
		{"-to a:0", "no port"},
		{"-to a:", "no port"},
		{"-to a:65536", "no port"},
		{"-to ::1", "brackets"},
		{"-to 2001:db8::1:22", "brackets"},
		{"-to http://localhost:3000", "host:port"},
		{"-to unix:", "path"},
		{"-to port=8081,localhost:3000", "comes first"},
		{"-to web=localhost:3000", "comes first"},
		{"-to a:1,", "no option"},
		{"-to a:1,b:2", "no option"},
		{"-to a:1,Port=1", "no option"},
		{"-to a:1,port", "empty"},
		{"-to a:1,port=", "empty"},
		{"-to a:1,port=0", "not a port"},
		{"-to a:1,port=65536", "not a port"},
		{"-to a:1,port=1,port=2", "twice"},
		{"-to a:1,port=1,hostname=h", "exclude"},
		{"-to a:1,proxy-protocol=v3", "v3"},
		{"-proxy-protocol 1", "-proxy-protocol"},
		{"", "-to is missing"},
		{"-to a:1 -port 1 -hostname h", "exclude"},
		{"-to a:1 -pin nonsense", "-pin: "},
		{"-to a:1 -relay host", "-relay"},
		{"-to a:1 -relay host:", "-relay"},
		{"-to a:1 -name " + strings.Repeat("x", 256), "a:1: relay: WithName"},
		{"-to a:1,hostname=-", "a:1: relay: WithHostname"},
		{"-to a:1 -dedicated -7", "-dedicated -7"},
		{"-port 65536", "-port"},
		{"-port -1", "-port"},
		{"-drain -1s", "-drain"},
		{"-ca f -pin x", "exclude"},
		{"-port 1 -to a:1 -to b:1", "a:1 and b:1 both ask for the port 1"},
		{"-to a:1,port=1 -to b:1,port=1", "port 1"},
		{"-name web -to a:1 -to b:1", "name web: only with -shared"},
		{"-hostname h -to a:1 -to b:1", "hostname h: only with -shared"},
		{"-shared -to a:1", "needs a name"},
		{"-shared -to a:1,name=web -to b:1", "b:1: -shared needs a name"},
		{"-shared -name web -to a:1,port=1 -to b:1,port=2", "same name and address"},
		{"-shared -to a:1,name=x,port=1 -to b:1,name=y,port=1", "same name and address"},
		{"-shared -to a:1,name=x,hostname=h -to b:1,name=x,hostname=i", "same name and address"},
	} {
		if got, err := parsed(strings.Fields(tt.args)...); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %+v, %v, want %q", tt.args, got, err, tt.says)
		}
	}
}
