//go:build unix

package handover

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/tcptest"
)

// socketPair returns two connected sockets.
func socketPair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	syscall.ForkLock.RLock()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], conns[1]
}

// sameOpen runs f and fails if it leaves more or less files open than before. The garbage collector, which would close
// a forgotten file, rests meanwhile.
func sameOpen(t testing.TB, f func()) {
	t.Helper()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	before := tcptest.OpenFiles(t)
	f()
	if after := tcptest.OpenFiles(t); after != before {
		t.Errorf("%d files open, %d before", after, before)
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// pipes returns n pipes.
func pipes(t testing.TB, n int) (readers, writers []*os.File) {
	t.Helper()
	for range n {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		readers, writers = append(readers, r), append(writers, w)
	}
	return readers, writers
}

func some(t testing.TB, n int) []*os.File {
	t.Helper()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	files := make([]*os.File, n)
	for i := range files {
		files[i] = f
	}
	return files
}

type testState struct {
	Name  string
	Ports []int
}

// TestRoundTrip passes on the reading ends of pipes, closes its own and reads from those received what it had written
// into each.
func TestRoundTrip(t *testing.T) {
	for _, n := range []int{0, 1, 252, 253, 254, 300, 506, 1000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			a, b := socketPair(t)
			sameOpen(t, func() {
				sent, writers := pipes(t, n)
				state := testState{"relay", []int{22, n}}
				result := make(chan error, 1)
				go func() {
					result <- Send(a, state, sent)
					a.CloseWrite() // lets Receive end if Send failed
				}()

				var got testState
				files, err := Receive(b, &got)
				if err != nil {
					b.Close() // lets Send end
					t.Fatal(err, <-result)
				}
				select {
				case err := <-result:
					t.Fatalf("Send returned before Done: %v", err)
				default:
				}
				if err := Done(b, nil); err != nil {
					t.Error(err)
				}
				if err := <-result; err != nil {
					t.Errorf("Send: %v", err)
				}
				if !reflect.DeepEqual(got, state) {
					t.Errorf("state %v, want %v", got, state)
				}
				if len(files) != n {
					t.Fatalf("%d files, want %d", len(files), n)
				}
				for i, f := range sent {
					if err := f.Close(); err != nil { // still the sender's
						t.Errorf("file %d: %v", i, err)
					}
				}
				for i, w := range writers {
					if _, err := fmt.Fprint(w, "pipe ", i); err != nil {
						t.Fatal(err)
					}
					w.Close()
				}
				for i, f := range files {
					if err := f.SetReadDeadline(time.Time{}); err != nil {
						t.Errorf("file %d is no longer non-blocking: %v", i, err)
					}
					data, err := io.ReadAll(f)
					if want := fmt.Sprint("pipe ", i); string(data) != want || err != nil {
						t.Errorf("file %d: %q, %v, want %q", i, data, err, want)
					}
					f.Close()
				}
			})
		})
	}
}

// TestAgain: neither message takes anything of what follows it, so a connection carries several and other data between.
func TestAgain(t *testing.T) {
	a, b := socketPair(t)
	sent := some(t, 2)
	sameOpen(t, func() {
		for i := range 3 {
			go func() {
				if err := Send(a, i, sent[:i]); err != nil {
					t.Errorf("Send: %v", err)
				}
				io.WriteString(a, "next")
			}()
			var state int
			files, err := Receive(b, &state)
			if err != nil || state != i || len(files) != i {
				t.Fatalf("%d, %d files, %v, want %d", state, len(files), err, i)
			}
			closeAll(files)
			if err := Done(b, nil); err != nil {
				t.Fatal(err)
			}
			next := make([]byte, 4)
			if _, err := io.ReadFull(b, next); string(next) != "next" {
				t.Fatalf("%q, %v", next, err)
			}
		}
	})
}

// part is what one system call sends: data and files with its first byte.
type part struct {
	data  string
	files int
}

