package quota

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
)

func TestBook(t *testing.T) {
	var b Book[string]
	b.Give("a") // holds none
	for _, step := range []struct {
		key   string
		max   int // -2: a Give
		ok    bool
		held  int
		total int
	}{
		{"a", 2, true, 1, 1},
		{"a", 2, true, 2, 2},
		{"a", 2, false, 2, 2},
		{"b", 2, true, 1, 3},
		{"a", 0, true, 3, 4},
		{"a", -1, true, 4, 5},
		{"a", 4, false, 4, 5},
		{"a", 5, true, 5, 6},
		{"b", -2, false, 0, 5},
		{"b", -2, false, 0, 5},
		{"a", -2, false, 4, 4},
		{"b", 1, true, 1, 5},
	} {
		if step.max == -2 {
			b.Give(step.key)
		} else if ok := b.Take(step.key, step.max); ok != step.ok {
			t.Errorf("%+v: %v", step, ok)
		}
		if held, total := b.Held(step.key), b.Total(); held != step.held || total != step.total {
			t.Errorf("%+v: holds %d of %d", step, held, total)
		}
	}
}

// What was given back leaves nothing behind.
func TestVanish(t *testing.T) {
	var b Book[netip.Addr]
	addr := netip.MustParseAddr("2001:db8::1")
	for range 1000 {
		addr = addr.Next()
		b.Take(addr, 1)
		b.Give(addr)
		b.Give(addr)
	}
	if len(b.held) != 0 || b.Total() != 0 {
		t.Errorf("%d entries, %d in all", len(b.held), b.Total())
	}
}

func TestConcurrent(t *testing.T) {
	const max = 3
	var b Book[int]
	var holders atomic.Int64
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			for range 1000 {
				if !b.Take(1, max) {
					continue
				}
				if n := holders.Add(1); n > max {
					t.Errorf("%d holders", n)
				}
				holders.Add(-1)
				b.Give(1)
			}
		})
	}
	wg.Wait()
	if b.Held(1) != 0 || b.Total() != 0 || len(b.held) != 0 {
		t.Errorf("%d of %d left", b.Held(1), b.Total())
	}
}
