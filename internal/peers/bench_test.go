package peers

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkRelay measures the same jobs over every contender. Clients, relay, agent
// and app share one process and its cores, so a figure is a comparison, not a speed
// limit. The names let benchstat set contenders side by side:
//
//	go test -run '^$' -bench Relay -count 6 > new && benchstat -col /via new
//
// cmd/table runs them interleaved and prints the medians as a table.
func BenchmarkRelay(b *testing.B) {
	for _, job := range []struct {
		name  string
		size  string // what the number counts
		sizes []int
		run   func(b *testing.B, c contender, n int)
	}{
		{"bulkUp", "conns", []int{1, 16}, benchBulkUp},
		{"bulkDown", "conns", []int{1, 16}, benchBulkDown},
		{"roundTrip", "conns", []int{1, 64}, benchRoundTrip},
		{"connect", "workers", []int{16}, benchConnect},
		{"idle", "conns", []int{1000}, benchIdle},
	} {
		b.Run(job.name, func(b *testing.B) {
			for _, n := range job.sizes {
				b.Run(fmt.Sprintf("%s=%d", job.size, n), func(b *testing.B) {
					for _, c := range contenders {
						b.Run("via="+c.name, func(b *testing.B) {
							b.ReportAllocs()
							job.run(b, c, n)
						})
					}
				})
			}
		})
	}
}

const (
	bulkUnit    = 1 << 20  // bytes per operation of the bulk jobs
	bulkChunk   = 64 << 10 // bytes per Read and Write of client and app
	messageSize = 64       // bytes of a round trip
)

// benchBulkUp sends from clients to the app. The app confirms the count, so that
// bytes still under way when the client has written its last are not taken for
// carried.
func benchBulkUp(b *testing.B, c contender, conns int) {
	benchBulk(b, c, conns, takeBulk, func(conn net.Conn, size int64, buf []byte) error {
		if err := writeSize(conn, size); err != nil {
			return err
		}
		if err := writeZeros(conn, size, buf); err != nil {
			return err
		}
		got, err := readSize(conn)
		if err == nil && got != size {
			err = fmt.Errorf("app counted %d bytes of %d", got, size)
		}
		return err
	})
}

// benchBulkDown sends from the app to clients that asked for so many bytes.
func benchBulkDown(b *testing.B, c contender, conns int) {
	benchBulk(b, c, conns, giveBulk, func(conn net.Conn, size int64, buf []byte) error {
		if err := writeSize(conn, size); err != nil {
			return err
		}
		return readExactly(conn, size, buf)
	})
}

func benchBulk(b *testing.B, c contender, conns int, app func(net.Conn), client func(net.Conn, int64, []byte) error) {
	tun := startBench(b, c, app)
	clients := dialBench(b, tun, conns, func(conn net.Conn) error {
		return client(conn, 1, make([]byte, 1))
	})
	bufs := make([][]byte, conns)
	for i := range bufs {
		bufs[i] = make([]byte, bulkChunk)
	}
	b.SetBytes(bulkUnit)
	b.ResetTimer()
	shareOut(b, conns, func(i, units int) error {
		return client(clients[i], int64(units)*bulkUnit, bufs[i])
	})
	b.StopTimer()
}

// benchRoundTrip sends a small message to and fro; the conns' trips add up.
func benchRoundTrip(b *testing.B, c contender, conns int) {
	tun := startBench(b, c, echoMessages)
	clients := dialBench(b, tun, conns, func(conn net.Conn) error {
		return roundTrip(conn, make([]byte, messageSize))
	})
	b.ResetTimer()
	shareOut(b, conns, func(i, trips int) error {
		msg := make([]byte, messageSize)
		for range trips {
			if err := roundTrip(clients[i], msg); err != nil {
				return err
			}
		}
		return nil
	})
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "trips/s")
}

// benchConnect has workers connect, exchange one message and close, over and over.
// It counts a conn when the app has seen its end, not when the client has gone:
// else the work of ending could be put off beyond the measurement.
func benchConnect(b *testing.B, c contender, workers int) {
	var ended sync.WaitGroup
	ended.Add(b.N)
	var bad atomic.Int64
	tun := startBench(b, c, func(conn net.Conn) {
		defer ended.Done()
		var msg [messageSize]byte
		if _, err := io.ReadFull(conn, msg[:]); err != nil {
			bad.Add(1)
			return
		}
		conn.Write(msg[:])
		if n, err := conn.Read(msg[:]); n != 0 || err != io.EOF {
			bad.Add(1)
		}
	})
	b.ResetTimer()
	shareOut(b, workers, func(_, conns int) error {
		msg := make([]byte, messageSize)
		for range conns {
			if err := connectOnce(tun.addr, msg); err != nil {
				return err
			}
		}
		return nil
	})
	if b.Failed() {
		return // some never reached the app
	}
	ended.Wait()
	b.StopTimer()
	if n := bad.Load(); n > 0 {
		b.Errorf("%d of %d conns did not end as they should at the app", n, b.N)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "conns/s")
}

