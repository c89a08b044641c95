//go:build unix

package handover

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
)

// The sender's message, the offer:
//
//	offerMagic, version
//	4 bytes, big endian: length of the state, then the state
//	for every batch of files one byte, how many they are, sent together with them
//	a byte 0
//
// The successor's message, the answer:
//
//	answerMagic, version
//	1 byte, taken or refused
//	2 bytes, big endian: length of the reason, then the reason; 0 if taken
//
// The kernel may join the data of several sends and split that of one, but it keeps files with the byte they were sent
// with and gives them to the read that takes this byte. So the receiver never reads beyond the part of the message it is
// in, and takes each batch's byte by itself: its files come with it, or something is wrong.
const (
	offerMagic  = "relay-offer"
	answerMagic = "relay-answer"
	version     = 1

	taken   = 0
	refused = 1

	maxBatch  = 253     // SCM_MAX_FD of Linux
	oobSize   = 4 << 10 // more than a kernel lets a peer send in one message, with credentials beside the files
	maxReason = 1 << 10
)

func send(conn *net.UnixConn, state any, files []*os.File) error {
	data, err := json.Marshal(state)
	if err != nil {
		return err
	}
	if len(data) > maxState {
		return fmt.Errorf("the state has %d bytes, at most %d are allowed", len(data), maxState)
	}
	if len(files) > maxFiles {
		return fmt.Errorf("%d files, at most %d are allowed", len(files), maxFiles)
	}
	err = writeOffer(conn, data, files)
	if err == nil {
		return readAnswer(conn)
	}
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		// A successor that refuses before it has read everything says why and hangs up.
		if why, ok := errors.AsType[refusal](readAnswer(conn)); ok {
			return why
		}
	}
	return err
}

func writeOffer(conn *net.UnixConn, data []byte, files []*os.File) error {
	head := append([]byte(offerMagic), version)
	head = binary.BigEndian.AppendUint32(head, uint32(len(data)))
	if _, err := conn.Write(head); err != nil {
		return err
	}
	if _, err := conn.Write(data); err != nil {
		return err
	}
	for batch := range slices.Chunk(files, maxBatch) {
		err := withDescriptors(batch, nil, func(fds []int) error {
			_, _, err := conn.WriteMsgUnix([]byte{byte(len(fds))}, syscall.UnixRights(fds...), nil)
			return err
		})
		if err != nil {
			return err
		}
	}
	_, err := conn.Write([]byte{0})
	return err
}

// withDescriptors calls f with fds and the descriptors of files. It is inside the Control call of each file then, so none
// can be closed, and its number given to another, before f returns. File.Fd would not do: it may make the file
// blocking, for this process and for the successor.
func withDescriptors(files []*os.File, fds []int, f func(fds []int) error) error {
	if len(files) == 0 {
		return f(fds)
	}
	raw, err := files[0].SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		err = withDescriptors(files[1:], append(fds, int(fd)), f)
	})
	if cerr != nil {
		return cerr
	}
	return err
}

// refusal is the successor's reason not to take what it was sent.
type refusal string

func (r refusal) Error() string { return fmt.Sprintf("refused: %q", string(r)) }

func readAnswer(conn *net.UnixConn) error {
	r := newReader(conn)
	defer r.closeFiles()
	if err := r.expect(answerMagic); err != nil {
		return err
	}
	var head [3]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	status, size := head[0], binary.BigEndian.Uint16(head[1:])
	switch {
	case status == taken && size == 0:
		return nil
	case status == refused && size <= maxReason:
		reason := make([]byte, size)
		if _, err := io.ReadFull(r, reason); err != nil {
			return err
		}
		return refusal(reason)
	}
	return fmt.Errorf("malformed answer: status %d with a reason of %d bytes", status, size)
}

