package mux

import (
	"bytes"
	"crypto/sha256"
	"io"
	"net"
	"testing"
)

func tcpPair(t testing.TB) (net.Conn, net.Conn) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c1, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c2, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c1, c2
}

func TestSmoke(t *testing.T) {
	for _, tr := range []string{"tcp", "pipe"} {
		t.Run(tr, func(t *testing.T) {
			c1, c2 := net.Pipe()
			if tr == "tcp" {
				c1, c2 = tcpPair(t)
			}
			a, b := Client(c1, Config{}), Server(c2, Config{})
			defer a.Close()
			defer b.Close()
			st, err := a.Open([]byte("hi"))
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				for {
					st, err := b.Accept()
					if err != nil {
						return
					}
					go func() { io.Copy(st, st); st.CloseWrite() }()
				}
			}()
			data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
			go func() { st.Write(data); st.CloseWrite() }()
			got, err := io.ReadAll(st)
			if err != nil {
				t.Fatal(err)
			}
			if sha256.Sum256(got) != sha256.Sum256(append([]byte("hi"), data...)) {
				t.Fatal("differs", len(got))
			}
		})
	}
}

func BenchmarkBulk(b *testing.B) {
	c1, c2 := tcpPair(b)
	s1, s2 := Client(c1, Config{}), Server(c2, Config{})
	defer s1.Close()
	defer s2.Close()
	st, _ := s1.Open(nil)
	st2, err := s2.Accept()
	if err != nil {
		b.Fatal(err)
	}
	go st2.WriteTo(io.Discard)
	p := make([]byte, 1<<20)
	b.SetBytes(1 << 20)
	b.ReportAllocs()
	for b.Loop() {
		st.Write(p)
	}
}

func BenchmarkPing(b *testing.B) {
	c1, c2 := tcpPair(b)
	s1, s2 := Client(c1, Config{}), Server(c2, Config{})
	defer s1.Close()
	defer s2.Close()
	st, _ := s1.Open(nil)
	st2, err := s2.Accept()
	if err != nil {
		b.Fatal(err)
	}
	go io.Copy(st2, st2)
	p := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		st.Write(p)
		io.ReadFull(st, p)
	}
}
