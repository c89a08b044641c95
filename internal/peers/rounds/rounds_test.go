package rounds

import "testing"

func TestRatio(t *testing.T) {
	// The median of the ratios, not the ratio of the medians; and the round that failed
	// shifts no other.
	if r, ok := Ratio([]float64{1, 0, 9, 4}, []float64{2, 7, 3, 4}); !ok || r != 1 {
		t.Errorf("ratio %v, %v, want 1", r, ok)
	}
	if r, ok := Ratio([]float64{0, 1}, []float64{1}); ok {
		t.Errorf("ratio %v of nothing", r)
	}
	if m := Median([]float64{5, 1, 2, 4}); m != 3 {
		t.Errorf("median %v, want 3", m)
	}
}
