// Package nofile tells how many files this process may have open. A socket is a file.
package nofile
