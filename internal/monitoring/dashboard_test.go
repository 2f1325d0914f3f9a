package monitoring

import (
	"encoding/json"
	"fmt"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"outbox-relay/internal/testenv"
)

const dashboard = "../../deploy/grafana/outbox-relay.json"

// TestRelayUnderPrometheus has a Prometheus scrape a relay that lives through all
// that its metrics tell of, and then works under load.
func TestRelayUnderPrometheus(t *testing.T) {
	o := newOutbox(t)
	server := startPrometheus(t, o.addr)
	o.live()
	o.requireMetrics()
	o.checkConventions()
	requireKnownNames(t, o.scrape())
	defer o.writing()()
	for _, query := range dashboardQueries(t) {
		server.requireData(query)
	}
}

// prometheus is a Prometheus server.
type prometheus struct {
	*testing.T
	url string
}

// startPrometheus has it scrape target, and evaluate the alerts.
func startPrometheus(t *testing.T, target string) *prometheus {
	t.Helper()
	dir := t.TempDir()
	rules, err := filepath.Abs("../../deploy/prometheus")
	must(t, err)
	config := fmt.Sprintf(`
global: {scrape_interval: 500ms, evaluation_interval: 500ms}
rule_files: [%[1]s/alerts.yml, %[1]s/standby.yml]
scrape_configs: [{job_name: outbox-relay, static_configs: [{targets: ["%[2]s"]}]}]
`, rules, target)
	must(t, os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600))
	addr := fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t))
	process := testenv.StartBinary(t, program(t, "prometheus"), nil, "--config.file="+filepath.Join(dir, "prometheus.yml"),
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+addr)
	process.WaitLog("Server is ready to receive web requests")
	return &prometheus{T: t, url: "http://" + addr}
}

// requireData waits until the query has a result, and numbers in it.
func (p *prometheus) requireData(query string) {
	p.Helper()
	testenv.Eventually(p, "data for "+query, func() bool {
		var answer struct {
			Data struct {
				Result []struct{ Value [2]any }
			}
		}
		must(p, json.Unmarshal([]byte(get(p, p.url+"/api/v1/query?query="+url.QueryEscape(query))), &answer))
		for _, series := range answer.Data.Result {
			if value, err := strconv.ParseFloat(series.Value[1].(string), 64); err != nil || math.IsNaN(value) {
				return false
			}
		}
		return len(answer.Data.Result) > 0
	})
}

// dashboardQueries returns each query of the dashboard, as Grafana asks it when all
// is chosen.
func dashboardQueries(t *testing.T) []string {
	t.Helper()
	var board struct {
		Templating struct {
			List []struct{ Name, Type, Definition string }
		}
		Panels []struct {
			Title, Type string
			Datasource  struct{ UID string }
			Targets     []struct {
				Expr       string
				Datasource struct{ UID string }
			}
		}
	}
	must(t, json.Unmarshal([]byte(read(t, dashboard)), &board))
	var queries []string
	variables := strings.NewReplacer("$job", ".*", "$instance", ".*", "$__rate_interval", "5s")
	for _, v := range board.Templating.List {
		if match := regexp.MustCompile(`^label_values\((.*), \w+\)$`).FindStringSubmatch(v.Definition); match != nil {
			queries = append(queries, variables.Replace(match[1]))
		}
	}
	if len(queries) != 2 || !strings.Contains(read(t, dashboard), `"type": "datasource"`) {
		t.Errorf("the dashboard's variables are %+v", board.Templating.List)
	}
	for _, panel := range board.Panels {
		if panel.Type != "row" && len(panel.Targets) == 0 {
			t.Errorf("panel %q asks nothing", panel.Title)
		}
		for _, target := range panel.Targets {
			if target.Datasource.UID != "${datasource}" || panel.Datasource.UID != "${datasource}" {
				t.Errorf("panel %q has a data source of its own", panel.Title)
			}
			queries = append(queries, variables.Replace(target.Expr))
		}
	}
	return queries
}

// requireKnownNames looks whether the metrics that alerts and dashboard name are
// among those of the relay, and all of the relay's in the dashboard.
func requireKnownNames(t *testing.T, scrape string) {
	t.Helper()
	names := func(text string) []string {
		return regexp.MustCompile(`\boutbox_relay_\w+`).FindAllString(text, -1)
	}
	known, shown, page := names(scrape), names(read(t, dashboard)), read(t, "../../docs/metrics.md")
	for _, path := range []string{dashboard, "../../deploy/prometheus/alerts.yml", "../../deploy/prometheus/standby.yml", "../../deploy/prometheus/alerts_test.yml"} {
		for _, name := range names(read(t, path)) {
			if !slices.Contains(known, name) {
				t.Errorf("%s names %s, which the relay does not export", path, name)
			}
		}
	}
	for _, match := range regexp.MustCompile(`(?m)^# TYPE (outbox_relay_\w+)`).FindAllStringSubmatch(scrape, -1) {
		if !slices.Contains(shown, match[1]) && !slices.Contains(shown, match[1]+"_bucket") {
			t.Errorf("the dashboard does not show %s", match[1])
		}
		if !strings.Contains(page, "| `"+strings.TrimPrefix(match[1], "outbox_relay_")+"` |") {
			t.Errorf("docs/metrics.md does not tell of %s", match[1])
		}
	}
}
