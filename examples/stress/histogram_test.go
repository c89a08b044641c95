package main

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestBuckets(t *testing.T) {
	if n := bucket(math.MaxInt64); n != buckets-1 {
		t.Errorf("the last bucket is %d of %d", n, buckets)
	}
	for i := range buckets {
		d := middle(i)
		if bucket(d) != i {
			t.Fatalf("the middle of bucket %d, %d, is in bucket %d", i, d, bucket(d))
		}
		// The first value of the next bucket follows the last of this one.
		next := d
		for step := time.Duration(1) << 62; step > 0; step /= 2 {
			if next+step > 0 && bucket(next+step) == i {
				next += step
			}
		}
		if i < buckets-1 && bucket(next+1) != i+1 {
			t.Fatalf("after %d, the last of bucket %d, comes bucket %d", next, i, bucket(next+1))
		}
		if off := float64(next-d) / float64(next); next > 0 && off > 0.005 {
			t.Fatalf("bucket %d ends at %d, %.4f off its middle", i, next, off)
		}
	}
}

// TestQuantiles compares quantiles to those of the sorted values.
func TestQuantiles(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, of := range []struct {
		name  string
		value func() float64
	}{
		{"constant", func() float64 { return 123_456_789 }},
		{"small", func() float64 { return float64(random.IntN(300)) }},
		{"uniform", func() float64 { return random.Float64() * 1e9 }},
		{"exponential", func() float64 { return random.ExpFloat64() * 1e6 }},
		{"log-uniform", func() float64 { return math.Exp(random.Float64() * 43) }},
		{"two peaks", func() float64 {
			if random.IntN(100) == 0 {
				return 5e9 + random.NormFloat64()*1e8
			}
			return 2e5 + random.NormFloat64()*1e4
		}},
	} {
		name, value := of.name, of.value
		for _, n := range []int{1, 2, 10, 999, 20_000} {
			var h, odd, even histogram
			values := make([]time.Duration, n)
			var sum float64
			for i := range values {
				values[i] = time.Duration(value())
				sum += float64(values[i])
				h.add(values[i])
				if i%2 == 0 {
					even.add(values[i])
				} else {
					odd.add(values[i])
				}
			}
			odd.merge(&even)
			odd.merge(new(histogram))
			odd.sum = h.sum // which may be added up otherwise
			if odd != h {
				t.Errorf("%s, %d: two histograms merged are not that of all", name, n)
			}
			slices.Sort(values)
			if h.count != int64(n) || h.min != values[0] || h.max != values[n-1] {
				t.Errorf("%s, %d: count %d, from %d to %d, not from %d to %d", name, n, h.count, h.min, h.max, values[0], values[n-1])
			}
			if mean := sum / float64(n); math.Abs(float64(h.mean())-mean) > 1+mean*1e-9 {
				t.Errorf("%s, %d: mean %d, not %.1f", name, n, h.mean(), mean)
			}
			before := time.Duration(0)
			for _, parts := range []int{0, 10, 1000, 2500, 5000, 7500, 9000, 9900, 9990, 9999, 10_000} {
				upTo := 1 // how many values it takes to be so many parts
				for upTo*10_000 < parts*n {
					upTo++
				}
				exact := values[upTo-1]
				got := h.quantile(uint64(parts), 10_000)
				if math.Abs(float64(got-exact)) > 0.005*float64(exact) {
					t.Errorf("%s, %d: the quantile %d is %d, not %d", name, n, parts, got, exact)
				}
				if got < before {
					t.Errorf("%s, %d: the quantile %d is %d, after %d", name, n, parts, got, before)
				}
				before = got
			}
		}
	}
}

func TestNothingCounted(t *testing.T) {
	var h histogram
	if h.quantile(1, 2) != 0 || h.mean() != 0 || len(curve(&h)) != 0 {
		t.Errorf("p50 %d, mean %d, curve %v", h.quantile(1, 2), h.mean(), curve(&h))
	}
	h.add(-time.Second)
	if h.count != 1 || h.min != 0 || h.max != 0 {
		t.Errorf("of a negative duration: count %d, from %d to %d", h.count, h.min, h.max)
	}
}

// TestCurve has a curve rise to the largest value, with the percentiles where they belong.
func TestCurve(t *testing.T) {
	var h histogram
	for i := range 100_000 {
		h.add(time.Duration(i+1) * time.Microsecond)
	}
	points := curve(&h)
	at := make(map[float64]float64)
	for i, p := range points {
		if i > 0 && (p.Percent <= points[i-1].Percent || p.Latency < points[i-1].Latency) {
			t.Errorf("%v after %v", p, points[i-1])
		}
		at[p.Percent] = p.Latency
	}
	for percent, want := range map[float64]float64{50: 50e3, 90: 90e3, 99: 99e3, 99.9: 99.9e3, 99.99: 99.99e3, 100: 100e3} {
		if math.Abs(at[percent]-want) > 0.005*want {
			t.Errorf("%v %% is at %v, not %v", percent, at[percent], want)
		}
	}
}

// TestCurveOfFew has each of ten values at the percentage that it makes whole.
func TestCurveOfFew(t *testing.T) {
	var h histogram
	for i := range 10 {
		h.add(time.Duration(i+1) * time.Microsecond)
	}
	want := []point{{0, 1}, {10, 1}, {20, 2}, {30, 3}, {40, 4}, {50, 5}, {60, 6}, {70, 7}, {80, 8}, {100, 10}}
	got := curve(&h)
	for i := range got {
		got[i].Latency = math.Round(got[i].Latency)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%v, not %v", got, want)
	}
}

func BenchmarkRecord(b *testing.B) {
	s := new(shard)
	b.ReportAllocs()
	for b.Loop() {
		s.record(time.Millisecond)
	}
}

func BenchmarkPayload(b *testing.B) {
	buf := make([]byte, 64<<10)
	p := newPayload(1, 2, 3)
	p.read(buf)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		p := newPayload(1, 2, 3)
		if err := p.check(buf); err != nil {
			b.Fatal(err)
		}
	}
}
