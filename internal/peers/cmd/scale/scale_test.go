package main

import (
	"os"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/peers/parts"
)

// TestMain has the test binary be the parts of chains too.
func TestMain(m *testing.M) {
	parts.Main(nil)
	os.Exit(m.Run())
}

// Both tables can be made. What is in them then is no figure.
func TestScale(t *testing.T) {
	if err := run(t.Context(), 1, 20*time.Millisecond, "5,20", "1,3"); err != nil {
		t.Error(err)
	}
}

func TestParse(t *testing.T) {
	for _, list := range []string{"", "1,", "x", "0", "-1", "1 2"} {
		if n, err := parse(list); err == nil {
			t.Errorf("%q: %v", list, n)
		}
	}
}
