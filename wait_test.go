package relay_test

import (
	"context"
	"errors"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// WithWait has Register wait until there is room, and without it nobody waits.
func TestWithWait(t *testing.T) {
	const room = 30 * time.Second // comes then
	full := func(opts []relay.ServerOption, theirs ...relay.RegisterOption) func(t *testing.T, n *memnet.Network) func() {
		return func(t *testing.T, n *memnet.Network) func() {
			startOn(t, n, opts...)
			other := roam(t, n, theirs...)
			return func() { other.Close() }
		}
	}
	for _, tt := range []struct {
		name    string
		opts    []relay.RegisterOption
		prepare func(t *testing.T, n *memnet.Network) (makeRoom func())
		code    relay.Code
		is      error
	}{
		{
			name:    "nobody there",
			prepare: func(t *testing.T, n *memnet.Network) func() { return func() { startOn(t, n) } },
			code:    relay.CodeUnreachable,
			is:      syscall.ECONNREFUSED,
		},
		{
			name:    "no port left",
			prepare: full([]relay.ServerOption{relay.WithPorts(8005, 8005)}),
			code:    relay.CodeServerFull,
		},
		{
			name:    "no service left",
			prepare: full([]relay.ServerOption{relay.WithLimits(relay.Limits{Services: 1})}),
			code:    relay.CodeServerFull,
		},
		{
			name:    "name taken",
			opts:    []relay.RegisterOption{relay.WithName("web")},
			prepare: full(nil, relay.WithName("web")),
			code:    relay.CodeNameTaken,
		},
		{
			name:    "port taken by an app",
			opts:    []relay.RegisterOption{relay.WithPort(8005)},
			prepare: full(nil, relay.WithPort(8005)),
			code:    relay.CodePortUnavailable,
		},
		{
			name: "port taken by another program",
			opts: []relay.RegisterOption{relay.WithPort(8005)},
			prepare: func(t *testing.T, n *memnet.Network) func() {
				startOn(t, n)
				ln, err := n.Listen(t.Context(), "tcp", "10.0.0.1:8005")
				if err != nil {
					t.Fatal(err)
				}
				return func() { ln.Close() }
			},
			code: relay.CodePortUnavailable,
		},
		{
			name: "something else there",
			prepare: func(t *testing.T, n *memnet.Network) func() {
				ln, err := n.Listen(t.Context(), "tcp", relayAddr)
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					for {
						c, err := ln.Accept()
						if err != nil {
							return
						}
						c.Close()
					}
				}()
				return func() { ln.Close(); startOn(t, n) }
			},
			code: relay.CodeNotRelay,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				makeRoom := tt.prepare(t, n)
				a := newRoamer(n)
				opts := a.options(tt.opts)
				start := time.Now()
				_, err := signUp(t.Context(), relayAddr, opts...)
				expectRegisterError(t, err, relayAddr, tt.code)
				if !errors.Is(err, tt.is) && tt.is != nil {
					t.Errorf("without WithWait: %v", err)
				}
				expectAt(t, "without WithWait it fails", time.Now(), start, 0)

				// The context ends it, and the reason is not lost.
				opts = append(opts, relay.WithWait())
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				_, err = signUp(ctx, relayAddr, opts...)
				expectRegisterError(t, err, relayAddr, relay.CodeTimeout)
				expectAt(t, "with a deadline it fails", time.Now(), start, 10*time.Second)
				expectReason(t, err, context.DeadlineExceeded, tt.code, tt.is)
				cause := errors.New("on second thoughts")
				ctx, cancelFor := context.WithCancelCause(t.Context())
				time.AfterFunc(5*time.Second, func() { cancelFor(cause) })
				_, err = signUp(ctx, relayAddr, opts...)
				expectRegisterError(t, err, relayAddr, relay.CodeCanceled)
				expectAt(t, "cancelled it fails", time.Now(), start, 15*time.Second)
				expectReason(t, err, cause, tt.code, tt.is)
				if n := len(a.dialled()); n < 1+5+3 || n > 1+100+50 {
					t.Errorf("tried %d times", n)
				}

				registered := make(chan error, 1)
				go func() {
					l, err := signUp(t.Context(), relayAddr, opts...)
					a.Listener = l
					registered <- err
				}()
				sleepUntil(start, room)
				makeRoom()
				if err := <-registered; err != nil {
					t.Fatal(err)
				}
				defer a.Close()
				if took := time.Since(start); took < room || took > room+time.Second {
					t.Errorf("registered after %v", took)
				}
				go a.serve()
				if err := visit(n, a.Addr()); err != nil {
					t.Error(err)
				}
				if events := a.sessions(); len(events) != 2 || events[0].Kind != relay.EventRefused || events[0].Addr != "" || events[1].Kind != relay.EventRegistered {
					t.Errorf("events %+v", events)
				}
			})
		})
	}
}

// expectReason checks the error of a Register that waited and was ended by ctx.
func expectReason(t testing.TB, err, ended error, want relay.Code, is error) {
	t.Helper()
	re, _ := errors.AsType[*relay.RegisterError](err)
	before, ok := errors.AsType[*relay.RegisterError](re.Err)
	if !ok || before.Code != want || !errors.Is(err, ended) || is != nil && !errors.Is(err, is) {
		t.Errorf("Register: %v; want %v in it, and before it code %q and %v", err, ended, want, is)
	}
}

// A deadline that falls into a try does not hide why those before it failed.
func TestWithWaitCutShort(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		tries := 0
		dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
			if tries++; tries < 3 {
				return n.Dial(ctx, network, addr)
			}
			<-ctx.Done()
			return nil, ctx.Err()
		}
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := signUp(ctx, relayAddr, relay.WithDialer(dial), relay.WithWait())
		expectRegisterError(t, err, relayAddr, relay.CodeTimeout)
		expectReason(t, err, context.DeadlineExceeded, relay.CodeUnreachable, syscall.ECONNREFUSED)
		expectAt(t, "it fails", time.Now(), start, time.Minute)
		if tries != 3 {
			t.Errorf("%d tries", tries)
		}
	})
}

// What waiting would not help fails at once, also behind something that it might have.
func TestWithWaitInVain(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		register := func() error {
			_, err := signUp(t.Context(), relayAddr, relay.WithDialer(n.Dial), relay.WithWait(), relay.WithToken("wrong"),
				relay.WithBackoff(100*time.Millisecond, time.Second))
			return err
		}
		start := time.Now()
		failed := make(chan error, 1)
		go func() { failed <- register() }()
		sleepUntil(start, 10*time.Second)
		startOn(t, n, relay.WithTokens("right"))
		expectRegisterError(t, <-failed, relayAddr, relay.CodeUnauthorized)
		if took := time.Since(start); took > 11*time.Second {
			t.Errorf("it failed after %v", took)
		}
		start = time.Now()
		expectRegisterError(t, register(), relayAddr, relay.CodeUnauthorized)
		expectAt(t, "it fails", time.Now(), start, 0)
	})
}
