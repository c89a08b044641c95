// Package rounds has the arithmetic of comparisons that are measured in rounds.
package rounds

import "slices"

// Median returns the middle of values, of which there must be one.
func Median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	mid := len(values) / 2
	if len(values)%2 == 1 {
		return values[mid]
	}
	return (values[mid-1] + values[mid]) / 2
}

// Ratio returns the median of the rounds' ratios of a to b: the load of the machine
// changes less within a round than between them. A round in which either is 0, because
// it failed, does not count; ok says whether any is left.
func Ratio(a, b []float64) (ratio float64, ok bool) {
	var ratios []float64
	for i := range min(len(a), len(b)) {
		if a[i] > 0 && b[i] > 0 {
			ratios = append(ratios, a[i]/b[i])
		}
	}
	if len(ratios) == 0 {
		return 0, false
	}
	return Median(ratios), true
}
