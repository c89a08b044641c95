package main

import (
	"math/bits"
	"time"
)

// Values are sorted into buckets of 1/128 of their size at most, so that what is said of
// a value is off by half a percent at most: below 256 each value has a bucket, and from
// there on each power of two has 128.
const (
	subBits = 7
	buckets = (63 - subBits + 1) << subBits // for all that an int64 holds
)

// A histogram counts durations. Its size is fixed, whatever is counted; the zero value is
// an empty one. It is not for use by several goroutines at once.
type histogram struct {
	counts   [buckets]int64
	count    int64
	sum      float64 // of nanoseconds; as a float it does not overflow
	min, max time.Duration
}

// add counts d, and what is negative as 0.
func (h *histogram) add(d time.Duration) {
	d = max(d, 0)
	if h.count == 0 || d < h.min {
		h.min = d
	}
	h.max = max(h.max, d)
	h.counts[bucket(d)]++
	h.count++
	h.sum += float64(d)
}

// merge adds what other has counted.
func (h *histogram) merge(other *histogram) {
	if other.count == 0 {
		return
	}
	if h.count == 0 || other.min < h.min {
		h.min = other.min
	}
	h.max = max(h.max, other.max)
	h.count += other.count
	h.sum += other.sum
	for i, n := range other.counts {
		h.counts[i] += n
	}
}

// mean returns the mean, 0 if nothing was counted.
func (h *histogram) mean() time.Duration {
	if h.count == 0 {
		return 0
	}
	return time.Duration(h.sum / float64(h.count))
}

// quantile returns a duration that so many parts of all do not exceed, 99 of 100 for
// instance, 0 if nothing was counted. The smallest and largest are exact.
func (h *histogram) quantile(parts, of uint64) time.Duration {
	high, low := bits.Mul64(parts, uint64(h.count))
	quotient, rest := bits.Div64(high, low, of)
	rank := int64(quotient)
	if rest > 0 {
		rank++
	}
	if rank <= 1 {
		return h.min
	}
	if rank >= h.count {
		return h.max
	}
	var seen int64
	for i, n := range h.counts {
		if seen += n; seen >= rank {
			return min(max(middle(i), h.min), h.max)
		}
	}
	return h.max
}

// bucket returns the index of the bucket of d, which is not negative.
func bucket(d time.Duration) int {
	shift := max(bits.Len64(uint64(d))-subBits-1, 0)
	return shift<<subBits + int(d>>shift)
}

// middle returns the duration in the middle of a bucket.
func middle(i int) time.Duration {
	shift := max(i>>subBits-1, 0)
	low := time.Duration(i-shift<<subBits) << shift
	return low + (1<<shift-1)/2
}
