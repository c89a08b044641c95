package pump

import (
	"testing"

	"github.com/tcprelay/relay/internal/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }
