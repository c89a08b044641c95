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
	"time"
)

// Flags are those of a program. Each can be given in the environment too, by the name of
// the program and the flag: -tls-self of relayd is RELAYD_TLS_SELF. The command line goes
// first, and an empty variable is none. Only -version is the command line's alone.
type Flags struct {
	set    *flag.FlagSet
	intro  string
	groups []group
}

// A group is the flags under one heading, in the order of their definition.
type group struct {
	title string
	names []string
}

// New returns the flags of a program, which has none yet. Intro is how its help begins.
func New(program, intro string) *Flags {
	f := &Flags{set: flag.NewFlagSet(program, flag.ContinueOnError), intro: intro}
	f.set.SetOutput(io.Discard) // Tell says it
	f.set.Usage = func() {}
	return f
}

// Group begins a heading of the help, for the flags that are defined from here on.
func (f *Flags) Group(title string) { f.groups = append(f.groups, group{title: title}) }

// Var defines a flag, as that of package flag does, and so do those below.
func (f *Flags) Var(v flag.Value, name, usage string) {
	f.set.Var(v, name, usage)
	f.enter(name)
}

func (f *Flags) StringVar(p *string, name, value, usage string) {
	f.set.StringVar(p, name, value, usage)
	f.enter(name)
}

func (f *Flags) BoolVar(p *bool, name string, value bool, usage string) {
	f.set.BoolVar(p, name, value, usage)
	f.enter(name)
}

func (f *Flags) IntVar(p *int, name string, value int, usage string) {
	f.set.IntVar(p, name, value, usage)
	f.enter(name)
}

func (f *Flags) Uint64Var(p *uint64, name string, value uint64, usage string) {
	f.set.Uint64Var(p, name, value, usage)
	f.enter(name)
}

func (f *Flags) Float64Var(p *float64, name string, value float64, usage string) {
	f.set.Float64Var(p, name, value, usage)
	f.enter(name)
}

func (f *Flags) DurationVar(p *time.Duration, name string, value time.Duration, usage string) {
	f.set.DurationVar(p, name, value, usage)
	f.enter(name)
}

func (f *Flags) enter(name string) {
	last := &f.groups[len(f.groups)-1]
	last.names = append(last.names, name)
}

// ParseOrExit parses the command line and the environment. Asked for help it prints that
// and exits; for what it does not understand the exit status is 2.
func (f *Flags) ParseOrExit() {
	if err := f.Parse(os.Args[1:], os.LookupEnv); err != nil {
		f.Exit(err)
	}
}

// Exit ends a program that was not called as it should be.
func (f *Flags) Exit(err error) { os.Exit(f.Tell(err, os.Stdout, os.Stderr)) }

// Tell says what Parse has found, or what is wrong with the flags it has parsed, and
// returns the exit status: the help on stdout is what was asked for, and all else an error.
func (f *Flags) Tell(err error, stdout, stderr io.Writer) (status int) {
	if errors.Is(err, flag.ErrHelp) {
		f.Help(stdout)
		return 0
	}
	fmt.Fprintf(stderr, "%s: %v\n\"%[1]s -h\" lists the flags.\n", f.set.Name(), err)
	return 2
}

// Parse parses a command line and what lookup finds in the environment.
func (f *Flags) Parse(args []string, lookup func(string) (string, bool)) error {
	if err := f.set.Parse(args); err != nil {
		return err
	}
	if f.set.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", f.set.Arg(0))
	}
	var err error
	f.set.VisitAll(func(fl *flag.Flag) {
		if err != nil || f.Given(fl.Name) || fl.Name == "version" { // which is no setting, and the images of containers have such a variable
			return
		}
		variable := f.variable(fl.Name)
		value, ok := lookup(variable)
		if !ok || value == "" || injected(variable, value) {
			return
		}
		if e := f.Set(fl.Name, value); e != nil {
			err = fmt.Errorf("invalid value %q in the environment's %s: %w", value, variable, e)
		}
	})
	return err
}

// Set sets a flag to what the environment has for it.
func (f *Flags) Set(name, value string) error {
	if fl := f.set.Lookup(name); fl != nil {
		if several, ok := fl.Value.(severals); ok {
			return several.SetAll(value)
		}
	}
	return f.set.Set(name, value)
}

// injected reports whether a variable is not meant for the program: in a container of
// Kubernetes a Service that is called as the program is has its address in, say,
// FORWARD_PORT, as tcp://10.0.0.1:80.
func injected(variable, value string) bool {
	return strings.HasSuffix(variable, "_PORT") && strings.Contains(value, "://")
}

// Given reports whether a flag was given, on the command line or in the environment.
func (f *Flags) Given(name string) (given bool) {
	f.set.Visit(func(fl *flag.Flag) { given = given || fl.Name == name })
	return given
}

// variable returns the environment's name for a flag.
func (f *Flags) variable(name string) string {
	return strings.ToUpper(strings.ReplaceAll(f.set.Name()+"_"+name, "-", "_"))
}

// Severals is a flag.Value that may be given several times, and takes all of them at once
// from the environment.
type severals interface {
	flag.Value
	SetAll(string) error
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

// SetAll appends those of s.
func (l *List) SetAll(s string) error {
	for one := range strings.SplitSeq(s, ",") {
		if err := l.Set(one); err != nil {
			return err
		}
	}
	return nil
}

// What a line of the help has room for, and where its text begins.
const (
	width  = 80
	indent = 24
)

// Help prints the help.
func (f *Flags) Help(w io.Writer) {
	fmt.Fprintf(w, "%s\n", strings.TrimSpace(f.intro))
	var lists []string
	for _, g := range f.groups {
		fmt.Fprintf(w, "\n%s:\n", g.title)
		for _, name := range g.names {
			fl := f.set.Lookup(name)
			if _, ok := fl.Value.(*List); ok {
				lists = append(lists, "-"+name)
			}
			f.describe(w, fl)
		}
	}
	first := f.groups[0].names[0]
	fmt.Fprintf(w, "\nThe environment can give each flag too, -%s as %s.\n", first, f.variable(first))
	if len(lists) > 0 {
		fmt.Fprintf(w, "Several values of %s have commas between them there.\n", strings.Join(lists, " or "))
	}
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
