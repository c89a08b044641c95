//go:build !linux

package splice

// Size is the most that is moved at once.
const Size = 1 << 20

// A Pipe is for systems that can splice; there are none elsewhere.
type Pipe struct{}

func (*Pipe) Held() int                      { return 0 }
func (*Pipe) Fill(uintptr, int) (int, error) { panic("unreachable") }
func (*Pipe) Drain(uintptr) (int, error)     { panic("unreachable") }
func (*Pipe) Read([]byte) (int, error)       { panic("unreachable") }
func (*Pipe) Put()                           {}

// SendMore is for what goes before a Drain.
func SendMore(uintptr, []byte) (int, error) { panic("unreachable") }

// Enter and Leave do nothing here.
func Enter() {}
func Leave() {}

// Get returns nil.
func Get() *Pipe { return nil }
