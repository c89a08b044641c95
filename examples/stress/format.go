package main

import "fmt"

// latency formats one in microseconds, of so many messages.
func latency(us float64, of int64) string {
	if of == 0 {
		return "-"
	}
	return duration(us)
}

// duration formats one in microseconds with three digits.
func duration(us float64) string {
	switch {
	case us < 999.5: // which is 1000 with three digits
		return digits(us) + " µs"
	case us < 999.5e3:
		return digits(us/1e3) + " ms"
	}
	return digits(us/1e6) + " s"
}

// amount formats a number of bytes, or of bytes a second, in powers of 1000.
func amount(bytes float64) string {
	switch {
	case bytes < 999.5:
		return digits(bytes) + " B"
	case bytes < 999.5e3:
		return digits(bytes/1e3) + " kB"
	case bytes < 999.5e6:
		return digits(bytes/1e6) + " MB"
	}
	return digits(bytes/1e9) + " GB"
}

// digits formats x with at least three digits, if it has as many.
func digits(x float64) string {
	switch {
	case x >= 99.95 || x == float64(int64(x)):
		return fmt.Sprintf("%.0f", x)
	case x >= 9.995:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

func plural(n int64, of string) string {
	if n == 1 {
		return "1 " + of
	}
	return fmt.Sprintf("%d %ss", n, of)
}
