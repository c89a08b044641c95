// Package localdial helps to dial within the machine. It stands apart because the relay,
// which dials nobody, must not use it.
package localdial
