package monitoring

import (
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

const rules = "../../deploy/prometheus/"

// The rules' own tests say which alerts fire when.
func TestAlerts(t *testing.T) {
	for _, args := range [][]string{{"check", "rules", "alerts.yml", "standby.yml"}, {"test", "rules", "alerts_test.yml"}} {
		cmd := exec.Command(program(t, "promtool"), args...)
		cmd.Dir = rules
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}

// Each alert is tested, and leads to what an operator does about it.
func TestAlertsHaveARunbook(t *testing.T) {
	alerts := regexp.MustCompile(`(?s)- alert: (\w+).*?runbook_url: (\S+)`).FindAllStringSubmatch(read(t, rules+"alerts.yml")+read(t, rules+"standby.yml"), -1)
	if len(alerts) != 15 {
		t.Errorf("%d alerts have a runbook, want 15", len(alerts))
	}
	tested, runbook := read(t, rules+"alerts_test.yml"), read(t, "../../docs/operating.md")
	for _, match := range alerts {
		name, words := match[1], regexp.MustCompile(`[A-Z][a-z]+`).FindAllString(match[1], -1)
		if want := "docs/operating.md#" + strings.ToLower(strings.Join(words, "-")); match[2] != want {
			t.Errorf("%s leads to %s, want %s", name, match[2], want)
		}
		if heading := "\n### " + strings.Join(words, " ") + "\n"; !strings.Contains(strings.ToLower(runbook), strings.ToLower(heading)) {
			t.Errorf("docs/operating.md has no heading %q", heading)
		}
		if !strings.Contains(tested, `alertname="`+name+`"`) {
			t.Errorf("no test has %s fire", name)
		}
	}
}
