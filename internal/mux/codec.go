package mux

import "github.com/inconshreveable/muxado/frame"

// encoder lays frames into memory with muxado's codec. Its frames are reused, so
// encoding allocates nothing; it needs the lock of the writer it belongs to.
type encoder struct {
	framer frame.Framer
	data   frame.Data
	rst    frame.Rst
	wndInc frame.WndInc
	goAway frame.GoAway

	dst []byte
	// headerOnly keeps the codec from copying a payload that stands already
	// where it has to.
	headerOnly bool
}

func (e *encoder) init() { e.framer = frame.NewFramer(nil, e) }

// Write takes what the codec writes: first a frame's header and fixed part, then
// its payload.
func (e *encoder) Write(p []byte) (int, error) {
	if !e.headerOnly || len(e.dst) == 0 {
		e.dst = append(e.dst, p...)
	}
	return len(p), nil
}

// appendFrame appends a packed frame to dst. Packing fails only for ids and
// lengths that this package never produces.
func (e *encoder) appendFrame(dst []byte, f frame.Frame, packErr error) []byte {
	if packErr != nil {
		panic("mux: " + packErr.Error())
	}
	e.dst = dst
	if err := e.framer.WriteFrame(f); err != nil {
		panic("mux: " + err.Error()) // Write above never fails
	}
	dst, e.dst = e.dst, nil
	return dst
}

func (e *encoder) appendData(dst []byte, id uint32, p []byte, syn, fin bool) []byte {
	return e.appendFrame(dst, &e.data, e.data.Pack(frame.StreamId(id), p, fin, syn))
}

func (e *encoder) appendRst(dst []byte, id uint32, code Code) []byte {
	return e.appendFrame(dst, &e.rst, e.rst.Pack(frame.StreamId(id), frame.ErrorCode(code)))
}

func (e *encoder) appendWndInc(dst []byte, id uint32, n int) []byte {
	return e.appendFrame(dst, &e.wndInc, e.wndInc.Pack(frame.StreamId(id), uint32(n)))
}

// appendGoAway never carries text: stock muxado reads past the end of it.
func (e *encoder) appendGoAway(dst []byte, last uint32, code Code) []byte {
	return e.appendFrame(dst, &e.goAway, e.goAway.Pack(frame.StreamId(last), frame.ErrorCode(code), nil))
}

// nothing stands for payloads that are elsewhere. Only its length counts.
var nothing [maxPiped]byte

// headerOf makes the header of a DATA frame with n bytes of payload at the beginning of
// buf.
func (e *encoder) headerOf(buf []byte, id uint32, n int) []byte {
	e.headerOnly = true
	e.appendFrame(buf[:0], &e.data, e.data.Pack(frame.StreamId(id), nothing[:n], false, false))
	e.headerOnly = false
	return buf[:headerSize]
}

// frameInPlace makes a DATA frame of the n payload bytes at buf[headerSize:] by
// writing the header in front of them.
func (e *encoder) frameInPlace(buf []byte, id uint32, n int) []byte {
	e.headerOnly = true
	e.appendFrame(buf[:0], &e.data, e.data.Pack(frame.StreamId(id), buf[headerSize:headerSize+n], false, false))
	e.headerOnly = false
	return buf[:headerSize+n]
}