func connectOnce(addr string, msg []byte) error {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	return roundTrip(conn, msg)
}

// benchIdle measures the memory that open conns hold when nothing happens on them
// any more. Each has carried one message, as idle conns have. Client and app are
// in the figure too, the same for every contender; and so is what a contender's
// copying holds while it waits for bytes.
func benchIdle(b *testing.B, c contender, conns int) {
	var total int64
	rounds := 0
	for b.Loop() {
		total += idleBytes(b, c, conns)
		rounds++
	}
	b.ReportMetric(float64(total)/float64(rounds*conns), "B/conn")
}

func idleBytes(b *testing.B, c contender, conns int) int64 {
	tun, err := c.start(echoMessages)
	if err != nil {
		b.Fatal(err)
	}
	defer tun.close()
	before := memoryInUse()
	clients := make([]net.Conn, conns)
	msg := make([]byte, messageSize)
	for i := range clients {
		conn, err := net.Dial("tcp", tun.addr)
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		clients[i] = conn
		if err := roundTrip(conn, msg); err != nil {
			b.Fatal(err)
		}
	}
	after := memoryInUse()
	runtime.KeepAlive(clients)
	return after - before
}

// memoryInUse collects twice, because what a sync.Pool holds survives one.
func memoryInUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// startBench starts a contender for the length of the benchmark.
func startBench(b *testing.B, c contender, app func(net.Conn)) *tunnel {
	b.Helper()
	tun, err := c.start(app)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(tun.close)
	return tun
}

// dialBench connects n clients, each of which has had an answer to hello when it
// returns. They are closed before the tunnel is.
func dialBench(b *testing.B, tun *tunnel, n int, hello func(net.Conn) error) []net.Conn {
	b.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		conn, err := net.Dial("tcp", tun.addr)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(patience))
		if err := hello(conn); err != nil {
			b.Fatal(err)
		}
		conns[i] = conn
	}
	return conns
}

// shareOut divides b.N operations among the workers and waits for them. The
// first error of a worker ends its share and fails the benchmark.
func shareOut(b *testing.B, workers int, work func(worker, ops int) error) {
	var wg sync.WaitGroup
	for i := range workers {
		ops := b.N / workers
		if i < b.N%workers {
			ops++
		}
		if ops == 0 {
			continue
		}
		wg.Go(func() {
			if err := work(i, ops); err != nil {
				b.Errorf("worker %d: %v", i, err)
			}
		})
	}
	wg.Wait()
}

// takeBulk is the app of benchBulkUp.
func takeBulk(conn net.Conn) {
	buf := make([]byte, bulkChunk)
	for {
		size, err := readSize(conn)
		if err != nil || readExactly(conn, size, buf) != nil || writeSize(conn, size) != nil {
			return
		}
	}
}

// giveBulk is the app of benchBulkDown.
func giveBulk(conn net.Conn) {
	buf := make([]byte, bulkChunk)
	for {
		size, err := readSize(conn)
		if err != nil || writeZeros(conn, size, buf) != nil {
			return
		}
	}
}

// echoMessages answers every message with itself.
func echoMessages(conn net.Conn) {
	var msg [messageSize]byte
	for {
		if _, err := io.ReadFull(conn, msg[:]); err != nil {
			return
		}
		if _, err := conn.Write(msg[:]); err != nil {
			return
		}
	}
}

// echoAll answers a stream of bytes with itself.
func echoAll(conn net.Conn) { io.Copy(conn, conn) }

func roundTrip(conn net.Conn, msg []byte) error {
	if _, err := conn.Write(msg); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, msg)
	return err
}

func writeSize(conn net.Conn, n int64) error {
	_, err := conn.Write(binary.BigEndian.AppendUint64(nil, uint64(n)))
	return err
}

func readSize(conn net.Conn) (int64, error) {
	var p [8]byte
	_, err := io.ReadFull(conn, p[:])
	return int64(binary.BigEndian.Uint64(p[:])), err
}

// writeZeros writes n bytes, readExactly reads as many, in steps of buf.
func writeZeros(conn net.Conn, n int64, buf []byte) error {
	for n > 0 {
		k, err := conn.Write(buf[:min(n, int64(len(buf)))])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}

func readExactly(conn net.Conn, n int64, buf []byte) error {
	for n > 0 {
		k, err := conn.Read(buf[:min(n, int64(len(buf)))])
		n -= int64(k)
		if err != nil && n > 0 {
			return err
		}
	}
	return nil
}
