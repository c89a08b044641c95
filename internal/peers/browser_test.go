package peers

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/chromedp"
)

// A browser is a tab of a headless Chromium.
type browser struct {
	*testing.T
	ctx context.Context

	mu   sync.Mutex
	said []string // on the console
}

// openBrowser starts Chromium with flags, for as long as the test runs. What goes wrong in
// a page shows in its console.
func openBrowser(t *testing.T, flags map[string]any) *browser {
	t.Helper()
	opts := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(findProgram(t, "chromium", "chromium")),
		chromedp.NoSandbox, // which root cannot have
		chromedp.UserDataDir(t.TempDir()),
		chromedp.Flag("disable-component-update", true), // nothing from outside
		chromedp.Flag("disable-quic", true),
	)
	for name, v := range flags {
		opts = append(opts, chromedp.Flag(name, v))
	}
	allocator, end := chromedp.NewExecAllocator(context.Background(), opts...)
	ctx, cancel := chromedp.NewContext(allocator)
	b := &browser{T: t, ctx: ctx}
	if err := chromedp.Do(ctx); err != nil {
		t.Fatal(err)
	}
	messages := chromedp.Console(ctx)
	var listening sync.WaitGroup
	listening.Go(func() {
		for m, err := range messages {
			if err != nil {
				return
			}
			b.mu.Lock()
			b.said = append(b.said, m.String())
			b.mu.Unlock()
		}
	})
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil {
			t.Errorf("closing the browser: %v", err)
		}
		cancel()
		end()
		listening.Wait()
	})
	return b
}

// do runs steps, which have a minute each.
func (b *browser) do(steps ...chromedp.Action[chromedp.Void]) {
	b.Helper()
	for _, step := range steps {
		ctx, cancel := context.WithTimeout(b.ctx, patience)
		err := chromedp.Do(ctx, step)
		cancel()
		if err != nil {
			b.Fatalf("%v; the console: %q", err, b.console())
		}
	}
}

// eval returns the value of an expression, of a promise too.
func eval[T any](b *browser, expression string) T {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	v, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		b.Fatalf("%s: %v; the console: %q", expression, err, b.console())
	}
	return v
}

// until waits until an expression is true.
func (b *browser) until(expression string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	if _, err := chromedp.Run(ctx, chromedp.Poll[chromedp.Void](expression, chromedp.WithPollingTimeout(patience))); err != nil {
		b.Fatalf("never: %s: %v; the page:\n%s\nthe console: %q", expression, err,
			eval[string](b, "document.body.innerText"), b.console())
	}
}

func (b *browser) console() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]string(nil), b.said...)
}

// look sets the size of the window, and what colours the page is to have.
func (b *browser) look(width, height int64, scheme string) {
	b.Helper()
	b.do(chromedp.EmulateViewport(width, height))
	_, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
	})
	if err != nil {
		b.Fatal(err)
	}
}

// slash presses "/", as a keyboard does: what it types comes with the key, and not if the
// page has a use for the key.
func (b *browser) slash() {
	b.Helper()
	for _, kind := range []input.DispatchKeyEventType{input.DispatchKeyEventTypeKeyDown, input.DispatchKeyEventTypeKeyUp} {
		press := input.DispatchKeyEventParams{Type: kind, Key: "/", Code: "Slash"}
		if kind == input.DispatchKeyEventTypeKeyDown {
			press.Text = "/"
		}
		if _, err := chromedp.Call(b.ctx, input.DispatchKeyEvent, press); err != nil {
			b.Fatal(err)
		}
	}
}

// shoot keeps a picture of the page in the folder that RELAY_SCREENSHOTS names, for people
// to look at.
func (b *browser) shoot(name string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	png, err := chromedp.Run(ctx, chromedp.FullScreenshot(100))
	if err != nil {
		b.Fatal(err)
	}
	if !strings.HasPrefix(string(png), "\x89PNG") || len(png) < 5000 {
		b.Errorf("the picture %s is none: %d bytes", name, len(png))
	}
	if dir := os.Getenv("RELAY_SCREENSHOTS"); dir != "" {
		if err := os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644); err != nil {
			b.Error(err)
		}
	}
}

// quoted returns s as a string of JavaScript.
func quoted(s string) string { return fmt.Sprintf("%q", s) }
