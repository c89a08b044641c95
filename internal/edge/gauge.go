package edge

import (
	"net"
	"sync/atomic"

	"github.com/tcprelay/relay/internal/join"
)

// A Gauge counts what a connection takes of what is written to it. The stream counts a
// write as a whole, which may be long over if a rate or the client is slow.
type Gauge struct {
	join.Conn
	piece int // of a write; 0: all of it
	took  atomic.Int64
}

// NewGauge returns one for c. Watched says that c's own slowness shows elsewhere, so that
// what is written to it need not be cut into pieces.
func NewGauge(c join.Conn, watched bool) *Gauge {
	if watched {
		return &Gauge{Conn: c}
	}
	return &Gauge{Conn: c, piece: 4 << 10}
}

// Took returns how many bytes the connection has taken.
func (g *Gauge) Took() int64 { return g.took.Load() }

// NetConn returns the connection that is counted, which can be asked for its state.
func (g *Gauge) NetConn() net.Conn { return g.Conn }

func (g *Gauge) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		piece := p[n:]
		if g.piece > 0 {
			piece = piece[:min(len(piece), g.piece)]
		}
		var m int
		m, err = g.Conn.Write(piece)
		n += m
		g.took.Add(int64(m))
	}
	return n, err
}
