package relay

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/tcprelay/relay/internal/wire"
)

// maxAsking is how many questions Reauthorize asks at once.
const maxAsking = 16

// Reauthorize asks the authorizer about all apps that are registered, as if each came
// anew, for when what it goes by has changed: a list of tokens, say. An app that is
// refused, or may not have the address that it has, is told so, that its Accept fails
// with CodeUnauthorized, and its session ends, which resets its clients; its lease ends
// too. Others notice nothing, but that limits of a service stay what they were. One that is
// away is asked about when it comes back.
//
// Reauthorize returns when all who were refused are cut off. If ctx ends before all were
// asked about, the others stay, and it returns ctx's cause.
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
	defer all.Wait()
	asking := make(chan struct{}, maxAsking)
	for _, m := range members {
		select {
		case asking <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		all.Go(func() {
			err := m.allowed(ctx)
			<-asking
			if refused, ok := errors.AsType[*refusal](err); ok {
				m.revoke(refused)
			}
		})
	}
	all.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
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
	if svc := m.svc; grant.Identity != svc.identity || !grant.allowsName(svc.name) || !grant.allowsAddress(svc) {
		return refuse(wire.CodeUnauthorized, "not authorized for this any more",
			fmt.Errorf("%s may not have %s any more", who(grant.Identity), svc.title()))
	}
	return nil
}

// revoke ends a session whose app is not authorized any more, and its lease. That of a
// newer session stays, about which was asked for itself.
func (m *member) revoke(why *refusal) {
	m.srv.refused.Add(why.told.Code, "registration revoked", "remote", m.remote, "err", cleanErr(why))
	m.srv.mu.Lock()
	if m.lease.m == m {
		m.srv.endLeaseLocked(m.lease)
	}
	m.srv.unlockAndTell(nil)
	m.endWith(why.told)
}