// offer returns the parts of an offer, as the protocol's description has them: this is the wire format, kept apart from
// the code that writes it.
func offer(state string, batches ...int) []part {
	parts := []part{{"relay-offer\x01" + string(binary.BigEndian.AppendUint32(nil, uint32(len(state)))) + state, 0}}
	for _, n := range batches {
		parts = append(parts, part{string([]byte{byte(n)}), n})
	}
	return append(parts, part{"\x00", 0})
}

// write sends parts.
func write(t testing.TB, conn *net.UnixConn, file *os.File, parts ...part) {
	t.Helper()
	for _, p := range parts {
		var rights []byte
		if p.files > 0 {
			fds := make([]int, p.files)
			for i := range fds {
				fds[i] = int(file.Fd())
			}
			rights = syscall.UnixRights(fds...)
		}
		if _, _, err := conn.WriteMsgUnix([]byte(p.data), rights, nil); err != nil {
			t.Fatal(err)
		}
	}
}

// pieces cuts parts into such of at most n bytes.
func pieces(parts []part, n int) []part {
	var all []part
	for _, p := range parts {
		for len(p.data) > n {
			all = append(all, part{p.data[:n], p.files})
			p.data, p.files = p.data[n:], 0
		}
		all = append(all, p)
	}
	return all
}

// TestFormat: what Send writes is the format of the description.
func TestFormat(t *testing.T) {
	a, b := socketPair(t)
	if err := writeOffer(a, []byte(`{"a":1}`), some(t, 260)); err != nil {
		t.Fatal(err)
	}
	a.Close()
	got, err := io.ReadAll(b)
	want := ""
	for _, p := range offer(`{"a":1}`, 253, 7) {
		want += p.data
	}
	if string(got) != want || err != nil {
		t.Errorf("sent %q, %v, want %q", got, err, want)
	}
}

// TestPieces: the offer comes in pieces of any one size, and its first part in two of any size. Data that follows at
// once is left to the next reader.
func TestPieces(t *testing.T) {
	a, b := socketPair(t)
	file := some(t, 1)[0]
	parts := offer(`"state"`, 1, 3)
	check := func(parts []part) {
		t.Helper()
		sameOpen(t, func() {
			write(t, a, file, parts[:len(parts)-1]...)
			write(t, a, file, part{"\x00next", 0})
			var state string
			files, err := Receive(b, &state)
			if err != nil || len(files) != 4 || state != "state" {
				t.Errorf("%q, %d files, %v", state, len(files), err)
			}
			closeAll(files)
			next := make([]byte, 5)
			if n, err := b.Read(next); string(next[:n]) != "next" {
				t.Fatalf("%q, %v follows", next[:n], err)
			}
		})
	}
	head := parts[0].data
	for n := 1; n < len(head); n++ {
		check(pieces(parts, n))
		check(append([]part{{head[:n], 0}, {head[n:], 0}}, parts[1:]...))
	}
}

// TestHangUp ends the offer after every number of bytes.
func TestHangUp(t *testing.T) {
	file := some(t, 1)[0]
	parts := pieces(offer(`{"Name":"relay"}`, 1, 253, 2), 1)
	for n := range parts {
		a, b := socketPair(t)
		sameOpen(t, func() {
			write(t, a, file, parts[:n]...)
			if err := a.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			var state testState
			files, err := Receive(b, &state)
			if !errors.Is(err, io.ErrUnexpectedEOF) || files != nil {
				t.Errorf("after %d bytes: %d files, %v", n, len(files), err)
			}
		})
		a.Close()
		b.Close()
	}
}

