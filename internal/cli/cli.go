// Package cli has what the programs in examples share: flags in groups, which the
// environment can give as well, and a help text that reads from top to bottom.
package cli

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

// Flags are those of a program. Each can be given in the environment too, by the name of
// the program and the flag: -tls-self of relayd is RELAYD_TLS_SELF. The command line goes
// first.
type Flags struct {
	*flag.FlagSet
	intro  string
	groups []group
}

// A group is the flags under one heading, in the order of their definition as far as
// package flag tells, which is that of their names.
type group struct {
	title string
	names []string
}

// New returns the flags of a program, which has none yet. Intro is how its help begins.
func New(program, intro string) *Flags {
	f := &Flags{FlagSet: flag.NewFlagSet(program, flag.ContinueOnError), intro: intro}
	f.SetOutput(io.Discard) // Run says it
	f.FlagSet.Usage = func() {}
	return f
}

// Group begins a heading of the help, for the flags that are defined from here on.
func (f *Flags) Group(title string) {
	f.close()
	f.groups = append(f.groups, group{title: title})
}

// close gives the last group the flags that no other has.
func (f *Flags) close() {
	if len(f.groups) == 0 {
		return
	}
	known := make(map[string]bool)
	for _, g := range f.groups {
		for _, name := range g.names {
			known[name] = true
		}
	}
	last := &f.groups[len(f.groups)-1]
	f.VisitAll(func(fl *flag.Flag) {
		if !known[fl.Name] {
			last.names = append(last.names, fl.Name)
		}
	})
}

// ParseOrExit parses the command line and the environment. Asked for help it prints that
// and exits; for what it does not understand the exit status is 2.
func (f *Flags) ParseOrExit() {
	err := f.parse(os.Args[1:], os.LookupEnv)
	if err == nil {
		return
	}
	if errors.Is(err, flag.ErrHelp) {
		f.Help(os.Stdout)
		os.Exit(0)
	}
	f.Exit(err)
}

// Exit ends a program that was not called as it should be.
func (f *Flags) Exit(err error) {
	fmt.Fprintf(os.Stderr, "%s: %v\n\"%[1]s -h\" lists the flags.\n", f.Name(), err)
	os.Exit(2)
}

func (f *Flags) parse(args []string, lookup func(string) (string, bool)) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	given := make(map[string]bool)
	f.Visit(func(fl *flag.Flag) { given[fl.Name] = true })
	var err error
	f.VisitAll(func(fl *flag.Flag) {
		value, ok := lookup(f.variable(fl.Name))
		if !ok || given[fl.Name] || err != nil {
			return
		}
		values := []string{value}
		if _, list := fl.Value.(*List); list {
			values = strings.Split(value, ",")
		}
		for _, v := range values {
			if e := f.Set(fl.Name, v); e != nil && err == nil {
				err = fmt.Errorf("invalid value %q in the environment's %s: %w", v, f.variable(fl.Name), e)
			}
		}
	})
	return err
}

// variable returns the environment's name for a flag.
func (f *Flags) variable(name string) string {
	return strings.ToUpper(strings.ReplaceAll(f.FlagSet.Name()+"_"+name, "-", "_"))
}

// A List is the value of a flag that may be given several times, and in the environment
// with commas between.
type List []string

func (l *List) String() string { return strings.Join(*l, ",") }

// Set appends s.
func (l *List) Set(s string) error {
	if s = strings.TrimSpace(s); s == "" {
		return errors.New("empty")
	}
	*l = append(*l, s)
	return nil
}

// What a line of the help has room for, and where its text begins.
const (
	width  = 80
	indent = 24
)

// Help prints the help.
func (f *Flags) Help(w io.Writer) {
	f.close()
	fmt.Fprintf(w, "%s\n", strings.TrimSpace(f.intro))
	for _, g := range f.groups {
		fmt.Fprintf(w, "\n%s:\n", g.title)
		for _, name := range g.names {
			f.describe(w, f.Lookup(name))
		}
	}
	fmt.Fprintf(w, "\nThe environment can give each flag too, -%s as %s.\n",
		f.groups[0].names[0], f.variable(f.groups[0].names[0]))
}

// describe prints the help of one flag.
func (f *Flags) describe(w io.Writer, fl *flag.Flag) {
	placeholder, usage := flag.UnquoteUsage(fl)
	if b, ok := fl.Value.(interface{ IsBoolFlag() bool }); ok && b.IsBoolFlag() {
		placeholder = ""
	}
	if d := fl.DefValue; d != "" && d != "false" && d != "0" && d != "-1" && d != "0s" {
		usage += " (default " + d + ")"
	}
	line := "  -" + fl.Name
	if placeholder != "" {
		line += " " + placeholder
	}
	if len(line) > indent-2 {
		fmt.Fprintln(w, line)
		line = ""
	}
	for word := range strings.FieldsSeq(usage) {
		switch {
		case len(line) < indent:
			line += strings.Repeat(" ", indent-len(line)) + word
		case len(line)+1+len(word) > width:
			fmt.Fprintln(w, line)
			line = strings.Repeat(" ", indent) + word
		default:
			line += " " + word
		}
	}
	fmt.Fprintln(w, line)
}
