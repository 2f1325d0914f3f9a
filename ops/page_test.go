package ops_test

import (
	"bytes"
	"context"
	"encoding/json"
	"image/png"
	"math"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/debian"
	"outbox-relay/internal/testenv"
)

// browser is a Chromium without a screen, with one page.
type browser struct {
	*testing.T
	ctx context.Context

	mu       sync.Mutex
	asked    []string // URLs of all requests
	problems []string // errors of scripts, and what the content policy refused
}

func newBrowser(t *testing.T) *browser {
	t.Helper()
	path, err := debian.Installed(t.Context(), "chromium", "chromium", t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.WSURLReadTimeout(time.Minute))
	allocator, stop := chromedp.NewExecAllocator(context.Background(), options...)
	ctx, cancel := chromedp.NewContext(allocator)
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil {
			t.Errorf("end the browser: %v", err)
		}
		cancel()
		stop()
	})
	b := &browser{T: t, ctx: ctx}
	if err := chromedp.Do(ctx); err != nil { // without a time limit, which would be the browser's
		t.Fatal(err)
	}
	if err := chromedp.Listen(ctx, b.hear); err != nil {
		t.Fatal(err)
	}
	call(b, network.Enable, network.EnableParams{})
	call(b, cdplog.Enable, cdp.Empty{})
	return b
}

func (b *browser) hear(event any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch event := event.(type) {
	case *network.EventRequestWillBeSent:
		b.asked = append(b.asked, event.Request.URL)
	case *runtime.EventExceptionThrown:
		b.problems = append(b.problems, event.ExceptionDetails.Text+" "+event.ExceptionDetails.Exception.Description)
	case *cdplog.EventEntryAdded:
		if event.Entry.Level == cdplog.EntryLevelError && !strings.Contains(event.Entry.Text, "401") { // a refused token is one, too
			b.problems = append(b.problems, event.Entry.Text+" "+event.Entry.URL)
		}
	}
}

// do acts on the page, and returns what the action does.
func do[T any](b *browser, action chromedp.Action[T]) T {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
	defer cancel()
	value, err := chromedp.Run(ctx, action)
	if err != nil {
		b.Fatal(err)
	}
	return value
}

// call sends a command of the DevTools protocol.
func call[P, R any](b *browser, command cdp.Command[P, R], params P) {
	b.Helper()
	do(b, func(ctx context.Context, t *chromedp.Target) (R, error) { return cdp.Call(ctx, t, command, params) })
}

func (b *browser) open(url string) { b.Helper(); do(b, chromedp.Navigate(url)) }

// eval runs a script in the page.
func eval[T any](b *browser, script string) T {
	b.Helper()
	return do(b, chromedp.Evaluate[T](script))
}

// step is a subtest.
func (b *browser) step(name string, test func(t *testing.T)) {
	whole := b.T
	defer func() { b.T = whole }()
	whole.Run(name, func(t *testing.T) { b.T = t; test(t) })
}

// quoted is the text as a script writes it.
func quoted(text string) string {
	script, _ := json.Marshal(text)
	return string(script)
}

// await waits until a script gives true.
func (b *browser) await(what, script string) {
	b.Helper()
	testenv.Eventually(b, what, func() bool { return eval[bool](b, script) })
}

// press types keys, as somebody does who has no mouse.
func (b *browser) press(keys string) { b.Helper(); do(b, chromedp.KeyEvent(keys)) }

// size is the window's; a narrow one is a phone's.
func (b *browser) size(width, height int64) {
	b.Helper()
	call(b, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{Width: width, Height: height, DeviceScaleFactor: 1, Mobile: width < 600})
}

// scheme is what the system prefers, and whether it wants less motion.
func (b *browser) scheme(scheme, motion string) {
	b.Helper()
	call(b, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
		{Name: "prefers-color-scheme", Value: scheme}, {Name: "prefers-reduced-motion", Value: motion}}})
}

// contrast is the least ratio of a text's colour to what it stands on, by WCAG 2.
const contrast = `(() => {
	const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
	const rgb = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); return canvas.getImageData(0, 0, 1, 1).data; };
	const light = (c) => [0, 1, 2].map((i) => c[i] / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
		.reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
	const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (rgb(c)[3] === 255) return rgb(c); } return [255, 255, 255]; };
	let least = 21, where = "";
	for (const e of document.querySelectorAll("p, h1, h2, h3, a, button, span, strong, time, text")) {
		if (e.closest("dialog, .unseen, .skip, [hidden]") || !e.textContent.trim()) continue;
		const style = getComputedStyle(e);
		const a = light(rgb(e.tagName === "text" ? style.fill : style.color)), b = light(behind(e));
		const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
		if (ratio < least) [least, where] = [ratio, e.tagName + "." + e.getAttribute("class") + " " + e.textContent.slice(0, 40)];
	}
	return least >= 4.5 ? "" : least.toFixed(2) + ": " + where;
})()`

