package parts

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	settle      = 2 * time.Second // of memory
	messageSize = 64
)

// A Load is what clients do.
type Load struct {
	Kind    string        // a worker's of (*load).timed, or "idle"
	N       int           // conns at once
	Warm    time.Duration // before it is measured
	For     time.Duration
	Bulk    int // clients that read as much as they can, beside those measured
	Stalled int // clients that have asked for as much and read nothing
}

// startLoad starts clients that go on until they are told to be measured.
func (r *Running) startLoad(addr string, l Load) (*Process, error) {
	p, err := r.Start("", r.Bench.self, "load", "-addr", addr, "-kind", l.Kind, "-n", strconv.Itoa(l.N),
		"-warm", l.Warm.String(), "-for", l.For.String(), "-stalled", strconv.Itoa(l.Stalled))
	if err != nil {
		return nil, err
	}
	if line, err := p.Line(); err != nil || line != "ready" {
		return nil, errors.Join(fmt.Errorf("load says %q", line), err)
	}
	return p, nil
}

// Load runs clients of addr. It calls begin and end around what it measures. Those beside
// have a process of their own: a goroutine whose socket always has something gives its
// processor up every 10 ms, and what is measured is not how clients wait for each other.
func (r *Running) Load(addr string, l Load, begin, end func()) (rep Report, err error) {
	if l.Bulk > 0 || l.Stalled > 0 {
		beside := Load{Kind: "down", N: l.Bulk, Stalled: l.Stalled}
		if _, err := r.startLoad(addr, beside); err != nil {
			return rep, err
		}
		l.Bulk, l.Stalled = 0, 0
	}
	p, err := r.startLoad(addr, l)
	if err != nil {
		return rep, err
	}
	begin()
	if _, err := io.WriteString(p.stdin, "go\n"); err != nil {
		return rep, err
	}
	line, err := p.Line()
	if err != nil {
		return rep, err
	}
	end()
	if err := json.Unmarshal([]byte(line), &rep); err != nil {
		return rep, err
	}
	if rep.Errors > 0 {
		return rep, fmt.Errorf("%d errors, the first: %s", rep.Errors, rep.Error)
	}
	if rep.Count == 0 {
		return rep, errors.New("nothing came through")
	}
	return rep, nil
}

// A Report is what load found within the time of the measurement.
type Report struct {
	Seconds  float64
	Count    int64 // bytes, round trips, connections, or clients
	P50, P99 time.Duration
	Errors   int64
	Error    string // the first
}

// load is the clients' side of a job.
type load struct {
	Load
	addrs    []string
	dialled  atomic.Int64
	count    atomic.Int64
	during   atomic.Bool // the measurement
	over     atomic.Bool
	errors   atomic.Int64
	mu       sync.Mutex
	err      error
	latency  []time.Duration // of the round trips, when measured
	dialling chan struct{}   // bounds those of many that do so at once
	arrived  sync.WaitGroup  // conns that are to be there before it is measured
	measured sync.WaitGroup
	idlers   []net.Conn // kept, or the collector would close them
}

// runLoad says "ready" when the job runs, measures from the next line of its standard
// input on, and prints a report. What it has open stays so until standard input ends.
func runLoad(args []string) error {
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	l := &load{dialling: make(chan struct{}, 64)}
	addrs := flags.String("addr", "", "where to; several, with commas, are taken in turn")
	flags.StringVar(&l.Kind, "kind", "", "what to do")
	flags.IntVar(&l.N, "n", 1, "conns at once")
	flags.DurationVar(&l.Warm, "warm", 0, "how long it runs before it is measured")
	flags.DurationVar(&l.For, "for", time.Second, "how long")
	flags.IntVar(&l.Stalled, "stalled", 0, "clients that do not read, beside")
	flags.Parse(args)
	l.addrs = strings.Split(*addrs, ",")
	input := bufio.NewReader(os.Stdin)
	begin := func() error {
		fmt.Println("ready")
		_, err := input.ReadString('\n')
		return err
	}
	var r Report
	var err error
	if l.Kind == "idle" {
		r, err = l.idle(begin)
	} else {
		r, err = l.timed(begin)
	}
	if err != nil {
		return err
	}
	r.Errors = l.errors.Load()
	if l.err != nil {
		r.Error = l.err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return err
	}
	io.Copy(io.Discard, input)
	runtime.KeepAlive(l.idlers)
	return nil
}

func (l *load) fail(err error) {
	if err == nil || l.over.Load() {
		return
	}
	l.errors.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.err = err
	}
}

