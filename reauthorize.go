package relay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/tcprelay/relay/internal/wire"
)

// maxAsking is how many questions Reauthorize asks at once.
const maxAsking = 16

// Reauthorize asks the authorizer again about all apps that are registered, with what each
// has shown, for when what it goes by has changed: a list of tokens, say. One that is
// refused, or may not have the address that it has, is told: its Accept fails with
// CodeUnauthorized. Its session ends, which resets its clients, and its lease. Others
// notice nothing; limits of a service stay what they were. An app that is away is asked
// about when it comes back.
//
// Reauthorize returns when all who were refused are cut off. Apps about which there was no
// answer, for ctx or the handshake's time ended first or the answer was [ErrUndecided],
// stay; then it returns why.
func (s *Server) Reauthorize(ctx context.Context) error {
	s.mu.Lock()
	s.rules++ // whoever was asked about before, and is not in the books yet, is asked again
	var members []*member
	for svc := range s.services {
		svc.mu.Lock()
		for m := range svc.members {
			members = append(members, m)
		}
		svc.mu.Unlock()
	}
	s.mu.Unlock()

	var all sync.WaitGroup
	errs := make([]error, len(members))
	asking := make(chan struct{}, maxAsking)
	for i, m := range members {
		select {
		case asking <- struct{}{}:
		case <-ctx.Done():
			all.Wait()
			return context.Cause(ctx)
		}
		all.Go(func() {
			err := m.reconsider(ctx, all.Go)
			<-asking
			refused, ok := errors.AsType[*refusal](err)
			switch {
			case ok && refused.told.Code == wire.CodeUnauthorized:
				m.revoke(refused)
			case m.sess.Err() == nil: // which ends the question, too
				errs[i] = err
			}
		})
	}
	all.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) > 0 {
		return fmt.Errorf("relay: no answer about %d apps, the first: %w", len(errs), errs[0])
	}
	return nil
}

// reconsider asks whether an app that is registered may go on.
func (m *member) reconsider(ctx context.Context, spawn func(func())) error {
	if d := m.srv.cfg.limits.HandshakeTime; d > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	ctx, cancel := m.wanted(ctx, spawn)
	defer cancel()
	return m.allowed(ctx)
}

// confirm asks about an app that has its place again, if the rules have changed since it
// was asked about: Reauthorize may not have seen it.
func (m *member) confirm(ctx context.Context) error {
	for {
		m.srv.mu.Lock()
		current := m.rules == m.srv.rules
		m.srv.mu.Unlock()
		if current {
			return nil
		}
		if err := m.allowed(ctx); err != nil {
			return err
		}
	}
}

// allowed asks whether an app may have what it has.
func (m *member) allowed(ctx context.Context) error {
	grant, err := m.ask(ctx)
	if err != nil {
		return err
	}
	if svc := m.svc; grant.Identity != svc.identity || !grant.allowsName(m.asked.Name) || !grant.allowsAddress(svc) {
		return refuse(wire.CodeUnauthorized, "not authorized for this any more",
			fmt.Errorf("%s may not have %s any more", who(grant.Identity), svc.title()))
	}
	return nil
}

// revoke ends a session whose app is not authorized any more, and its lease, also if the
// session has just been lost. That of a newer session stays, about which was asked for
// itself.
func (m *member) revoke(why *refusal) {
	m.srv.refused.Add(kindRevoked, "registration revoked", "remote", m.remote, "err", cleanErr(why))
	m.srv.mu.Lock()
	if l := m.lease; l.m == m || l.m == nil {
		m.srv.endLeaseLocked(l)
	}
	m.srv.unlockAndTell(why)
	m.endWith(wire.Error{Code: why.told.Code, Message: "not authorized any more"})
}