func TestBadOffer(t *testing.T) {
	const limit = 300
	file := some(t, 1)[0]
	good := offer(`"x"`, 2, 2)
	with := func(i int, p part) []part { // good with another part i
		parts := slices.Clone(good)
		parts[i] = p
		return parts
	}
	for _, test := range []struct {
		name  string
		parts []part
		want  string // in the error's text
	}{
		{"another protocol", []part{{"GET / HTTP/1.1\r\n\r\n", 0}}, `"GET / HTTP/"`},
		{"another protocol with files", []part{{"GET / HTTP/1.1\r\n\r\n", 9}}, "9 files where at most 0"},
		{"an answer", []part{{"relay-answer\x01\x00\x00\x00", 0}}, `"relay-answe"`},
		{"another version", []part{{"relay-offer\x02\x00\x00\x00\x00", 0}}, "version 2"},
		{"state too large", []part{{"relay-offer\x01\x04\x00\x00\x01", 0}}, "67108865 bytes"},
		{"state much too large", []part{{"relay-offer\x01\xff\xff\xff\xff", 0}}, "4294967295 bytes"},
		{"no state", offer(``, 2), "JSON"},
		{"state not JSON", offer(`{"a"`, 2), "JSON"},
		{"state of another type", offer(`{"a":1}`, 2), "cannot unmarshal"},
		{"files with the head", with(0, part{good[0].data, 3}), "3 files where at most 0"},
		{"files with the state", []part{{good[0].data[:16], 0}, {good[0].data[16:], 200}}, "200 files where at most 0"},
		{"no files", with(2, part{"\x02", 0}), "0 files came where the peer announced 2"},
		{"fewer files", with(2, part{"\x02", 1}), "1 files came where the peer announced 2"},
		{"more files", with(2, part{"\x02", 253}), "253 files came where the peer announced 2"},
		{"files with the end", with(3, part{"\x00", 1}), "1 files came where the peer announced 0"},
		{"too many files", offer(`"x"`, 253, 253), "506 files where at most 300"},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := socketPair(t)
			sameOpen(t, func() {
				write(t, a, file, test.parts...)
				a.CloseWrite()
				var state string
				files, err := receive(b, &state, limit)
				if err == nil || !strings.Contains(err.Error(), test.want) || files != nil {
					t.Errorf("%d files, %v, want an error with %q", len(files), err, test.want)
				}
			})
		})
	}
}

// TestOutOfDescriptors: the receiver may not open all the files that come. The last case, in which it just may, shows
// that the others are about what they say.
func TestOutOfDescriptors(t *testing.T) {
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	const files = 300
	for _, room := range []int{0, 1, 252, 253, 254, files - 1, files} {
		t.Run(fmt.Sprint(room), func(t *testing.T) {
			a, b := socketPair(t)
			file := some(t, 1)[0]
			sameOpen(t, func() {
				write(t, a, file, offer(`1`, 253, files-253)...)

				// The kernel gives out the lowest free number: these fill the gaps, and the last of them are the room.
				var fds []int
				for range 2 * files {
					fd, err := syscall.Dup(int(file.Fd()))
					if err != nil {
						t.Fatal(err)
					}
					fds = append(fds, fd)
				}
				full := len(fds) - room
				for _, fd := range fds[full:] {
					syscall.Close(fd)
				}
				low := was
				set(&low.Cur, fds[len(fds)-1]+1)
				if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low); err != nil {
					t.Fatal(err)
				}
				got, err := Receive(b, new(int))
				if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
					t.Fatal(err)
				}
				for _, fd := range fds[:full] {
					syscall.Close(fd)
				}
				if room == files {
					if err != nil || len(got) != files {
						t.Errorf("%d files, %v", len(got), err)
					}
				} else if err == nil || !strings.Contains(err.Error(), "files were lost") || got != nil {
					t.Errorf("%d files, %v", len(got), err)
				}
				closeAll(got)
			})
		})
	}
}

// set sets a field whose type is not the same on all systems.
func set[T int64 | uint64](field *T, n int) { *field = T(n) }

