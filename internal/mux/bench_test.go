package mux

import (
	"fmt"
	"io"
	"sync"
	"testing"
)

// benchSessions returns two sessions over a TCP connection.
func benchSessions(b *testing.B) (client, server *Session) {
	c1, c2 := tcpPair(b)
	client, server = sessionPair(b, c1, c2, Config{})
	client.EnableStop()
	server.EnableStop()
	return client, server
}

// echoAll sends the bytes of each stream that s accepts back.
func echoAll(s *Session) {
	for st := range acceptedBy(s) {
		go func() {
			io.Copy(st, st)
			st.Close()
		}()
	}
}

// BenchmarkBulk carries a MiB at a time through streams that share a session.
func BenchmarkBulk(b *testing.B) {
	for _, streams := range []int{1, 16} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			client, server := benchSessions(b)
			var writers []*Stream
			for range streams {
				w, r := streamPair(b, client, server)
				go r.WriteTo(io.Discard)
				writers = append(writers, w)
			}
			p := make([]byte, 1<<20/streams)
			b.SetBytes(int64(len(p) * streams))
			b.ReportAllocs()
			for b.Loop() {
				var all sync.WaitGroup
				for _, w := range writers[1:] {
					all.Go(func() { w.Write(p) })
				}
				if _, err := writers[0].Write(p); err != nil {
					b.Fatal(err)
				}
				all.Wait()
			}
		})
	}
}

// ping sends 64 bytes to and fro.
func ping(b *testing.B, st *Stream, p []byte) {
	if _, err := st.Write(p); err != nil {
		b.Error(err)
	}
	if _, err := io.ReadFull(st, p); err != nil {
		b.Error(err)
	}
}

// BenchmarkPing sends 64 bytes to and fro on one stream.
func BenchmarkPing(b *testing.B) {
	client, server := benchSessions(b)
	go echoAll(server)
	st := openStream(b, client)
	p := make([]byte, 64)
	b.SetBytes(2 * 64)
	b.ReportAllocs()
	for b.Loop() {
		ping(b, st, p)
	}
}

// BenchmarkPings sends 64 bytes to and fro on each of 64 streams at once. One ping is
// one operation.
func BenchmarkPings(b *testing.B) {
	client, server := benchSessions(b)
	go echoAll(server)
	var all sync.WaitGroup
	turns := make(chan struct{}, 64)
	for range cap(turns) {
		st := openStream(b, client)
		all.Go(func() {
			p := make([]byte, 64)
			for range turns {
				ping(b, st, p)
			}
		})
	}
	b.SetBytes(2 * 64)
	b.ReportAllocs()
	for b.Loop() {
		turns <- struct{}{}
	}
	close(turns)
	all.Wait()
}

// BenchmarkOpenEchoClose opens a stream, sends 64 bytes to and fro and closes it.
func BenchmarkOpenEchoClose(b *testing.B) {
	client, server := benchSessions(b)
	go echoAll(server)
	p := make([]byte, 64)
	b.SetBytes(2 * 64)
	b.ReportAllocs()
	for b.Loop() {
		st := openStream(b, client)
		ping(b, st, p)
		if err := st.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
