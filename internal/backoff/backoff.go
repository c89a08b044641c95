// Package backoff says how long to wait before trying again.
package backoff

import (
	"context"
	"math/rand/v2"
	"time"
)

// A Backoff gives rising waits with full jitter: each is drawn evenly from what lies
// between 0 and a ceiling, which starts at Min and doubles with each wait up to Max,
// so that those who failed together do not come back together. No wait is less than
// a tenth of Min, to spare a peer that keeps failing.
//
// A Min of zero or less counts as a nanosecond, and a Max below Min as Min. A Backoff is
// for one goroutine.
type Backoff struct {
	Min, Max time.Duration

	ceiling time.Duration // of the last wait; 0: there was none
}

// Next returns the next wait.
func (b *Backoff) Next() time.Duration {
	least := max(b.Min, 1)
	most := max(b.Max, least)
	switch {
	case b.ceiling == 0:
		b.ceiling = least
	case b.ceiling > most/2:
		b.ceiling = most
	default:
		b.ceiling *= 2
	}
	return max(rand.N(b.ceiling), least/10)
}

// Reset starts again at Min, for when a try succeeded.
func (b *Backoff) Reset() { b.ceiling = 0 }

// Wait sleeps for what Next returns. If ctx ends before, it returns the cause at once.
func (b *Backoff) Wait(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	timer := time.NewTimer(b.Next())
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
