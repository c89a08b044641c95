// Scale shows how cost grows with the number of clients, and of services: round trips per
// second of all clients together, and memory, in processes of their own. It prints two
// Markdown tables.
//
//	go run ./cmd/scale                 # 3 rounds, some 6 minutes
//
// No relay at all and a plain TCP proxy stand beside, for load and machine have knees of
// their own. The proxy needs more than two files for each client, so that under a hard
// limit of 20,000 it has no figures of 10,000.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/tcprelay/relay/internal/peers/parts"
	"github.com/tcprelay/relay/internal/peers/rounds"
)

const (
	warmUp = 300 * time.Millisecond
	spread = 64 // clients that the services have together
)

// A chain is what lies between load and app.
type chain struct {
	name  string
	start func(r *parts.Running) (addr string, err error)
}

var chains = []chain{
	{"direct", (*parts.Running).App},
	{"proxy", func(r *parts.Running) (string, error) {
		to, err := r.App()
		if err != nil {
			return "", err
		}
		return r.Proxy("relay", to)
	}},
	{"relay, app", func(r *parts.Running) (string, error) { return r.Embedded(nil) }},
	{"relay, forward", func(r *parts.Running) (string, error) { return r.Forwarded() }},
}

func main() {
	parts.Main(nil)
	n := flag.Int("rounds", 3, "measurements of each number")
	length := flag.Duration("time", time.Second, "length of a measurement")
	clients := flag.String("clients", "10,100,1000,10000", "numbers of clients")
	services := flag.String("services", "1,10,100,1000", "numbers of services")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *n, *length, *clients, *services); err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, n int, length time.Duration, clients, services string) error {
	b, err := parts.NewBench(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	s := &scale{ctx: ctx, bench: b, rounds: n, length: length}
	for _, list := range []struct {
		numbers string
		table   func([]int) error
	}{{clients, s.clients}, {services, s.services}} {
		numbers, err := parse(list.numbers)
		if err != nil {
			return err
		}
		if err := list.table(numbers); err != nil {
			return err
		}
	}
	fmt.Printf("\nMedians of %d rounds of %v; in brackets the ratio to `direct` in the same round.\n", n, length)
	return nil
}

func parse(list string) (numbers []int, err error) {
	for field := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(field)
		if err != nil || n <= 0 {
			return nil, fmt.Errorf("%q is not a list of numbers", list)
		}
		numbers = append(numbers, n)
	}
	return numbers, nil
}

type scale struct {
	ctx    context.Context
	bench  *parts.Bench
	rounds int
	length time.Duration
}

// A sample is what one measurement came to. Figures are 0 where it failed.
type sample struct {
	rate   float64            // round trips per second
	memory map[string]float64 // bytes, by role
}

// measure starts a chain and has a load run over it. Of memory it returns what has come
// during it if that is an idle one, and all otherwise.
func (s *scale) measure(start func(*parts.Running) (string, error), l parts.Load) (sample, error) {
	ctx, cancel := context.WithTimeout(s.ctx, l.For+3*time.Minute)
	defer cancel()
	r := &parts.Running{Bench: s.bench, Ctx: ctx}
	defer r.End()
	addr, err := start(r)
	if err != nil {
		return sample{}, err
	}
	memory := make(map[string]float64)
	carriers := r.Procs
	count := func(sign float64) {
		for _, p := range carriers {
			memory[p.Role] += sign * p.RSS()
		}
	}
	rep, err := r.Load(addr, l, func() {
		if l.Kind == "idle" {
			count(-1)
		}
	}, func() { count(1) })
	if err != nil {
		return sample{}, err
	}
	return sample{float64(rep.Count) / rep.Seconds, memory}, nil
}

func (s *scale) trips(clients int) parts.Load {
	return parts.Load{Kind: "trips", N: clients, Warm: warmUp, For: s.length}
}

// clients prints the table by numbers of clients.
func (s *scale) clients(numbers []int) error {
	fmt.Print("\n| round trips/s of clients |")
	for _, c := range chains {
		fmt.Printf(" %s |", c.name)
	}
	for _, c := range chains[1:] {
		fmt.Printf(" KiB each: %s |", c.name)
	}
	fmt.Printf("\n|---:|%s\n", strings.Repeat("---:|", 2*len(chains)-1))
	for _, n := range numbers {
		rates := make([][]float64, len(chains))
		memory := make([]map[string][]float64, len(chains))
		for i := range chains {
			memory[i] = make(map[string][]float64)
		}
		for round := range s.rounds {
			for k := range chains {
				i := (k + round) % len(chains)
				trips, err := s.measure(chains[i].start, s.trips(n))
				if err != nil {
					fmt.Fprintf(os.Stderr, "scale: %d clients, %s: %v\n", n, chains[i].name, err)
				}
				rates[i] = append(rates[i], trips.rate)
				if i == 0 {
					continue // it has no memory of its own
				}
				idle, err := s.measure(chains[i].start, parts.Load{Kind: "idle", N: n, For: time.Second})
				if err != nil {
					fmt.Fprintf(os.Stderr, "scale: %d idle clients, %s: %v\n", n, chains[i].name, err)
					continue
				}
				for role, bytes := range idle.memory {
					memory[i][role] = append(memory[i][role], bytes/float64(n))
				}
				if s.ctx.Err() != nil {
					return s.ctx.Err()
				}
			}
		}
		fmt.Printf("| %d |", n)
		for i := range chains {
			fmt.Printf(" %s |", rateCell(rates[i], rates[0], i > 0))
		}
		for _, m := range memory[1:] {
			cell := memoryCell(m["relay"], 1<<10)
			if len(m["agent"]) > 0 {
				cell += " + " + memoryCell(m["agent"], 1<<10)
			}
			fmt.Printf(" %s |", cell)
		}
		fmt.Println()
	}
	return nil
}

// services prints the table by numbers of services, which one app has.
func (s *scale) services(numbers []int) error {
	fmt.Printf("\n| services | round trips/s of %d clients | relay, MiB | app, MiB |\n|---:|---:|---:|---:|\n", spread)
	for _, n := range numbers {
		var rates []float64
		memory := make(map[string][]float64)
		for range s.rounds {
			got, err := s.measure(func(r *parts.Running) (string, error) {
				return r.Embedded(nil, "-services", strconv.Itoa(n))
			}, s.trips(spread))
			if err != nil {
				return fmt.Errorf("%d services: %w", n, err)
			}
			rates = append(rates, got.rate)
			for role, bytes := range got.memory {
				memory[role] = append(memory[role], bytes)
			}
		}
		fmt.Printf("| %d | %s | %s | %s |\n", n, rateCell(rates, nil, false),
			memoryCell(memory["relay"], 1<<20), memoryCell(memory["agent"], 1<<20))
	}
	return nil
}

func rateCell(rates, base []float64, ratio bool) string {
	if len(rates) == 0 || rounds.Median(rates) == 0 {
		return "–"
	}
	cell := fmt.Sprintf("%.1fk", rounds.Median(rates)/1e3)
	if r, ok := rounds.Ratio(rates, base); ok && ratio {
		cell += fmt.Sprintf(" (%.2f×)", r)
	}
	return cell
}

func memoryCell(bytes []float64, unit float64) string {
	if len(bytes) == 0 {
		return "–"
	}
	return fmt.Sprintf("%.1f", rounds.Median(bytes)/unit)
}