// timed runs a job whose workers count what they do.
func (l *load) timed(begin func() error) (r Report, err error) {
	worker := map[string]func() error{
		"up": l.up, "told up": l.toldUp, "down": l.down, "trips": l.trips, "connect": l.connect,
	}[l.Kind]
	if worker == nil {
		return r, fmt.Errorf("no kind of load is %q", l.Kind)
	}
	for range l.Stalled {
		c, err := l.dial(askGive)
		if err != nil {
			return r, err
		}
		l.idlers = append(l.idlers, c)
	}
	l.measured.Add(l.N)
	if l.Kind == "trips" {
		l.arrived.Add(l.N)
	}
	for range l.N {
		go func() { l.fail(worker()) }()
	}
	l.arrived.Wait()
	time.Sleep(l.Warm)
	if err := begin(); err != nil {
		return r, err
	}
	start, before := time.Now(), l.count.Load()
	l.during.Store(true)
	time.Sleep(l.For)
	l.during.Store(false)
	r.Count, r.Seconds = l.count.Load()-before, time.Since(start).Seconds()
	l.over.Store(true)
	if l.Kind == "trips" {
		l.measured.Wait()
		if len(l.latency) == 0 {
			return r, nil
		}
		slices.Sort(l.latency)
		r.P50, r.P99 = l.latency[len(l.latency)/2], l.latency[len(l.latency)*99/100]
		r.Count = int64(len(l.latency))
	}
	return r, nil
}

func (l *load) dial(ask byte) (net.Conn, error) {
	at := l.addrs[int(l.dialled.Add(1))%len(l.addrs)]
	c, err := net.Dial("tcp", at)
	if err == nil {
		_, err = c.Write([]byte{ask})
	}
	return c, err
}

func (l *load) up() error {
	c, err := l.dial(askTake)
	if err != nil {
		return err
	}
	buf := make([]byte, bulkSize)
	for {
		n, err := c.Write(buf)
		l.count.Add(int64(n))
		if err != nil {
			return err
		}
	}
}

// toldUp counts what the app says that it has, not what this side has written.
func (l *load) toldUp() error {
	c, err := l.dial(askTell)
	if err != nil {
		return err
	}
	go func() {
		buf := make([]byte, bulkSize)
		for {
			if _, err := c.Write(buf); err != nil {
				return // the reader hears of it too
			}
		}
	}()
	var last, now [8]byte
	for {
		if _, err := io.ReadFull(c, now[:]); err != nil {
			return err
		}
		l.count.Add(int64(binary.BigEndian.Uint64(now[:]) - binary.BigEndian.Uint64(last[:])))
		last = now
	}
}

func (l *load) down() error {
	c, err := l.dial(askGive)
	if err != nil {
		return err
	}
	buf := make([]byte, bulkSize)
	for {
		n, err := c.Read(buf)
		l.count.Add(int64(n))
		if err != nil {
			return err
		}
	}
}

func (l *load) trips() error {
	defer l.measured.Done()
	l.dialling <- struct{}{}
	c, err := l.dial(askEcho)
	<-l.dialling
	l.arrived.Done()
	if err != nil {
		return err
	}
	took := make([]time.Duration, 0, 1<<20/l.N)
	for {
		start := time.Now()
		if err := roundTrip(c); err != nil {
			return err
		}
		if l.during.Load() {
			took = append(took, time.Since(start))
		} else if l.over.Load() {
			break
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.latency = append(l.latency, took...)
	return nil
}

func roundTrip(c net.Conn) error {
	var msg [messageSize]byte
	if _, err := c.Write(msg[:]); err != nil {
		return err
	}
	_, err := io.ReadFull(c, msg[:])
	return err
}

// connect makes a connection, has something echoed, and closes it, again and again.
func (l *load) connect() error {
	for {
		c, err := l.dial(askEcho)
		if err == nil {
			err = roundTrip(c)
		}
		if c != nil {
			c.Close()
		}
		if err != nil {
			if l.over.Load() {
				return nil
			}
			l.fail(err)
			continue
		}
		l.count.Add(1)
	}
}

// idle opens n conns that have had a round trip and then do nothing.
func (l *load) idle(begin func() error) (r Report, err error) {
	open := func(n int) (conns []net.Conn, err error) {
		for range n {
			c, err := l.dial(askEcho)
			if err == nil {
				err = roundTrip(c)
			}
			if err != nil {
				return nil, err
			}
			conns = append(conns, c)
		}
		return conns, nil
	}
	first, err := open(20)
	if err != nil {
		return r, err
	}
	for _, c := range first {
		c.Close()
	}
	time.Sleep(settle / 2)
	if err := begin(); err != nil {
		return r, err
	}
	conns, err := open(l.N)
	if err != nil {
		return r, err
	}
	time.Sleep(settle)
	l.idlers = conns
	return Report{Count: int64(len(conns)), Seconds: 1}, nil
}
