package main

import (
	"bytes"
	"encoding/binary"
)

// A payload is the pseudo-random bytes that one connection sends, and expects back: one
// endless run of them, of which a message is the next few. What comes at which offset is
// known without being kept, and no eight bytes are those of another offset or another
// connection but by chance. So a byte that was changed, lost, doubled or swapped, or that
// belongs to somebody else, is found where it is.
type payload struct {
	key    uint64
	offset uint64 // of the next byte
}

// newPayload returns that of a client's nth connection.
func newPayload(seed uint64, client, n int) payload {
	return payload{key: mix(mix(mix(seed)+uint64(client)) + uint64(n))}
}

// read fills b with the next bytes.
func (p *payload) read(b []byte) {
	for len(b) > 0 {
		word := mix(p.key + p.offset/8*0x9e3779b97f4a7c15)
		if p.offset%8 == 0 && len(b) >= 8 {
			binary.LittleEndian.PutUint64(b, word)
			b = b[8:]
			p.offset += 8
			continue
		}
		var part [8]byte
		binary.LittleEndian.PutUint64(part[:], word)
		n := copy(b, part[p.offset%8:])
		b = b[n:]
		p.offset += uint64(n)
	}
}

// check compares b with the next bytes. If they differ it returns a *wrongByteError.
func (p *payload) check(b []byte) error {
	var want [4096]byte
	for len(b) > 0 {
		n := min(len(b), len(want))
		start := p.offset
		p.read(want[:n])
		if !bytes.Equal(b[:n], want[:n]) {
			for i := range n {
				if b[i] != want[i] {
					return &wrongByteError{offset: start + uint64(i), got: b[i], want: want[i]}
				}
			}
		}
		b = b[n:]
	}
	return nil
}

// mix is the finalizer of SplitMix64, which makes a counter random: it is a bijection in
// which each bit of x changes half of those of the result.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
