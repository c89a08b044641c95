package relay_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/rpc"

	"github.com/tcprelay/relay"
)

// Arith is a service of package net/rpc.
type Arith struct{}

// Multiply is a method of it.
func (Arith) Multiply(args [2]int, product *int) error {
	*product = args[0] * args[1]
	return nil
}

// A server that takes a net.Listener takes this one. Here it is net/rpc's; with gRPC the
// line is grpcServer.Serve(ln).
func Example_rpc() {
	srv, addr := runRelay()
	defer srv.Close()
	ln, err := relay.Register(context.Background(), addr)
	if err != nil {
		log.Fatal(err)
	}
	server := rpc.NewServer()
	if err := server.Register(Arith{}); err != nil {
		log.Fatal(err)
	}
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return // after Close; server.Accept would log it
			}
			go server.ServeConn(conn)
		}
	}()
	defer ln.Close()

	client, err := rpc.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	var product int
	err = client.Call("Arith.Multiply", [2]int{6, 7}, &product)
	fmt.Println(product, err)

	// Output:
	// 42 <nil>
}

// TLS that clients speak ends in the app: the certificate is the app's, and the relay sees
// nothing but what is encrypted.
func Example_tlsInTheApp() {
	srv, addr := runRelay()
	defer srv.Close()
	ln, err := relay.Register(context.Background(), addr)
	if err != nil {
		log.Fatal(err)
	}
	certificate, roots := certificateFor("app.example") // or autocert's, or srv.ServeTLS with files
	app := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "for the eyes of the client:", r.TLS != nil)
	})}
	go app.Serve(tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{certificate}}))
	defer app.Close()

	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "app.example"},
	}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("https://" + ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	fmt.Print(string(body), err)

	// Output:
	// for the eyes of the client: true
	// <nil>
}

// An app is replaced by its next version: both have the name, and the old one drains.
func ExampleWithShared() {
	srv, addr := runRelay()
	defer srv.Close()
	start := func(version string) (*relay.Listener, *http.Server) {
		ln, err := relay.Register(context.Background(), addr, relay.WithName("web"), relay.WithShared())
		if err != nil {
			log.Fatal(err)
		}
		app := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintln(w, "version", version)
		})}
		go app.Serve(ln)
		return ln, app
	}
	ask := func(ln net.Listener) {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Get("http://" + ln.Addr().String())
		if err != nil {
			log.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		fmt.Print(string(body))
	}
	ln1, app1 := start("1")
	ask(ln1)

	ln2, app2 := start("2")
	defer app2.Close()
	fmt.Println("one address:", ln1.Addr().String() == ln2.Addr().String())
	ctx := context.Background()
	ln1.Drain(ctx) // new clients go to the other one
	app1.Shutdown(ctx)
	<-ln1.Done() // what was answered has arrived
	ask(ln2)

	// Output:
	// version 1
	// one address: true
	// version 2
}

// Events tell what happens between a listener and the relay, here to an app that is
// disconnected by the relay's operator.
func ExampleWithEvents() {
	srv, addr := runRelay()
	defer srv.Close()
	ln, err := relay.Register(context.Background(), addr, relay.WithName("web"),
		relay.WithEvents(func(ev relay.Event) {
			fmt.Println(ev.Service, ev.Kind)
		}))
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	if err := srv.Disconnect("web"); err != nil {
		log.Fatal(err)
	}
	<-ln.Done()

	// Output:
	// web registered
	// web lost
	// web ended
}