// TestDeadline: deadlines of the connection end every wait, also one that goes on, with some of the files received.
func TestDeadline(t *testing.T) {
	past := time.Unix(1, 0)
	a, b := socketPair(t)
	files := some(t, 1)
	sameOpen(t, func() {
		write(t, a, files[0], offer(`1`, 2, 253)[:3]...)
		result := make(chan error)
		go func() {
			_, err := Receive(b, new(int))
			result <- err
		}()
		b.SetReadDeadline(past)
		if err := <-result; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Receive: %v", err)
		}
		b.SetWriteDeadline(past)
		if err := Done(b, nil); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Done: %v", err)
		}
		a.SetReadDeadline(past) // no wait for the answer
		if err := Send(a, 1, files); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Send, waiting for the answer: %v", err)
		}
		a.SetWriteDeadline(past)
		if err := Send(a, 1, files); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Send: %v", err)
		}
	})
}

func TestRefused(t *testing.T) {
	for _, test := range []struct{ reason, want string }{
		{"no room", "no room"},
		{"", ""},
		{"two\nlines", "two\nlines"},
		{strings.Repeat("a", 1024), strings.Repeat("a", 1024)},
		{strings.Repeat("a", 1<<20), strings.Repeat("a", 1024)},
		{"a" + strings.Repeat("é", 1000), "a" + strings.Repeat("é", 511)},
	} {
		a, b := socketPair(t)
		files := some(t, 300)
		sameOpen(t, func() {
			if err := Done(b, errors.New(test.reason)); err != nil {
				t.Fatal(err)
			}
			err := Send(a, 1, files)
			if got, ok := errors.AsType[refusal](err); !ok || string(got) != test.want {
				t.Errorf("%v, want the reason %q", err, test.want)
			}
			if want := fmt.Sprintf("%q", test.want); err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%v does not say %s", err, want)
			}
		})
	}
}

// TestRefusedEarly: the successor does not read the offer, which is more than the socket's buffer takes, but refuses and
// hangs up. Its reason is not lost.
func TestRefusedEarly(t *testing.T) {
	a, b := socketPair(t)
	result := make(chan error, 1)
	go func() { result <- Send(a, strings.Repeat("a", 8<<20), some(t, 1)) }()
	if _, err := io.ReadFull(b, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := Done(b, errors.New("no room")); err != nil {
		t.Fatal(err)
	}
	b.Close()
	if err := <-result; err == nil || !strings.Contains(err.Error(), "no room") {
		t.Error(err)
	}

	a, b = socketPair(t)
	b.Close()
	if err := Send(a, 1, nil); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("hung up without an answer: %v", err)
	}
}

func TestBadAnswer(t *testing.T) {
	file := some(t, 1)[0]
	for _, test := range []struct {
		name string
		part part
		want string // in the error's text
	}{
		{"another protocol", part{"HTTP/1.1 400 Bad Request\r\n\r\n", 0}, `"HTTP/1.1 400"`},
		{"an offer", part{"relay-offer\x01\x00\x00\x00\x00", 0}, `"relay-offer\x01"`},
		{"another version", part{"relay-answer\x00\x00\x00\x00", 0}, "version 0"},
		{"another status", part{"relay-answer\x01\x02\x00\x00", 0}, "status 2"},
		{"taken for a reason", part{"relay-answer\x01\x00\x00\x01a", 0}, "a reason of 1 bytes"},
		{"reason too long", part{"relay-answer\x01\x01\x04\x01" + strings.Repeat("a", 1025), 0}, "a reason of 1025 bytes"},
		{"files", part{"relay-answer\x01\x00\x00\x00", 5}, "5 files where at most 0"},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := socketPair(t)
			sameOpen(t, func() {
				write(t, b, file, test.part)
				err := Send(a, 1, nil)
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%v, want an error with %q", err, test.want)
				}
			})
		})
	}
	answer := "relay-answer\x01\x01\x00\x07no room"
	for n := range len(answer) {
		a, b := socketPair(t)
		sameOpen(t, func() {
			write(t, b, file, pieces([]part{{answer, 0}}, 1)[:n]...)
			b.CloseWrite()
			if err := Send(a, 1, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("hung up after %d bytes: %v", n, err)
			}
		})
	}
}

