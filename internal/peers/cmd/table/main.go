// Table runs the benchmarks of internal/peers and prints what they found as a
// Markdown table: a row per job, a column per contender, the median of all rounds
// in each cell with its ratio to the plain proxy. In every ratio more is better, and
// every ratio is the median of those within a round.
//
//	go run ./cmd/table                     # 5 rounds, about four minutes
//	go run ./cmd/table -rounds 2 -bench Relay/roundTrip
//
// Every measurement runs in a process of its own, one contender directly after
// the other, in an order that moves on by one each round: whatever else the
// machine does then falls on all of them alike.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"time"
)

const benchPackage = "github.com/tcprelay/relay/internal/peers"

func main() {
	rounds := flag.Int("rounds", 5, "measurements of each job and contender")
	benchtime := flag.String("benchtime", "600ms", "length of a measurement, as go test takes it")
	bench := flag.String("bench", "Relay", "which benchmarks, as go test takes it")
	raw := flag.String("raw", "", "also write the benchmarks' own output to this `file`, for benchstat")
	verbose := flag.Bool("v", false, "say on standard error what is running")
	flag.Parse()
	if flag.NArg() > 0 || *rounds < 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds, *benchtime, *bench, *raw, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "table:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds int, benchtime, bench, rawPath string, verbose bool) error {
	dir, err := os.MkdirTemp("", "table")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "peers.test")
	raw := io.Discard
	if rawPath != "" {
		f, err := os.Create(rawPath)
		if err != nil {
			return err
		}
		defer f.Close()
		raw = f
	}
	// Built once: go test would link it anew for every measurement.
	build := exec.CommandContext(ctx, "go", "test", "-c", "-o", binary, benchPackage)
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}

	// One operation of everything tells what there is to measure.
	start := time.Now()
	out, err := runBenchmarks(ctx, binary, bench, "1x")
	found := parseResults(out)
	if err != nil && len(found) == 0 {
		return fmt.Errorf("%w\n%s", err, out)
	}
	t := newTable(found)
	if len(t.jobs) == 0 {
		return fmt.Errorf("no benchmark matches %q", bench)
	}
	for round := range rounds {
		for _, job := range t.jobs {
			for i := range t.contenders {
				name := benchName{job, t.contenders[(i+round)%len(t.contenders)]}
				out, err := runBenchmarks(ctx, binary, name.pattern(), benchtime)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if _, err := raw.Write(out); err != nil {
					return err
				}
				results := parseResults(out)
				for _, res := range results {
					t.add(res)
				}
				if err != nil && len(results) == 0 { // it hung or crashed
					t.add(result{name: name, failure: fmt.Sprintf("%v\n%s", err, out)})
				}
				if verbose {
					fmt.Fprintf(os.Stderr, "%4.0fs  round %d  %s\n", time.Since(start).Seconds(), round+1, name)
				}
			}
		}
	}
	fmt.Print(t.markdown())
	fmt.Printf("\nMedians of %d interleaved rounds of %s; ± is half the distance between the best and the worst. In brackets, how many times as good as plain: the median of the ratios within each round. More is better in every ratio.\n",
		rounds, benchtime)
	if len(t.failed) > 0 {
		return fmt.Errorf("%d benchmarks failed:\n%s", len(t.failed), t.failures())
	}
	return nil
}

// runBenchmarks returns what the compiled benchmarks that match pattern print. An
// error says that one of them failed, as the output then does too, or that the
// program ended before its time.
func runBenchmarks(ctx context.Context, binary, pattern, benchtime string) ([]byte, error) {
	return exec.CommandContext(ctx, binary, "-test.run=^$", "-test.timeout=2m",
		"-test.bench="+pattern, "-test.benchtime="+benchtime).CombinedOutput()
}
