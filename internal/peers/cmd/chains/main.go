// Chains compares relays as they are run: load, relay, agent and app in processes of
// their own, beside no relay at all, plain TCP proxies and HAProxy. It prints a Markdown
// table for each job, a row per chain, with ratios to one plain proxy.
//
//	go run ./cmd/chains                        # 5 rounds, some 15 minutes
//	go run ./cmd/chains -rounds 1 -jobs bulk -chains 'relay|proxy'
//
// A measurement has fresh processes. Chains follow each other directly, in an order that
// moves on by one each round: whatever else the machine does then falls on all of them
// alike. Ratios are medians of those within a round.
//
// The program is also every part of a chain that is not relayd, forward or haproxy: it
// runs itself with the name of the part.
//
// The chain `bare, agent` is nothing to be used, but the least that a relay and its agent
// can be in Go, for the jobs that it can do: it tells what of a relay's cost is its own.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/tcprelay/relay/internal/peers/parts"
)

func main() {
	parts.Main(nil)
	rounds := flag.Int("rounds", 5, "measurements of each job and chain")
	length := flag.Duration("time", time.Second, "length of a measurement")
	jobsWanted := flag.String("jobs", ".", "which jobs, a `regexp`")
	chainsWanted := flag.String("chains", ".", "which chains, a `regexp`")
	idle := flag.Int("idle", 1000, "clients of the job that measures memory")
	verbose := flag.Bool("v", false, "print each measurement to standard error")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds, *length, *jobsWanted, *chainsWanted, *idle, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "chains:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds int, length time.Duration, jobsWanted, chainsWanted string, idle int, verbose bool) error {
	jobRE, err := regexp.Compile(jobsWanted)
	if err != nil {
		return err
	}
	chainRE, err := regexp.Compile(chainsWanted)
	if err != nil {
		return err
	}
	var jobs []job
	for _, j := range allJobs(idle) {
		if jobRE.MatchString(j.name) {
			jobs = append(jobs, j)
		}
	}
	var chains []chain
	for _, c := range allChains {
		if chainRE.MatchString(c.name) {
			chains = append(chains, c)
		}
	}
	jobs = slices.DeleteFunc(jobs, func(j job) bool {
		return !slices.ContainsFunc(chains, func(c chain) bool { return c.does(j) })
	})
	if len(jobs) == 0 || len(chains) == 0 {
		return fmt.Errorf("no job matches %q that a chain does which matches %q", jobsWanted, chainsWanted)
	}
	bench, err := parts.NewBench(ctx)
	if err != nil {
		return err
	}
	defer bench.Close()

	t := newTables(jobs, chains)
	start := time.Now()
	for round := range rounds {
		for _, j := range jobs {
			for i := range chains {
				c := chains[(i+round)%len(chains)]
				if !c.does(j) {
					continue
				}
				m, err := measure(ctx, bench, c, j, length)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				t.add(j, c, m, err)
				if verbose {
					fmt.Fprintf(os.Stderr, "%4.0fs  round %d  %-24s %-28s %v %v\n",
						time.Since(start).Seconds(), round+1, j.name, c.name, m, err)
				}
			}
		}
	}
	fmt.Print(t.markdown())
	fmt.Printf("\nMedians of %d interleaved rounds of %v, and in brackets of the ratios to `%s` within each round.\n", rounds, length, baseline)
	if len(t.failures) > 0 {
		return fmt.Errorf("%d measurements failed:\n%s", len(t.failures), strings.Join(t.failures, "\n"))
	}
	return nil
}
