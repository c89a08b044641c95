//go:build !unix

package handover

import (
	"errors"
	"net"
	"os"
)

func send(*net.UnixConn, any, []*os.File) error { return errors.ErrUnsupported }

func receive(*net.UnixConn, any, int) ([]*os.File, error) { return nil, errors.ErrUnsupported }

func done(*net.UnixConn, error) error { return errors.ErrUnsupported }
