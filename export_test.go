package relay

// WithMaxOpens has a session use up its streams sooner, for tests of what happens then.
func WithMaxOpens(n int) ServerOption {
	return serverOption(func(c *serverConfig) error {
		c.maxOpens = n
		return nil
	})
}

// ServesHosts reports that apps may have hostnames.
func ServesHosts(s *Server) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.hosts.listeners) > 0
}
