package relay_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// In JSON every line is an object, also the last one of a relay that ends by an
// error, which says why.
func TestLogsInJSON(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.start("LOG_FORMAT=json")
	r.WaitLog(`"msg":"streaming"`)
	b.insertRow(`'{"nats-x": "\r\n\"forged\": 1"}'`, `'1'`)
	r.WaitLog("parked an event")
	r.Terminate()
	b.exec(`drop publication outbox_relay`)
	halted := b.start("LOG_FORMAT=json")
	if code := halted.Wait(30 * time.Second); code != 1 {
		t.Errorf("exit code %d", code)
	}
	last := map[string]any{}
	for line := range strings.Lines(r.Logs() + halted.Logs()) {
		last = map[string]any{}
		if err := json.Unmarshal([]byte(line), &last); err != nil || last["msg"] == "" || last["level"] == "" || last["time"] == "" {
			t.Errorf("%s: %v", line, err)
		}
	}
	if why, _ := last["error"].(string); last["msg"] != "halted" || !strings.Contains(why, "outbox-relay migrate") {
		t.Errorf("the last line is %v", last)
	}
}
