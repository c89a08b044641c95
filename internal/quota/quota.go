// Package quota counts who holds how many of something.
package quota

import "sync"

// A Book counts what each key holds. It keeps nothing about a key that holds nothing.
// The zero Book is ready, and may be used from any goroutine.
type Book[K comparable] struct {
	mu    sync.Mutex
	held  map[K]int
	total int
}

// Take lets k have one more, unless it holds max already. If max is 0 or less there is
// no limit. What was taken is given back with Give.
func (b *Book[K]) Take(k K, max int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if max > 0 && b.held[k] >= max {
		return false
	}
	if b.held == nil {
		b.held = make(map[K]int)
	}
	b.held[k]++
	b.total++
	return true
}

// Give takes one back from k. If k holds none it does nothing: a count is never below 0.
func (b *Book[K]) Give(k K) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch b.held[k] {
	case 0:
		return
	case 1:
		delete(b.held, k)
	default:
		b.held[k]--
	}
	b.total--
}

// Held returns how many k holds.
func (b *Book[K]) Held(k K) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.held[k]
}

// Total returns how many all keys hold together.
func (b *Book[K]) Total() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.total
}