// load inserts events until the test ends, in the rhythm of a shop's day.
func (e *ends) load(t *testing.T) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), e.sql.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer conn.Close(context.Background())
		for n := 0; ctx.Err() == nil; n++ {
			_, _ = conn.Exec(ctx, `insert into events (aggregate_type, event_type, payload)
				select 'order', 'placed', jsonb_build_object('n', i) from generate_series(1, $1) i`, 10+int(30*(1+math.Sin(float64(n)/120))))
			select {
			case <-ctx.Done():
			case <-time.After(30 * time.Millisecond):
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
}

const hostile = `event_<img src="https://elsewhere.example/x" onerror="document.title='broken out'">` + "\u202e\u0007"

// The page in a real browser: what it shows, that it moves, that rows can't break
// out of their place, and that who has only a keyboard, a phone or the dark gets
// along with it.
func TestPage(t *testing.T) {
	e := newEnds(t)
	s := serve(t, e.config(), withToken)
	s.run()
	s.await("/readyz", 200, "streaming")
	e.load(t)
	for _, header := range []string{"Nats-Expected-Stream", "ce-id", "Nats-Msg-Id"} {
		e.exec(t, `insert into events (aggregate_type, event_type, payload, headers) values ('order', 'cancelled', '{}', jsonb_build_object($1::text, 'x'))`, header)
	}
	testenv.Eventually(t, "three parked events", func() bool {
		_, body := s.get("/api/parked")
		return strings.Contains(body, `"failed":3`)
	})
	e.exec(t, `update events set id = $1::text, failed_reasons = failed_reasons || $1::text where id = (select max(id) from events where status = 'failed')`, hostile)

	b := newBrowser(t)
	b.size(1180, 1000)
	b.scheme("light", "reduce")
	b.open("http://" + s.addr + "/")
	b.await("the page to know the relay", `document.body.dataset.state === "well" && document.querySelectorAll("#parked li").length === 3`)

	b.step("numbers move", func(t *testing.T) {
		before := eval[string](b, `document.querySelector("#stream-value").textContent`)
		b.await("more in the stream", `document.querySelector("#stream-value").textContent !== `+quoted(before))
		b.await("curves of all three charts", `document.querySelectorAll("path.curve").length >= 3`)
		b.await("a rate in words", `/events a second/.test(document.querySelector("#state").textContent)`)
		for _, id := range []string{"slot-value", "decoder-value", "confirmed-value"} {
			b.await(id+" to be an LSN", `/^[0-9A-F]+\/[0-9A-F]+$/.test(document.getElementById("`+id+`").textContent)`)
		}
	})
	b.step("rows are text", func(t *testing.T) {
		b.await("the hostile row as it is", `[...document.querySelectorAll("#parked .id")].some((e) => e.textContent === `+quoted(hostile)+`)`)
		if n := eval[int](b, `document.querySelectorAll("img, #parked script, #parked svg").length`); n != 0 {
			t.Errorf("%d elements came out of rows", n)
		}
	})
	b.step("light and dark", func(t *testing.T) {
		for _, scheme := range []string{"light", "dark"} {
			b.scheme(scheme, "reduce")
			dark := eval[bool](b, `(() => { const c = getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number); return c[0] + c[1] + c[2] < 150; })()`)
			if dark != (scheme == "dark") {
				t.Errorf("%s: the page is dark: %t", scheme, dark)
			}
			if low := eval[string](b, contrast); low != "" {
				t.Errorf("%s: a contrast of %s", scheme, low)
			}
		}
		b.scheme("light", "reduce")
	})
	b.step("motion", func(t *testing.T) {
		moving := `document.getAnimations().length > 0`
		if eval[bool](b, moving) {
			t.Error("something moves for who wants less motion")
		}
		b.scheme("light", "no-preference")
		b.await("the line to move for others", moving)
		b.scheme("light", "reduce")
	})
	b.step("phone", func(t *testing.T) {
		for _, width := range []int64{320, 390} {
			b.size(width, 800)
			if wide := eval[int64](b, `document.documentElement.scrollWidth`); wide > width {
				t.Errorf("a screen of %d has a page of %d", width, wide)
			}
		}
		b.size(1180, 1000)
	})
	b.step("names", func(t *testing.T) {
		nameless := eval[string](b, `[...document.querySelectorAll("button, a, input")].filter((e) => !e.textContent.trim() && !e.ariaLabel && !e.labels?.length).map((e) => e.outerHTML).join()`)
		if nameless != "" {
			t.Errorf("nameless: %s", nameless)
		}
		if got := eval[string](b, `[...document.querySelectorAll("[role=status][aria-live=polite]")].map((e) => e.id).join()`); got != "announce,retried" {
			t.Errorf("live regions: %s", got)
		}
	})
	b.step("retry by keyboard", func(t *testing.T) { retryByKeyboard(t, b, e) })
	screenshots(b, e)

	b.mu.Lock()
	defer b.mu.Unlock()
	for _, url := range b.asked {
		if !strings.HasPrefix(url, "http://"+s.addr+"/") {
			t.Errorf("the page asked for %s", url)
		}
	}
	if len(b.problems) > 0 {
		t.Errorf("the page has problems:\n%s", strings.Join(b.problems, "\n"))
	}
}

// retryByKeyboard mends the oldest parked event and retries it, once with a wrong
// token.
func retryByKeyboard(t *testing.T, b *browser, e *ends) {
	var id string
	if err := e.sql.QueryRow(t.Context(), `select min(id) from events where status = 'failed'`).Scan(&id); err != nil {
		t.Fatal(err)
	}
	e.exec(t, `update events set headers = null where id = $1`, id)
	eval[any](b, `document.activeElement.blur()`)
	focused := `document.activeElement.ariaLabel === ` + quoted("Retry "+id)
	for range 20 {
		if b.press(kb.Tab); eval[bool](b, focused) {
			break
		}
	}
	if !eval[bool](b, focused) {
		t.Fatal("the keyboard does not get to the retry button")
	}
	outline := eval[string](b, `getComputedStyle(document.activeElement).outlineStyle`)
	if outline == "none" {
		t.Error("nobody sees where the keyboard is")
	}
	b.press(kb.Enter)
	b.await("the question for the token", `document.querySelector("#ask").open && document.activeElement.id === "token"`)
	b.press("this-is-not-the-token" + kb.Enter)
	b.await("the wrong token to be refused", `document.querySelector("#ask").open && /not the token/.test(document.querySelector("#ask-error").textContent)`)
	if n := count(t, e, `select count(*) from events where id = $1 and status = 'failed'`, id); n != 1 {
		t.Fatal("a wrong token has changed the row")
	}
	b.press(token + kb.Enter)
	b.await("the answer", `document.querySelector("#retried").textContent === "1 pending again."`)
	testenv.Eventually(t, "the event to be published", func() bool {
		return count(t, e, `select count(*) from events where id = $1 and status = 'published'`, id) == 1
	})
	b.await("the row to go", `document.querySelectorAll("#parked li").length === 2`)
	if at := eval[string](b, `document.activeElement.tagName`); at != "BUTTON" && at != "H2" {
		t.Errorf("the keyboard is at %s afterwards", at)
	}
	kept := eval[string](b, `Object.entries(sessionStorage).join() + "|" + Object.entries(localStorage).join() + "|" + document.cookie`)
	if kept != "outbox-relay-token,"+token+"||" {
		t.Errorf("the browser keeps %s", kept)
	}
}

func count(t *testing.T, e *ends, sql string, args ...any) (n int) {
	t.Helper()
	if err := e.sql.QueryRow(t.Context(), sql, args...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// A page without a token only shows, and says what would change that.
func TestPageIsReadOnlyWithoutToken(t *testing.T) {
	e := newEnds(t)
	s := serve(t, e.config())
	s.run()
	s.await("/readyz", 200, "streaming")
	e.exec(t, `insert into events (aggregate_type, event_type, payload, headers) values ('order', 'cancelled', '{}', '{"ce-id": "x"}')`)
	b := newBrowser(t)
	b.open("http://" + s.addr + "/")
	b.await("the parked event", `document.querySelectorAll("#parked li").length === 1`)
	b.await("what to do", `/OUTBOX_HTTP_TOKEN/.test(document.querySelector("#parked-note").textContent)`)
	if n := eval[int](b, `[...document.querySelectorAll("main button")].filter((e) => e.checkVisibility()).length`); n != 0 {
		t.Errorf("%d buttons can be seen", n)
	}
}

// screenshots writes pictures of the page for the docs, after a while of load:
// STATUS_SCREENSHOT names the file, beside which the dark and the narrow one go.
func screenshots(b *browser, e *ends) {
	path := os.Getenv("STATUS_SCREENSHOT")
	if path == "" {
		return
	}
	e.exec(b.T, `delete from events where id = $1`, hostile)
	e.exec(b.T, `insert into events (aggregate_type, event_type, payload)
		select 'invoice', 'rendered', jsonb_build_object('pdf', repeat('A', 2000000 + 300000 * i)) from generate_series(1, 2) i`)
	testenv.EventuallyWithin(b, 4*time.Minute, "a chart full of history", func() bool {
		return eval[bool](b, `parseFloat(document.querySelector("#events path.curve").getAttribute("d").slice(1)) < 70`)
	})
	eval[any](b, `document.activeElement.blur(), scrollTo(0, 0), document.querySelector("#retried").textContent = ""`)
	for _, look := range []struct {
		name, scheme  string
		width, height int64
	}{{"", "light", 1000, 1150}, {"-dark", "dark", 1000, 1150}, {"-phone", "light", 390, 1500}} {
		b.size(look.width, look.height)
		b.scheme(look.scheme, "reduce")
		do(b, chromedp.Sleep(1500*time.Millisecond)) // the charts are drawn once a second
		picture, err := png.Decode(bytes.NewReader(do(b, chromedp.CaptureScreenshot())))
		if err != nil {
			b.Fatal(err)
		}
		var small bytes.Buffer
		if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&small, picture); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(strings.TrimSuffix(path, ".png")+look.name+".png", small.Bytes(), 0o644); err != nil {
			b.Fatal(err)
		}
	}
}
