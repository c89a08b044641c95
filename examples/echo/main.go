// Command echo is the smallest service: it registers at a relay, prints its public
// address and sends every client back what it sends.
//
//	go run github.com/tcprelay/relay/examples/echo -relay 127.0.0.1:8080
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"

	"github.com/tcprelay/relay"
)

func main() {
	at := flag.String("relay", "127.0.0.1:8080", "`address` of the relay")
	flag.Parse()
	if flag.NArg() > 0 {
		log.Fatalf("unexpected argument %q", flag.Arg(0))
	}

	ln, err := relay.Register(context.Background(), *at)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(ln.Addr())
	for {
		c, err := ln.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
		}()
	}
}
