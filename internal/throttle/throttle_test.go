package throttle

import (
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const second = time.Second

func TestBucket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(1000) // holds 4096
		for i, step := range []struct {
			sleep time.Duration
			take  int
			wait  time.Duration
		}{
			{0, 4000, 0},
			{0, 96, 0},
			{0, 0, 0},
			{0, 1000, second},
			{0, 500, 1500 * time.Millisecond}, // behind the one before
			{0, 0, 1500 * time.Millisecond},
			{second, 0, 500 * time.Millisecond},
			{second, 500, 0},
			{0, 250, 250 * time.Millisecond},
			{0, -250, 0}, // given back
			{0, 250, 250 * time.Millisecond},
			{time.Hour, 4096, 0}, // no more than it holds
			{0, 1, time.Millisecond},
			{time.Hour, -4096, 0}, // nor by giving back
			{0, 4097, time.Millisecond},
		} {
			time.Sleep(step.sleep)
			if wait := b.Take(step.take); wait != step.wait {
				t.Errorf("step %d, %+v: %v", i, step, wait)
			}
		}
	})
}

func TestNoLimit(t *testing.T) {
	for _, rate := range []int64{0, -1, math.MinInt64} {
		if b := New(rate); b != nil {
			t.Errorf("New(%d) limits", rate)
		}
	}
	if wait := New(0).Take(math.MaxInt); wait != 0 {
		t.Errorf("nil: %v", wait)
	}
}

func TestExtremes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, rate := range []int64{1, 3, 1 << 20, math.MaxInt64} {
			b := New(rate)
			if burst := max(rate/4, 4096); int64(b.burst) < burst || b.piece() < 1 || int64(b.piece()) > burst/8 {
				t.Errorf("rate %d: holds %v, and %d move at once", rate, b.burst, b.piece())
			}
			b.Take(math.MaxInt)
			b.Take(math.MaxInt)
			wait := b.Take(math.MaxInt)
			deep := 3*float64(math.MaxInt) > 2*b.burst // where an int has 64 bits, always
			if deep && wait < second/2 || time.Now().Add(wait).Before(time.Now()) {
				t.Errorf("rate %d: deep in debt, and waits %v", rate, wait)
			}
			b.Take(math.MinInt)
			b.Take(math.MinInt)
			b.Take(math.MinInt)
			if wait := b.Take(0); wait != 0 {
				t.Errorf("rate %d: out of debt, and waits %v", rate, wait)
			}
		}
	})
}

// However many take how much at a time, no more than the rate passes, and no less.
func TestRate(t *testing.T) {
	for _, rate := range []int64{999, 1 << 20, 123456789} {
		for _, takers := range []int{1, 7} {
			synctest.Test(t, func(t *testing.T) {
				b := New(rate)
				end := time.Now().Add(100 * second)
				var mu sync.Mutex
				var passed int64
				var wg sync.WaitGroup
				n := b.piece()
				for range takers {
					wg.Go(func() {
						for {
							time.Sleep(b.Take(n))
							if time.Now().After(end) {
								return
							}
							mu.Lock()
							passed += int64(n)
							mu.Unlock()
						}
					})
				}
				wg.Wait()
				most := 100*rate + int64(b.burst)
				if passed > most || passed < most-int64(n*(takers+1)) {
					t.Errorf("rate %d, %d takers: %d passed in 100 s", rate, takers, passed)
				}
			})
		}
	}
}
