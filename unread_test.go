package relay_test

import (
	"errors"
	"io"
	"maps"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// What a client may leave unread grows up to ClientUnread if it has kept up.
func TestClientUnread(t *testing.T) {
	ofSessions(t)
	const buffers = 64<<10 + 4<<10 // between relay and client
	for _, tt := range []struct{ limit, least, most int }{
		{1, 120 << 10, 256 << 10}, // window is given back by halves
		{1 << 20, 300 << 10, 1 << 20},
		{0, 2 << 20, 16 << 20},
		{-1, 2 << 20, 16 << 20},
	} {
		onStage(t, func(t *testing.T, s *stage) {
			a := s.register("a")
			a.transport.SetLatency(10 * time.Millisecond)
			a.transport.SetBuffer(64 << 20)
			client, app := s.pair(a)
			var most int
			for rounds := 0; rounds < 5 || most < tt.least && rounds < 50; rounds++ {
				const first = 40 << 20
				go app.Write(make([]byte, first))
				if _, err := io.ReadFull(client, make([]byte, first)); err != nil {
					t.Fatal(err)
				}
				app.SetWriteDeadline(time.Now().Add(time.Minute))
				n, err := app.Write(make([]byte, 32<<20))
				if most = max(most, n); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal(err)
				}
				app.SetWriteDeadline(time.Time{})
				if _, err := io.ReadFull(client, make([]byte, n)); err != nil {
					t.Fatal(err)
				}
			}
			if most < tt.least || most > tt.most+buffers {
				t.Errorf("limit %d: the app writes up to %d bytes, want %d to %d", tt.limit, most, tt.least, tt.most)
			}
			s.expectRefusals(map[string]int64{})
		}, relay.WithLimits(relay.Limits{ClientUnread: tt.limit}))
	}
}

// Of clients that leave too much unread, all together, some are reset, and nobody else.
func TestSessionUnread(t *testing.T) {
	ofSessions(t)
	const stopped, window, limit = 16, 256 << 10, 1 << 20
	for _, tt := range []struct{ limit, least, most int64 }{
		{limit, stopped - 2*limit/window, stopped - limit/window/2},
		{0, 0, 0},
		{-1, 0, 0},
	} {
		onStage(t, func(t *testing.T, s *stage) {
			a, other := s.register("a"), s.registerEcho("other")
			busy, busyApp := s.pair(a)
			var clients []*memnet.Conn
			var held sync.WaitGroup
			for range stopped {
				client, app := s.pair(a)
				clients = append(clients, client)
				held.Go(func() { app.Write(make([]byte, 2*window)) })
				synctest.Wait()
				sendAndExpect(s, busy, busyApp)
			}
			s.visit(other)
			cut := s.srv.Refusals()["unread"]
			if cut < tt.least || cut > tt.most {
				t.Errorf("limit %d: %d clients were reset, want %d to %d", tt.limit, cut, tt.least, tt.most)
			}
			// The others get all that they were sent, but for some that are over the limit when
			// they do.
			whole := int64(0)
			for _, c := range clients {
				n, err := io.ReadFull(c, make([]byte, 2*window))
				if err == nil {
					whole++
				} else if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("a client reads %d bytes, %v", n, err)
				}
			}
			held.Wait()
			want := map[string]int64{}
			if whole < stopped {
				want["unread"] = stopped - whole
			}
			s.expectRefusals(want)
			if got := s.ofServices(); !maps.Equal(got, want) {
				t.Errorf("services counted %v, want %v", got, want)
			}
			if whole == 0 {
				t.Errorf("limit %d: nobody got all", tt.limit)
			}
		}, relay.WithLimits(relay.Limits{SessionUnread: int(tt.limit)}))
	}
}
