package main

import (
	"cmp"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tcprelay/relay"
)

// A sample is what had been carried at one time.
type sample struct {
	at      time.Time
	in, out int64
}

// rateTime is what rates are the mean of.
const rateTime = 5 * time.Second

// history are the samples of that time.
type history []sample

// add appends a sample and returns the rates up to it.
func (h *history) add(s sample) (in, out float64) {
	for len(*h) > 1 && s.at.Sub((*h)[0].at) > rateTime {
		*h = (*h)[1:]
	}
	*h = append(*h, s)
	first := (*h)[0]
	if d := s.at.Sub(first.at).Seconds(); d > 0 {
		in, out = float64(s.in-first.in)/d, float64(s.out-first.out)/d
	}
	return in, out
}

// Figures are those of a mapping, as they were last looked at.
type figures struct {
	history
	stats           relay.Stats
	inRate, outRate float64
}

// What is sent to a terminal besides text: to begin, on a screen of its own, without a
// cursor and without wrapping lines; before a frame, before a line, and behind the last;
// and to end.
const (
	enterScreen = "\x1b[?1049h\x1b[?25l\x1b[?7l"
	toTop       = "\x1b[H"
	clearLine   = "\x1b[K"
	clearRest   = "\x1b[J"
	leaveScreen = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
)

// canView reports whether a file is a terminal that can be drawn on, and is not another
// job's.
func canView(f *os.File) bool {
	_, _, ok := terminalSize(f)
	return ok && foreground(f) && os.Getenv("TERM") != "" && os.Getenv("TERM") != "dumb"
}

// A view draws the mappings of a forwarder on a terminal.
type view struct {
	f       *forwarder
	notes   *notes
	out     *os.File
	start   time.Time
	figures []figures // one a mapping; of the goroutine that draws
	stop    chan struct{}
	stopped chan struct{}

	mu    sync.Mutex // held while something is written
	drawn bool       // the screen is ours
	left  bool       // and is not to be, until enter is called
}

func newView(f *forwarder, n *notes, out *os.File) *view {
	return &view{f: f, notes: n, out: out, start: time.Now(), figures: make([]figures, len(f.mappings)),
		stop: make(chan struct{}), stopped: make(chan struct{})}
}

// restoreTime is how long it may take to leave the terminal as it was: one that takes no
// output, as after ^S, does not keep the program from ending.
const restoreTime = time.Second

// show draws until the function that it returns is called, which leaves the terminal as it
// was, and may be called again.
func (v *view) show() (restore func()) {
	v.enter()
	unfollow := v.follow()
	go v.keepDrawing()
	return sync.OnceFunc(func() {
		inTime(func() {
			unfollow()
			close(v.stop)
			<-v.stopped
			v.leave()
		})
	})
}

// inTime calls f and returns when that has, or when it takes too long.
func inTime(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(restoreTime):
	}
}

// keepDrawing draws every second, and when something happens, but not all the time, nor with
// new figures then, which take a look at each client. It ends when stop is closed.
func (v *view) keepDrawing() {
	defer close(v.stopped)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	count := true
	for {
		v.draw(count)
		pause := time.After(100 * time.Millisecond)
		select {
		case <-tick.C:
			count = true
		case <-v.notes.changed:
			count = false
		case <-v.stop:
			return
		}
		select {
		case <-pause:
		case <-v.stop:
			return
		}
	}
}

// enter makes the screen ours, at once or as soon as the program is in the foreground.
func (v *view) enter() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.left = false
	v.enterLocked()
}

func (v *view) enterLocked() {
	if !v.drawn && !v.left && foreground(v.out) {
		v.drawn = true
		v.out.WriteString(enterScreen)
	}
}

func (v *view) leave() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.left = true
	if v.drawn {
		v.drawn = false
		v.out.WriteString(leaveScreen)
	}
}

func (v *view) draw(count bool) {
	width, height, _ := terminalSize(v.out)
	width, height = sizeOr(width, height)
	lines := render(v.snapshot(count), width, height, os.Getenv("NO_COLOR") == "")
	// Lines are cleared before they are written: behind one that fills its line the cursor
	// is still on the last character.
	frame := toTop + clearLine + strings.Join(lines, "\r\n"+clearLine)
	if len(lines) < height {
		frame += "\r\n" + clearRest
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.enterLocked()
	if v.drawn && foreground(v.out) {
		v.out.WriteString(frame)
	}
}

// sizeOr returns the size of a terminal, or if that has none what the environment says.
func sizeOr(width, height int) (int, int) {
	columns, _ := strconv.Atoi(os.Getenv("COLUMNS"))
	lines, _ := strconv.Atoi(os.Getenv("LINES"))
	if width <= 0 {
		width = cmp.Or(max(columns, 0), 80)
	}
	if height <= 0 {
		height = cmp.Or(max(lines, 0), 24)
	}
	return width, height
}

// snapshot returns what is to be drawn, with the figures of now or those of before.
func (v *view) snapshot(count bool) *snapshot {
	s := &snapshot{relay: v.f.relay, start: v.start, now: time.Now(), notes: v.notes.last()}
	for i, m := range v.f.mappings {
		fig := &v.figures[i]
		if count {
			fig.stats = m.stats()
			fig.inRate, fig.outRate = fig.add(sample{s.now, fig.stats.BytesIn, fig.stats.BytesOut})
		}
		r := m.row()
		r.stats, r.inRate, r.outRate = fig.stats, fig.inRate, fig.outRate
		s.rows = append(s.rows, r)
	}
	return s
}
