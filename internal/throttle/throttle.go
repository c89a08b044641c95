// Package throttle limits the bytes per second of connections.
package throttle

import (
	"math"
	"sync"
	"time"
)

const (
	// A bucket holds what comes in a quarter of a second: enough for a timer that
	// fires late to cost no throughput, and little against what a second carries.
	burstsPerSecond = 4
	// It never holds less than a few small packets.
	minBurst = 4 << 10
	// What moves at once is at most an eighth of a burst, so that those who share a
	// bucket take turns many times a second.
	piecesPerBurst = 8
)

// A Bucket fills with tokens, one for each byte that may pass. It can be in debt: a
// Take is never refused, and whoever comes next waits until its own is paid as well,
// so those who share a Bucket are served in the order they come. It may be used from
// any goroutine. A nil Bucket never limits.
type Bucket struct {
	rate  float64 // tokens in a second
	burst float64 // tokens that it can hold

	mu     sync.Mutex
	tokens float64
	at     time.Time // when tokens was right
}

// New returns a full Bucket for so many bytes per second. For 0 or less it returns nil.
//
// It can hold what comes in a quarter of a second, and at least 4 KiB.
func New(bytesPerSecond int64) *Bucket {
	if bytesPerSecond <= 0 {
		return nil
	}
	burst := float64(max(bytesPerSecond/burstsPerSecond, minBurst))
	return &Bucket{rate: float64(bytesPerSecond), burst: burst, tokens: burst, at: time.Now()}
}

// Take takes n tokens at once, and returns how long the caller must wait before the
// bytes may pass. If n is negative, it gives back what was taken and not used.
func (b *Bucket) Take(n int) time.Duration {
	if b == nil {
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	b.tokens = min(b.burst, b.tokens+now.Sub(b.at).Seconds()*b.rate) - float64(n)
	b.at = now
	if b.tokens >= 0 {
		return 0
	}
	const longest = 1 << 62 // what a Duration can hold, and some to add to
	return time.Duration(min(math.Ceil(-b.tokens/b.rate*1e9), longest))
}

// piece returns how much may move at once.
func (b *Bucket) piece() int {
	return int(min(b.burst/piecesPerBurst, math.MaxInt32))
}
