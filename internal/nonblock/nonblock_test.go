//go:build unix

package nonblock

import (
	"io"
	"os"
	"syscall"
	"testing"
)

// Calls move what there is, and do not wait for more.
func TestReadWrite(t *testing.T) {
	var fds [2]int
	if err := syscall.Pipe(fds[:]); err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		syscall.CloseOnExec(fd)
		if err := syscall.SetNonblock(fd, true); err != nil {
			t.Fatal(err)
		}
	}
	r, w := uintptr(fds[0]), uintptr(fds[1])
	b := make([]byte, 10)
	if n, err := Read(r, b); n != 0 || err != syscall.EAGAIN {
		t.Errorf("Read of an empty pipe: %d, %v", n, err)
	}
	if n, err := Write(w, []byte("relay")); n != 5 || err != nil {
		t.Errorf("Write: %d, %v", n, err)
	}
	if n, err := Read(r, b); string(b[:n]) != "relay" || err != nil {
		t.Errorf("Read: %q, %v", b[:n], err)
	}
	if n, err := Read(r, nil); n != 0 || err != nil && err != syscall.EAGAIN {
		t.Errorf("Read of nothing: %d, %v", n, err)
	}
	whole := 0
	for {
		n, err := Write(w, make([]byte, 1000))
		whole += n
		if err == syscall.EAGAIN {
			break
		}
		if err != nil || n == 0 {
			t.Fatalf("Write: %d, %v", n, err)
		}
	}
	syscall.Close(fds[1])
	f := os.NewFile(r, "pipe")
	defer f.Close()
	if b, err := io.ReadAll(f); len(b) != whole || err != nil {
		t.Errorf("%d of %d bytes, %v", len(b), whole, err)
	}
	if n, err := Write(1<<20, b); n != 0 || err != syscall.EBADF {
		t.Errorf("Write to no file: %d, %v", n, err)
	}
}
