package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	warmUp      = 300 * time.Millisecond
	settle      = 2 * time.Second // of memory
	messageSize = 64
	background  = 8 // bulk conns, and as many stopped ones, beside the interactive one
)

// A report is what load found within the time of the measurement.
type report struct {
	Seconds  float64
	Count    int64 // bytes, round trips, connections, or clients
	P50, P99 time.Duration
	Errors   int64
	Error    string // the first
}

// load is the clients' side of a job.
type load struct {
	addr     string
	n        int
	count    atomic.Int64
	during   atomic.Bool // the measurement
	over     atomic.Bool
	errors   atomic.Int64
	mu       sync.Mutex
	err      error
	latency  []time.Duration // of the round trips, when measured
	measured sync.WaitGroup
	idlers   []net.Conn // kept, or the collector would close them
}

// runLoad says "ready" when the job runs, measures from the next line of its standard
// input on, and prints a report. What it has open stays so until standard input ends.
func runLoad(args []string) error {
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	addr := flags.String("addr", "", "where to")
	kind := flags.String("kind", "", "what to do")
	n := flags.Int("n", 1, "conns at once")
	length := flags.Duration("for", time.Second, "how long")
	flags.Parse(args)
	l := &load{addr: *addr, n: *n}
	input := bufio.NewReader(os.Stdin)
	begin := func() error {
		fmt.Println("ready")
		_, err := input.ReadString('\n')
		return err
	}
	var r report
	var err error
	if *kind == "idle" {
		r, err = l.idle(begin)
	} else {
		r, err = l.timed(*kind, begin, *length)
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
func (l *load) timed(kind string, begin func() error, length time.Duration) (r report, err error) {
	workers := map[string]func() error{
		"up": l.up, "down": l.down, "trips": l.trips, "connect": l.connect,
	}
	if kind == "mixed" {
		for range background {
			go func() { l.fail(l.down()) }()
			stopped, err := l.dial(askGive) // nobody reads from it
			if err != nil {
				return r, err
			}
			l.idlers = append(l.idlers, stopped)
		}
		kind = "trips"
		l.n = 1
		time.Sleep(warmUp)
	}
	l.measured.Add(l.n)
	for range l.n {
		go func() { l.fail(workers[kind]()) }()
	}
	time.Sleep(warmUp)
	if err := begin(); err != nil {
		return r, err
	}
	start, before := time.Now(), l.count.Load()
	l.during.Store(true)
	time.Sleep(length)
	l.during.Store(false)
	r.Count, r.Seconds = l.count.Load()-before, time.Since(start).Seconds()
	l.over.Store(true)
	if kind == "trips" {
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
	c, err := net.Dial("tcp", l.addr)
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
	c, err := l.dial(askEcho)
	if err != nil {
		return err
	}
	took := make([]time.Duration, 0, 1<<16)
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
func (l *load) idle(begin func() error) (r report, err error) {
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
	conns, err := open(l.n)
	if err != nil {
		return r, err
	}
	time.Sleep(settle)
	l.idlers = conns
	return report{Count: int64(len(conns)), Seconds: 1}, nil
}
