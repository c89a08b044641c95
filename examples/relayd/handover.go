package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/tcprelay/relay"
)

// handoverTime is how long a relayd may take to hand over to another.
const handoverTime = 10 * time.Second

// awaitSuccessor hands over to whoever comes through the door, and then calls stop. It
// ends when the door is closed.
func awaitSuccessor(log *slog.Logger, door *door, srv *relay.Server, stop func()) {
	for {
		conn, err := door.AcceptUnix()
		if err != nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), handoverTime)
		err = srv.HandOver(ctx, conn)
		cancel()
		if err == nil {
			door.Close() // who comes now is the successor's
			stop()
			return
		}
		log.Warn("not handed over", "err", err)
	}
}

// inherited returns what a predecessor hands over, and nothing if there is none.
func (c *config) inherited(ctx context.Context, srv *relay.Server) (registration, hosts []net.Listener, err error) {
	if c.handover != "" {
		if info, err := os.Stat(c.handover); err == nil && info.Mode().Type() != fs.ModeSocket {
			return nil, nil, fmt.Errorf("-handover: %s is there, and is no socket", c.handover)
		}
		conn, err := net.Dial("unix", c.handover)
		if err == nil {
			ctx, cancel := context.WithTimeout(ctx, handoverTime)
			defer cancel()
			return srv.TakeOver(ctx, conn.(*net.UnixConn))
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, fmt.Errorf("-handover: %w", err)
		}
	}
	return nil, nil, nil
}

// A door is where a successor comes to. Only this user may.
type door struct {
	*net.UnixListener
	dir  string // where it stands until it is opened
	path string
}

// makeDoor makes a door that is not at its place yet.
func makeDoor(path string) (*door, error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), ".relayd-") // nobody else can enter it
	if err != nil {
		return nil, err
	}
	d := &door{dir: dir, path: path}
	if d.UnixListener, err = net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/door", Net: "unix"}); err == nil {
		d.SetUnlinkOnClose(false) // it may be a successor's by then
		if err = os.Chmod(dir+"/door", 0o600); err == nil {
			return d, nil
		}
		d.UnixListener.Close()
	}
	os.RemoveAll(dir)
	return nil, err
}

// open puts the door at its place, which may be that of a predecessor's.
func (d *door) open() error {
	defer os.RemoveAll(d.dir)
	return os.Rename(d.dir+"/door", d.path)
}

// Close ends the waiting for a successor.
func (d *door) Close() error {
	os.RemoveAll(d.dir)
	return d.UnixListener.Close()
}
