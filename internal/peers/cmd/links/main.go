// Links compares relays over long links: what one stream, and a small message beside many,
// come to when the relay is far from the app. It prints Markdown tables with a row per
// chain, and ratios to a TCP connection over the same link without a relay.
//
//	go run ./cmd/links                        # 3 rounds, an hour
//	go run ./cmd/links -rounds 1 -links '100ms.*1Gbit' -chains 'direct|relay'
//
// The link lies between relay and app; between client and relay is loopback. It is one of
// internal/peers/link, under which direct TCP is as fast as the link. All that is in a
// table thus is a matter of windows, buffers and turns, and not of TCP's own.
//
// A measurement has fresh processes and begins when the link has had time to fill. Chains
// follow each other directly, in an order that moves on by one each round.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"time"

	"github.com/tcprelay/relay/internal/peers/parts"
)

// ownParts are those that other commands do not have.
var ownParts = map[string]func(args []string) error{"link": runLink}

func main() {
	parts.Main(ownParts)
	var p plan
	flag.IntVar(&p.rounds, "rounds", 3, "measurements of each job, link and chain")
	flag.DurationVar(&p.length, "time", 5*time.Second, "length of a measurement")
	links := flag.String("links", ".", "which links, a `regexp`, as in 100ms 1Gbit/s")
	jobs := flag.String("jobs", ".", "which jobs, a `regexp`")
	chains := flag.String("chains", ".", "which chains, a `regexp`")
	flag.BoolVar(&p.verbose, "v", false, "print each measurement to standard error")
	flag.Parse()
	if flag.NArg() > 0 || p.rounds < 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := p.choose(*links, *jobs, *chains)
	if err == nil {
		err = p.run(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "links:", err)
		os.Exit(1)
	}
}

// A plan is what is to be measured.
type plan struct {
	rounds  int
	length  time.Duration
	verbose bool
	cells   []cell // in the order of measurement
	chains  []chain
}

// A cell is a job over a link: a column of a table.
type cell struct {
	link line
	job  job
}

// choose fills the plan with what matches.
func (p *plan) choose(links, jobs, chains string) error {
	linkRE, err1 := regexp.Compile(links)
	jobRE, err2 := regexp.Compile(jobs)
	chainRE, err3 := regexp.Compile(chains)
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	for _, l := range allLinks {
		for _, j := range allJobs {
			if linkRE.MatchString(l.String()) && jobRE.MatchString(j.name) && j.runsOver(l) {
				p.cells = append(p.cells, cell{l, j})
			}
		}
	}
	for _, c := range allChains {
		if chainRE.MatchString(c.name) {
			p.chains = append(p.chains, c)
		}
	}
	if len(p.cells) == 0 || len(p.chains) == 0 {
		return fmt.Errorf("nothing matches links %q, jobs %q and chains %q", links, jobs, chains)
	}
	return nil
}

func (p *plan) run(ctx context.Context) error {
	bench, err := parts.NewBench(ctx)
	if err != nil {
		return err
	}
	defer bench.Close()
	t := newTables(p)
	start := time.Now()
	for round := range p.rounds {
		for _, at := range p.cells {
			for i := range p.chains {
				c := p.chains[(i+round)%len(p.chains)]
				m, err := measure(ctx, bench, c, at, p.length)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				t.add(at, c, m, err)
				if p.verbose {
					fmt.Fprintf(os.Stderr, "%4.0fs  round %d  %v  %-28s %-8s %v %v\n",
						time.Since(start).Seconds(), round+1, at.link, at.job.name, c.name, m, err)
				}
			}
		}
	}
	fmt.Print(t.markdown())
	fmt.Printf("\nMedians of %d interleaved rounds of %v, and in brackets of the ratios to `%s` within each round.\n", p.rounds, p.length, baseline)
	if len(t.failures) > 0 {
		return fmt.Errorf("%d measurements failed:\n%s", len(t.failures), strings.Join(t.failures, "\n"))
	}
	return nil
}
