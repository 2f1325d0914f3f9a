package deploytest

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"sigs.k8s.io/yaml"
)

var chart = filepath.Join("..", "..", "deploy", "helm", "outbox-relay")

// everything turns all on.
const everything = `
replicas: 3
imagePullSecrets: [{name: registry}]
config: {STREAM: ORDERS, MAX_INFLIGHT_BYTES: 134217728, STREAM_CREATE: false, CONFIRM_DELAY: 3m}
secrets:
  NATS_CREDS: {secret: nats, key: relay.creds}
  NATS_CA: {secret: nats, key: ca.crt}
  HTTP_TOKEN: {secret: outbox-relay, key: http-token}
files: {postgres-ca.crt: {secret: db-ca, key: ca.crt}}
migrate: {enabled: true}
podAnnotations: {a: b}
podLabels: {team: shop}
nodeSelector: {disk: ssd}
tolerations: [{key: db, operator: Exists}]
affinity: {nodeAffinity: {}}
priorityClassName: high
serviceMonitor: {enabled: true, labels: {release: prometheus}}
prometheusRule: {enabled: true, labels: {release: prometheus}}
dashboard: {enabled: true}
`

func values(t *testing.T, text string) (parsed map[string]any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(text), &parsed); err != nil {
		t.Fatal(err)
	}
	return parsed
}

// render does what helm template does.
func render(t *testing.T, text string) (map[string]string, error) {
	t.Helper()
	loaded, err := loader.Load(chart)
	if err != nil {
		t.Fatal(err)
	}
	release := common.ReleaseOptions{Name: "shop", Namespace: "default", Revision: 1, IsInstall: true}
	with, err := util.ToRenderValues(loaded, values(t, text), release, common.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	return engine.Engine{Strict: true}.Render(loaded, with)
}

func rendered(t *testing.T, text string) (objects []any) {
	t.Helper()
	files, err := render(t, text)
	if err != nil {
		t.Fatal(err)
	}
	for name, file := range files {
		if strings.HasSuffix(name, ".yaml") {
			objects = append(objects, decode(t, file)...)
		}
	}
	return objects
}

func TestHelmLint(t *testing.T) {
	for _, text := range []string{"", everything} {
		for _, m := range lint.RunAll(chart, values(t, text), "default").Messages {
			if !strings.Contains(m.Error(), "icon is recommended") {
				t.Error(m.Error())
			}
		}
	}
}

func TestChartByDefault(t *testing.T) {
	objects := rendered(t, "")
	if len(objects) != 3 {
		t.Errorf("%d objects, want a Deployment, its budget and its Service", len(objects))
	}
	requireRelay(t, objects)
}

func TestChartWithEverything(t *testing.T) {
	objects := rendered(t, everything)
	requireRelay(t, objects)
	job := only[batchv1.Job](t, objects).Spec.Template.Spec
	requireRestricted(t, job)
	requireConfigured(t, job, job.Containers[0])
	monitor := only[monitoringv1.ServiceMonitor](t, objects)
	if monitor.Spec.Endpoints[0].Port != only[corev1.Service](t, objects).Spec.Ports[0].Name {
		t.Error("the ServiceMonitor scrapes no port of the Service")
	}
	if len(only[monitoringv1.PrometheusRule](t, objects).Spec.Groups) == 0 {
		t.Error("the PrometheusRule has no rules")
	}
	for name, dashboard := range only[corev1.ConfigMap](t, objects).Data {
		if !json.Valid([]byte(dashboard)) {
			t.Errorf("%s is no JSON", name)
		}
	}
}

func TestChartOfOneRelayHasNoBudget(t *testing.T) {
	objects := rendered(t, "replicas: 1")
	requireRelay(t, objects)
	if n := len(every[policyv1.PodDisruptionBudget](objects)); n != 0 {
		t.Error("a single relay has a disruption budget, which keeps nothing up")
	}
}

func requireRelay(t *testing.T, objects []any) {
	t.Helper()
	deployment := only[appsv1.Deployment](t, objects)
	pod := deployment.Spec.Template.Spec
	requireRestricted(t, pod)
	requireProbes(t, pod.Containers[0], "/readyz")
	requireConfigured(t, pod, pod.Containers[0])
	requireSelected(t, deployment, objects)
}

func TestChartRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"an unknown value":        "replica: 2",
		"a secret in plain":       "config: {NATS_PASSWORD: hunter2}",
		"a variable's whole name": "config: {outbox_stream: X}",
		"no database":             "secrets: {POSTGRES_URL: null}",
		"a secret without a key":  "secrets: {NATS_TOKEN: {secret: nats}}",
	} {
		if _, err := render(t, text); err == nil || !strings.Contains(err.Error(), "schema") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestChartNotes(t *testing.T) {
	files, err := render(t, "")
	if err != nil {
		t.Fatal(err)
	}
	notes := files["outbox-relay/templates/NOTES.txt"]
	for _, want := range []string{"deployment/shop-outbox-relay", "outbox-relay migrate", "outbox-relay drop"} {
		if !strings.Contains(notes, want) {
			t.Errorf("the notes have no %q:\n%s", want, notes)
		}
	}
}
