package mux

import "time"

// A crowd is messages and bulk that leave by one transport. A message overtakes the bulk
// that waits in the writer's queue, but not what the system has taken, which on a fast
// transport is megabytes. So in a crowd the system gets little at a time. That costs bulk
// some of its rate, as the flusher has to be woken more often, and is not done without
// messages. The writer's lock guards it.
type crowd struct {
	here bool

	// Since it was looked at last.
	messages int
	bulk     bool
	since    time.Time
}

const (
	// crowdUnsent is what the system holds in a crowd of what it cannot send yet.
	crowdUnsent = 128 << 10
	// crowdTurn is how often it is looked at, and leastMessages how many in that time
	// there have to be.
	crowdTurn     = 100 * time.Millisecond
	leastMessages = 8
)

// small notes a small frame of data. Behind a large one it may be the end of what was
// read at once, and is no message.
func (c *crowd) small(st *Stream) {
	if !st.bulky {
		c.messages++
	}
	st.bulky = false
}

// large notes a large frame.
func (c *crowd) large(st *Stream) { c.bulk, st.bulky = true, true }

// look reports whether the crowd has come or gone.
func (c *crowd) look(now time.Time) (changed bool) {
	turns := float64(now.Sub(c.since)) / float64(crowdTurn)
	if turns < 1 {
		return false
	}
	here := c.bulk && float64(c.messages) >= leastMessages*turns
	changed = here != c.here
	*c = crowd{here: here, since: now}
	return changed
}
