package backoff

import (
	"context"
	"errors"
	"math"
	"testing"
	"testing/synctest"
	"time"
)

const ms = time.Millisecond

// The waits of the nth call lie in [Min/10, min(Max, Min*2^n)], and use all of it.
func TestNext(t *testing.T) {
	for n, ceiling := range []time.Duration{100 * ms, 200 * ms, 400 * ms, 800 * ms, time.Second, time.Second} {
		var low, high bool
		floored := 0
		for range 1000 {
			b := Backoff{Min: 100 * ms, Max: time.Second}
			for range n {
				b.Next()
			}
			d := b.Next()
			if d < 10*ms || d > ceiling {
				t.Fatalf("call %d: %v, not within %v and %v", n, d, 10*ms, ceiling)
			}
			low = low || d < ceiling/4
			high = high || d > ceiling*3/4
			if d == 10*ms {
				floored++
			}
		}
		if !low || !high || n == 0 && floored == 0 || floored > 300 {
			t.Errorf("call %d: of 1000 draws, low %v, high %v, %d at the floor", n, low, high, floored)
		}
	}
}

func TestReset(t *testing.T) {
	b := Backoff{Min: ms, Max: time.Hour}
	for range 100 {
		for range 30 {
			b.Next()
		}
		b.Reset()
		if d := b.Next(); d > ms {
			t.Fatalf("first after a reset: %v", d)
		}
	}
}

func TestExtremes(t *testing.T) {
	for _, b := range []Backoff{
		{},
		{Min: -5, Max: -3},
		{Min: 1, Max: math.MaxInt64},
		{Min: math.MaxInt64, Max: math.MaxInt64},
		{Min: math.MaxInt64 / 2, Max: math.MaxInt64},
		{Min: math.MinInt64, Max: math.MaxInt64},
		{Min: time.Hour, Max: time.Second},
	} {
		for range 200 {
			if d := b.Next(); d < max(b.Min, 0)/10 || d > max(b.Min, b.Max, 1) {
				t.Fatalf("%+v: %v", b, d)
			}
		}
	}
	b := Backoff{Min: 1, Max: math.MaxInt64}
	var most time.Duration
	for range 1000 {
		most = max(most, b.Next())
	}
	if most < math.MaxInt64/2 {
		t.Errorf("the longest of many waits: %v", most)
	}
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := Backoff{Min: time.Minute, Max: time.Hour}
		start := time.Now()
		if err := b.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d < 6*time.Second || d > time.Minute {
			t.Errorf("the first wait took %v", d)
		}
		if b.ceiling != time.Minute {
			t.Errorf("ceiling %v", b.ceiling)
		}
	})
}

func TestWaitCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(5*time.Second, func() { cancel(cause) })
		b := Backoff{Min: time.Minute, Max: time.Minute} // at least 6 s
		start := time.Now()
		if err := b.Wait(ctx); err != cause || time.Since(start) != 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		b.Reset()
		if err := b.Wait(ctx); err != cause || b.ceiling != 0 {
			t.Errorf("with a context that has ended: %v, and ceiling %v", err, b.ceiling)
		}
	})
}
