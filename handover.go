package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/tcprelay/relay/internal/handover"
)

// What a server tells its successor, beside the listeners themselves: first those that
// services register on, then those for hosts, then one for each service that has a port.
type estate struct {
	Registration int // listeners
	Hosts        int // listeners of ServeHosts
	Services     []estateService
}

type estateService struct {
	Name, Host, Identity, Addr string
	Shared                     bool
	Owner                      Limits
	Leases                     []leaseKey
}

// HandOver gives another process, which calls TakeOver on the other end of conn, all it
// needs to be this server from now on: the listeners, names and leases. When it
// returns nil the successor has them, and this server is to be shut down. No client is
// refused for it: the sockets stay open, connections that nobody has accepted yet wait
// in them, Shutdown has the apps look for the relay anew and find the successor, and
// who is connected stays with this process until it leaves.
//
// Listeners that are no TCP sockets are not passed on, nor are services that speak
// plain muxado; they end with the server. An app that registers from now on is told
// CodeClosing, and one that was just at it may find its public listener closed and opened
// again. After an error the server is as it was. Ctx bounds the call, which closes conn. It takes a system with
// Unix sockets.
func (s *Server) HandOver(ctx context.Context, conn *net.UnixConn) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	e, files, err := s.estate()
	if err == nil {
		err = handover.Send(conn, e, files)
	}
	for _, f := range files {
		f.Close()
	}
	if err != nil {
		s.mu.Lock()
		s.handed = false
		s.mu.Unlock()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("relay: handing over: %w", err)
	}
	// Services may end here from now on, of which the successor knows better.
	s.stopHosts(ctx)
	s.cfg.log.Info("handed over", "services", len(e.Services))
	return nil
}

// estate lists what there is to hand over, with a copy of each socket.
func (s *Server) estate() (e estate, files []*os.File, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return e, nil, ErrServerClosed
	}
	s.handed = true
	add := func(ln net.Listener) bool {
		tcp, ok := ln.(*net.TCPListener)
		if !ok || err != nil {
			return false
		}
		var f *os.File
		if f, err = tcp.File(); err == nil {
			files = append(files, f)
		}
		return err == nil
	}
	for ln := range s.listeners {
		if add(*ln) {
			e.Registration++
		}
	}
	for _, ln := range s.hosts.listeners {
		if add(*ln) {
			e.Hosts++
		}
	}
	for svc := range s.services {
		var keys []leaseKey
		for l := range svc.leases {
			if l.shown {
				keys = append(keys, l.key)
			}
		}
		if keys != nil && svc.isOpen() && err == nil && (svc.host != "" || add(svc.ln)) {
			e.Services = append(e.Services, estateService{svc.name, svc.host, svc.identity, svc.addr, svc.shared, svc.owner, keys})
		}
	}
	return e, files, err
}

// TakeOver receives what the server at the other end of conn hands over: its services,
// whose apps are away, from now, for the lease time, and the listeners that it had
// services register on, for Serve, and those for hosts, for ServeHosts. It is called before
// them; ctx bounds it. The options of the two servers should be the same. TakeOver closes
// conn.
func (s *Server) TakeOver(ctx context.Context, conn *net.UnixConn) (registration, hosts []net.Listener, err error) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	var e estate
	files, err := handover.Receive(conn, &e)
	var listeners []net.Listener
	if err == nil {
		listeners, err = asListeners(files)
	}
	own := e.Registration + e.Hosts // which are no service's
	if err == nil && (e.Registration < 0 || e.Hosts < 0 || len(listeners) != own+e.ports()) {
		err = errors.New("listeners and services do not match")
	}
	if err == nil {
		err = s.inherit(e.Services, listeners[own:])
	}
	if err != nil {
		for _, ln := range listeners {
			ln.Close()
		}
		handover.Done(conn, err)
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, nil, fmt.Errorf("relay: taking over: %w", err)
	}
	if err := handover.Done(conn, nil); err != nil {
		// The other one may go on as if nothing had happened.
		s.Close()
		for _, ln := range listeners {
			ln.Close()
		}
		return nil, nil, fmt.Errorf("relay: taking over: %w", err)
	}
	s.cfg.log.Info("took over", "services", len(e.Services))
	return listeners[:e.Registration:e.Registration], listeners[e.Registration:own:own], nil
}

// ports returns how many services have one.
func (e *estate) ports() (n int) {
	for _, es := range e.Services {
		if es.Host == "" {
			n++
		}
	}
	return n
}

func asListeners(files []*os.File) (all []net.Listener, err error) {
	for _, f := range files {
		var ln net.Listener
		if err == nil {
			if ln, err = net.FileListener(f); err == nil {
				all = append(all, ln)
			}
		}
		f.Close()
	}
	return all, err
}

// inherit enters services that were another server's. Their apps are away.
//
// Each that has a port has the next of the listeners.
func (s *Server) inherit(services []estateService, listeners []net.Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return ErrServerClosed
	}
	if s.cfg.lease <= 0 {
		return errors.New("without leases apps cannot come back; see WithLease")
	}
	names := make(map[string]bool)
	for _, es := range services {
		if es.Name != "" && (s.names[es.Name] != nil || names[es.Name]) {
			return fmt.Errorf("the name %q is taken", es.Name)
		}
		names[es.Name] = true
		if es.Host != "" && s.hosts.services[es.Host] != nil {
			return fmt.Errorf("the hostname %q is taken", es.Host)
		}
	}
	for _, es := range services {
		var ln net.Listener
		if es.Host != "" {
			ln = newDoor(es.Addr)
		} else {
			ln, listeners = listeners[0], listeners[1:]
		}
		svc := newService(s, es.Name, es.Host, es.Identity, es.Shared, es.Owner)
		s.owners.Take(es.Identity, 0)
		s.enterLocked(svc)
		for _, key := range es.Leases {
			l := &lease{svc: svc, shown: true, key: key}
			svc.leases[l], s.leases[key] = struct{}{}, l
			s.parkLocked(l)
		}
		svc.openLocked(ln, es.Addr)
	}
	return nil
}
