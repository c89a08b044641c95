package relay_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// The relay dials nobody: of the library, only listener.go, the app's side, refers
// to what dials, and nothing imports a package that does so by itself.
//
// internal/localdial does, and is nothing but that: whoever imports it dials.
func TestNobodyElseDials(t *testing.T) {
	dialling := map[string]bool{ // by importing it
		"net/http": true, "net/rpc": true, "net/smtp": true, "net/textproto": true, "os/exec": true, "log/syslog": true,
		"github.com/tcprelay/relay/internal/tcptest": true,
	}
	dialled := map[string]bool{} // by file
	files := 0
	look := func(path string) {
		files++
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		names := make(map[string]bool) // of packages that have something to dial with
		for _, imp := range file.Imports {
			of, _ := strconv.Unquote(imp.Path.Value)
			if dialling[of] {
				t.Errorf("%s imports %s", path, of)
			}
			if of == "github.com/tcprelay/relay/internal/localdial" {
				dialled[path] = true
			}
			if of == "net" || of == "crypto/tls" || of == "syscall" || strings.HasPrefix(of, "golang.org/x/") {
				name := of[strings.LastIndex(of, "/")+1:]
				if imp.Name != nil {
					name = imp.Name.Name
				}
				if name == "." {
					t.Errorf("%s imports %s without a name", path, of)
				}
				names[name] = true
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if strings.HasPrefix(sel.Sel.Name, "Dial") { // of net or of a Dialer
				dialled[path] = true
			}
			name := strings.ReplaceAll(sel.Sel.Name, "ConnectionState", "") // of TLS
			if pkg, ok := sel.X.(*ast.Ident); ok && names[pkg.Name] && strings.Contains(name, "Connect") {
				dialled[path] = true
			}
			return true
		})
	}
	roots, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range roots {
		if !strings.HasSuffix(path, "_test.go") {
			look(path)
		}
	}
	err = filepath.WalkDir("internal", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		switch {
		case !d.IsDir():
		case d.Name() == "localdial", d.Name() == "peers", d.Name() == "tcptest": // the last two are for tests
			return filepath.SkipDir
		}
		if !d.IsDir() && strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
			look(path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 10 || !dialled["listener.go"] {
		t.Errorf("looked at %d files; listener.go dials: %t", files, dialled["listener.go"])
	}
	delete(dialled, "listener.go")
	for path := range dialled {
		t.Errorf("%s dials", path)
	}
}
