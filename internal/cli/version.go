package cli

import "runtime/debug"

const modulePath = "github.com/tcprelay/relay"

// Version returns that of the module that the program was built from.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if info.Main.Path != modulePath {
		for _, dep := range info.Deps {
			if dep.Path == modulePath {
				return dep.Version
			}
		}
	}
	return info.Main.Version
}