func TestCannotSend(t *testing.T) {
	closed, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	file := some(t, 1)[0]
	for _, test := range []struct {
		name  string
		state any
		files []*os.File
		want  string // in the error's text
		sent  string // before the error was found
	}{
		{"not JSON", func() {}, nil, "unsupported type", ""},
		{"state too large", strings.Repeat("a", maxState-1), nil, "67108865 bytes", ""},
		{"too many files", 1, some(t, maxFiles+1), "1048577 files", ""},
		{"closed file", 1, []*os.File{file, closed}, "closed file", offer("1")[0].data},
		{"nil file", 1, []*os.File{file, nil}, os.ErrInvalid.Error(), offer("1")[0].data},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := socketPair(t)
			b.CloseWrite() // no answer will come
			sameOpen(t, func() {
				err := Send(a, test.state, test.files)
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%v, want an error with %q", err, test.want)
				}
			})
			a.Close()
			if sent, err := io.ReadAll(b); string(sent) != test.sent || err != nil {
				t.Errorf("sent %q, %v, want %q", sent, err, test.sent)
			}
		})
	}
}

// TestLargestState: a state of exactly 64 MiB is read to its end. It is not JSON: to parse so much takes long.
func TestLargestState(t *testing.T) {
	a, b := socketPair(t)
	written := make(chan error, 1)
	go func() { written <- writeOffer(a, make([]byte, maxState), nil) }()
	defer b.Close()
	if _, err := Receive(b, new(any)); err == nil {
		t.Error("received what is not JSON")
	} else if _, ok := errors.AsType[*json.SyntaxError](err); !ok {
		t.Error(err)
	}
	rest := make([]byte, 2)
	if n, err := b.Read(rest); string(rest[:n]) != "\x00" {
		t.Fatalf("%q, %v, want the end of the offer", rest[:n], err)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
}

// FuzzReceive receives data that is sent in pieces: cuts says, in turns, how long a piece is and how many files come
// with it.
func FuzzReceive(f *testing.F) {
	f.Add("", []byte(nil))
	for _, parts := range [][]part{
		offer(`{"Name":"relay","Ports":[1,2]}`),
		offer(`null`, 1),
		offer(`{}`, 3, 250, 1),
		pieces(offer(`{"Name":"relay"}`, 2), 5),
	} {
		data, cuts := "", []byte(nil)
		for _, p := range parts {
			data += p.data
			cuts = append(cuts, byte(len(p.data)), byte(p.files))
		}
		f.Add(data, cuts)
	}
	file := some(f, 1)[0]
	f.Fuzz(func(t *testing.T, data string, cuts []byte) {
		if len(data) > 1<<12 || len(cuts) > 1<<6 { // what the socket's buffer takes
			return
		}
		a, b := socketPair(t)
		sameOpen(t, func() {
			sent := 0
			for len(data) > 0 {
				p := part{data: data}
				if len(cuts) > 1 {
					n := min(max(int(cuts[0]), 1), len(data))
					p = part{data[:n], min(int(cuts[1]), 253)}
					cuts = cuts[2:]
				}
				data = data[len(p.data):]
				sent += p.files
				write(t, a, file, p)
			}
			a.CloseWrite()
			var state testState
			files, err := Receive(b, &state)
			defer closeAll(files)
			if err != nil {
				if files != nil {
					t.Errorf("%d files and %v", len(files), err)
				}
				return
			}
			// What was understood can be sent and received again.
			for i, f := range files {
				if _, err := f.Stat(); err != nil || i >= sent {
					t.Fatalf("file %d of %d sent: %v", i, sent, err)
				}
			}
			c, d := socketPair(t)
			if err := Done(d, nil); err != nil {
				t.Fatal(err)
			}
			if err := Send(c, state, files); err != nil {
				t.Fatal(err)
			}
			var again testState
			files2, err := Receive(d, &again)
			if err != nil || len(files2) != len(files) || !reflect.DeepEqual(state, again) {
				t.Errorf("%v, %d files, %v, want %v, %d files", again, len(files2), err, state, len(files))
			}
			closeAll(files2)
			c.Close()
			d.Close()
		})
	})
}