func done(conn *net.UnixConn, why error) error {
	status, reason := byte(taken), ""
	if why != nil {
		status, reason = refused, why.Error()
	}
	if len(reason) > maxReason {
		reason = strings.ToValidUTF8(reason[:maxReason], "") // no half character at the end
	}
	answer := append([]byte(answerMagic), version, status)
	answer = binary.BigEndian.AppendUint16(answer, uint16(len(reason)))
	_, err := conn.Write(append(answer, reason...))
	return err
}

// receive is Receive for at most limit files.
func receive(conn *net.UnixConn, state any, limit int) (files []*os.File, err error) {
	r := newReader(conn)
	defer func() {
		if err != nil {
			r.closeFiles()
		}
	}()
	if err := r.expect(offerMagic); err != nil {
		return nil, err
	}
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > maxState {
		return nil, fmt.Errorf("the peer's state has %d bytes, at most %d are allowed", size, maxState)
	}
	var data bytes.Buffer // grows with what comes, not with what the peer says will come
	if _, err := io.CopyN(&data, r, int64(size)); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data.Bytes(), state); err != nil {
		return nil, err
	}

	r.limit = limit
	for {
		before := len(r.files)
		var batch [1]byte
		if _, err := io.ReadFull(r, batch[:]); err != nil {
			return nil, err
		}
		if n := len(r.files) - before; n != int(batch[0]) {
			return nil, fmt.Errorf("%d files came where the peer announced %d", n, batch[0])
		}
		if batch[0] == 0 {
			return r.files, nil
		}
	}
}

// reader reads the data of a connection and collects the files that come with it.
type reader struct {
	conn  *net.UnixConn
	oob   []byte
	files []*os.File // the reader's to close until its user takes them
	limit int        // how many files may have come by now
}

// newReader returns a reader that takes no files until its limit is raised.
func newReader(conn *net.UnixConn) *reader {
	return &reader{conn: conn, oob: make([]byte, oobSize)}
}

// Read takes the end of the stream for an error: no message ends with it.
func (r *reader) Read(p []byte) (int, error) {
	n, oobn, flags, _, err := r.conn.ReadMsgUnix(p, r.oob)
	kept := r.keep(r.oob[:oobn]) // first of all: whatever is wrong, a file that came is collected
	switch {
	case errors.Is(err, io.EOF):
		return 0, io.ErrUnexpectedEOF
	case err != nil:
		return 0, err
	case kept != nil:
		return 0, kept
	case flags&syscall.MSG_CTRUNC != 0:
		return 0, errors.New("files were lost: this process cannot open as many as were sent")
	case len(r.files) > r.limit:
		return 0, fmt.Errorf("the peer sent %d files where at most %d are allowed", len(r.files), r.limit)
	}
	return n, nil
}

// keep collects the files of a control message.
func (r *reader) keep(oob []byte) error {
	msgs, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("control message: %w", err)
	}
	for _, m := range msgs {
		if m.Header.Level != syscall.SOL_SOCKET || m.Header.Type != syscall.SCM_RIGHTS {
			continue // credentials, if the caller asked the kernel for them
		}
		fds, err := syscall.ParseUnixRights(&m)
		if err != nil {
			return fmt.Errorf("control message: %w", err)
		}
		for _, fd := range fds {
			r.files = append(r.files, os.NewFile(uintptr(fd), fmt.Sprintf("handover file %d", len(r.files))))
		}
	}
	return nil
}

func (r *reader) closeFiles() {
	for _, f := range r.files {
		f.Close()
	}
}

// expect reads the start of a message.
func (r *reader) expect(magic string) error {
	head := make([]byte, len(magic)+1)
	if _, err := io.ReadFull(r, head); err != nil {
		return err
	}
	if got := head[:len(magic)]; string(got) != magic {
		return fmt.Errorf("the peer does something else: it sent %q, not %q", got, magic)
	}
	if got := head[len(magic)]; got != version {
		return fmt.Errorf("the peer speaks version %d of the handover, this process version %d", got, version)
	}
	return nil
}
