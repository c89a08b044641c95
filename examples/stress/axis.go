package main

import (
	"fmt"
	"math"
	"time"
)

// An axis places values on a line of the given length, and labels some of them.
type axis struct {
	place func(v float64) float64 // 0 to 1 along the line
	ticks []tick
}

type tick struct {
	at    float64 // a value
	label string
}

// linearAxis is an axis from 0 to a round number not less than top, with some five ticks.
func linearAxis(top float64, label func(float64) string) axis {
	if !(top > 0) {
		top = 1
	}
	step := roundUp(top / 5)
	n := math.Ceil(top/step - 1e-9)
	var a axis
	for i := 0.0; i <= n; i++ {
		a.ticks = append(a.ticks, tick{i * step, label(i * step)})
	}
	a.place = func(v float64) float64 { return v / (n * step) }
	return a
}

// roundUp returns the least of 1, 2 and 5 times a power of ten that is not less than x.
func roundUp(x float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(x)))
	for _, digit := range []float64{1, 2, 5} {
		if digit*power >= x*(1-1e-9) {
			return digit * power
		}
	}
	return 10 * power
}

// logAxis is a logarithmic axis that holds values from low, which is positive, to high.
// It begins and ends at 1, 2 or 5 times a power of ten, and has ticks at all of these, or
// only at powers of ten if that were too many. Lower values are placed where it begins.
func logAxis(low, high float64, label func(float64) string) axis {
	var all, powers []tick
	first, last := 0.0, 0.0
	for power := math.Floor(math.Log10(low)); last < high || last <= first; power++ {
		for _, digit := range []float64{1, 2, 5} {
			v := digit * math.Pow(10, power)
			if v <= low*(1+1e-9) {
				all, powers, first = nil, nil, v // the last one of these is where it begins
			}
			if last >= high && last > first {
				break
			}
			t := tick{v, label(v)}
			all = append(all, t)
			if digit == 1 {
				powers = append(powers, t)
			}
			last = v
		}
	}
	a := axis{ticks: all, place: func(v float64) float64 { return math.Log(max(v, first)/first) / math.Log(last/first) }}
	if len(all) > 8 {
		a.ticks = powers
	}
	return a
}

// timeSteps are the distances that ticks may have on an axis of time.
var timeSteps = []time.Duration{
	10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second, 20 * time.Second, 30 * time.Second,
	time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute, 20 * time.Minute, 30 * time.Minute,
	time.Hour, 2 * time.Hour, 5 * time.Hour, 10 * time.Hour, 24 * time.Hour,
}

// timeAxis is an axis from 0 to end, in seconds, with ten ticks at most if it is not of
// many days.
func timeAxis(end float64) axis {
	if !(end > 0) {
		end = 1
	}
	step := timeSteps[len(timeSteps)-1]
	for _, s := range timeSteps {
		if end/s.Seconds() <= 10 {
			step = s
			break
		}
	}
	if end/step.Seconds() > 10 {
		step *= time.Duration(math.Ceil(end / step.Seconds() / 10))
	}
	a := axis{place: func(v float64) float64 { return v / end }}
	for t := time.Duration(0); t.Seconds() <= end*(1+1e-9); t += step {
		a.ticks = append(a.ticks, tick{t.Seconds(), timeLabel(t, step)})
	}
	return a
}

// timeLabel formats a time in the unit that suits the distance of ticks.
func timeLabel(t, step time.Duration) string {
	switch {
	case t == 0:
		return "0"
	case step >= time.Hour:
		return fmt.Sprintf("%g h", t.Hours())
	case step >= time.Minute:
		return fmt.Sprintf("%g min", t.Minutes())
	}
	return fmt.Sprintf("%g s", t.Seconds())
}

// percentileAxis is an axis of percentiles up to one of which a single message of count
// is left above, where 90 %, 99 %, 99.9 % and so on are equally far from each other.
func percentileAxis(count int64) axis {
	decades := max(math.Log10(float64(count)), 1)
	a := axis{place: func(percent float64) float64 {
		above := max(1-percent/100, 1e-18)
		return min(max(-math.Log10(above)/decades, 0), 1)
	}}
	a.ticks = []tick{{0, "0 %"}, {50, "50 %"}}
	for i := 1; float64(i) <= decades*(1+1e-9); i++ {
		label := fmt.Sprintf("%.*f %%", max(i-2, 0), 100*(1-math.Pow(10, float64(-i))))
		a.ticks = append(a.ticks, tick{100 * (1 - math.Pow(10, float64(-i))), label})
	}
	return a
}
