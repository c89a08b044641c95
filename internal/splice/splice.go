// Package splice moves bytes between sockets through pipes, so that they do not pass
// through this process's memory. Where the system cannot, or has no files left for it,
// there are no pipes, and who wants one copies.
package splice

// Least is how much there has to be for a pipe to be worth its system calls: a read and
// a write are cheaper for less.
const Least = 8 << 10
