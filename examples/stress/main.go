// Command stress tests a TCP address behind a relay, or any other TCP echo service, under
// load: many clients send pseudo-random bytes, and verify each byte that comes back.
//
//	go run github.com/tcprelay/relay/examples/echo -relay 127.0.0.1:8080
//	go run github.com/tcprelay/relay/examples/stress -to 127.0.0.1:8081
//
// With -mode round-trips each client sends a message, awaits its echo, and sends the next.
// With bulk it sends while it receives, with up to -inflight messages under way, and
// half-closes in the end. With connections it opens a connection for each message,
// half-closes after it, and expects the echo and then the end.
//
// A latency runs until the last byte of the message is back, from when it was sent; in
// connections it runs from before connecting until the end. With -rate it runs from when the message was due:
// a service that stalls for a second delays all the messages that it keeps from being
// sent in that second, and the percentiles show all of them. Without -rate clients send
// when the service lets them, and a stall is one slow message each; percentiles measured
// so are too good (coordinated omission), so compare services at a rate that all can
// sustain. Messages that were due and could not be sent before the end are counted as
// unsent.
//
// A client whose connection fails goes on with another one. While it runs, a line a
// second on stderr says how it goes; the report goes to stdout, and with -json and -svg
// to files. After -time, or SIGINT, what was begun is finished, within -timeout. Rates are
// those of the time before. The exit status is 1 if anything went wrong or no message came
// back, 2 if the command line is wrong. Each flag can be given in the environment as well,
// -to as STRESS_TO.
//
// Each connection takes a file (ulimit -n), and with -mode connections each message takes
// a local port, which the system keeps from further use for some time.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/tcprelay/relay/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program
	info, err := os.Stderr.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0
	os.Exit(command(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr, terminal))
}

// command is the program, whose run ctx interrupts, and whose environment is lookup's. It
// returns the exit status. Terminal says whether stderr is one.
func command(ctx context.Context, args []string, lookup func(string) (string, bool), stdout, stderr io.Writer, terminal bool) (status int) {
	p, f, err := parse(args, lookup)
	if err != nil {
		return f.Tell(err, stdout, stderr)
	}
	if p.version {
		fmt.Fprintln(stdout, "stress", cli.Version())
		return 0
	}
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(stderr, "stress:", err)
			status = 1
		}
	}
	text, jsonOut := stdout, io.Writer(nil)
	if p.json == "-" {
		text, jsonOut = stderr, stdout
	}
	// The files are made now, so that the run is not in vain.
	jsonFile, err := create("-json", p.json)
	fail(err)
	svgFile, err := create("-svg", p.svg)
	fail(err)
	if status != 0 {
		return status
	}
	r := run(ctx, p, &progress{w: stderr, terminal: terminal, mode: p.mode})
	if r.Totals.Errors > 0 || r.Totals.Messages == 0 {
		status = 1
	}
	// Files first: who reads the text may keep it waiting, or be gone.
	fail(save("-json", jsonFile, r.writeJSON))
	fail(save("-svg", svgFile, r.writeSVG))
	if jsonOut != nil {
		fail(r.writeJSON(jsonOut))
	}
	fail(r.writeText(text))
	return status
}

// create creates the file that a flag names, if it names one.
func create(flag, name string) (*os.File, error) {
	if name == "" || name == "-" {
		return nil, nil
	}
	f, err := os.Create(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	return f, nil
}

// save has write fill a file that create has created, and closes it.
func save(flag string, f *os.File, write func(io.Writer) error) error {
	if f == nil {
		return nil
	}
	err := write(f)
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("%s: %w", flag, err)
	}
	return nil
}

// run has the clients use the service until the time is over or ctx ends.
func run(ctx context.Context, p *params, show *progress) *report {
	m := newMeter(p.clients)
	ctx, cancel := context.WithTimeout(ctx, p.time)
	defer cancel()
	context.AfterFunc(ctx, func() {
		at := time.Now()
		if deadline, _ := ctx.Deadline(); deadline.Before(at) {
			at = deadline
		}
		m.end(at)
	})
	over := make(chan struct{})
	var watcher, clients sync.WaitGroup
	watcher.Go(func() { m.watch(over, show.show) })
	for id := range p.clients {
		clients.Go(func() { newClient(p, m, id).run(ctx) })
	}
	clients.Wait()
	<-m.ended
	close(over)
	watcher.Wait()
	show.end()
	// A signal that came when the time was over has interrupted nothing.
	return newReport(p, m, ctx.Err() == context.Canceled)
}
