package mux

import (
	"sync/atomic"
	"time"
)

// A stamp holds when something happened last. It counts from a time of its own, so
// that the setting of a clock does not move it.
type stamp struct {
	began time.Time // set before it is used, and then left alone
	last  atomic.Int64
}

func (s *stamp) start() { s.began = time.Now() }

func (s *stamp) now() { s.last.Store(int64(time.Since(s.began))) }

func (s *stamp) time() time.Time { return s.began.Add(time.Duration(s.last.Load())) }
