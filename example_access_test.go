package relay_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"sync/atomic"

	"github.com/tcprelay/relay"
)

// Only who has a token may register. Each call of WithTokens is an owner of names and
// ports; the tokens of one call are as good as each other.
func ExampleWithTokens() {
	srv, addr := runRelay(
		relay.WithTokens("the web team's", "the web team's next one"), // long and random ones, elsewhere
		relay.WithTokens("the shop's"),
	)
	defer srv.Close()

	register := func(token string) (*relay.Listener, error) {
		return relay.Register(context.Background(), addr, relay.WithName("web"), relay.WithToken(token))
	}
	ln, err := register("the web team's")
	fmt.Println("registered:", err == nil)
	defer ln.Close()
	for _, token := range []string{"a guess", "the shop's"} {
		_, err := register(token)
		if refused, ok := errors.AsType[*relay.RegisterError](err); ok {
			fmt.Printf("with %s: %s\n", token, refused.Code)
		}
	}

	// Output:
	// registered: true
	// with a guess: unauthorized
	// with the shop's: name_taken
}

// Tokens that can be taken away: the relay asks a function of yours, and Reauthorize has
// it asked again about those who are there.
func ExampleServer_Reauthorize() {
	var current atomic.Value // what is asked now
	set := func(tokens ...string) {
		authorize, err := relay.TokenAuthorizer(map[string][]string{"the web team": tokens})
		if err != nil {
			log.Fatal(err)
		}
		current.Store(authorize)
	}
	set("old", "new")
	srv, addr := runRelay(relay.WithAuthorizer(func(ctx context.Context, r relay.Registration) (relay.Grant, error) {
		return current.Load().(func(context.Context, relay.Registration) (relay.Grant, error))(ctx, r)
	}))
	defer srv.Close()
	var apps []*relay.Listener
	for _, token := range []string{"old", "new"} {
		ln, err := relay.Register(context.Background(), addr, relay.WithToken(token))
		if err != nil {
			log.Fatal(err)
		}
		defer ln.Close()
		apps = append(apps, ln)
	}

	set("new")
	if err := srv.Reauthorize(context.Background()); err != nil {
		log.Fatal(err)
	}
	_, err := apps[0].Accept()
	if gone, ok := errors.AsType[*relay.RegisterError](err); ok {
		fmt.Println("the app with the old token:", gone.Code)
	}
	fmt.Println("the other one is connected:", apps[1].Stats().Connected)

	// Output:
	// the app with the old token: unauthorized
	// the other one is connected: true
}

// A relay without a certificate that anybody vouches for is known by its key.
func ExampleWithPin() {
	certificate, _ := certificateFor("whatever") // relayd -tls-self makes one, and prints the pin
	srv, addr := runRelay(relay.WithTLSConfig(&tls.Config{Certificates: []tls.Certificate{certificate}}))
	defer srv.Close()
	pin := relay.Pin(certificate.Leaf)

	ln, err := relay.Register(context.Background(), addr, relay.WithPin(pin))
	if err != nil {
		log.Fatal(err)
	}
	ln.Close()
	fmt.Println("registered at the relay with the key")

	another, _ := certificateFor("whatever")
	_, err = relay.Register(context.Background(), addr, relay.WithPin(relay.Pin(another.Leaf)))
	if failed, ok := errors.AsType[*relay.RegisterError](err); ok {
		fmt.Println("with another pin:", failed.Code)
	}

	// Output:
	// registered at the relay with the key
	// with another pin: tls
}
