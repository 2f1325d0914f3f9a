package deploytest

import (
	"os"
	"path/filepath"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/labels"
)

func manifest(t *testing.T, name string) []any {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "deploy", "kubernetes", name))
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, string(text))
}

func TestEveryManifestIsChecked(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "..", "deploy", "kubernetes", "*"))
	if err != nil || len(files) != 3 {
		t.Errorf("%d manifests, and tests of 3: %v", len(files), err)
	}
}

func TestSidecar(t *testing.T) {
	pod := only[appsv1.Deployment](t, manifest(t, "sidecar.yaml")).Spec.Template.Spec
	requireRestricted(t, pod)
	sidecar := pod.InitContainers[0]
	if sidecar.RestartPolicy == nil || *sidecar.RestartPolicy != corev1.ContainerRestartPolicyAlways {
		t.Error("the relay is no sidecar: the application would wait for its end")
	}
	requireProbes(t, sidecar, "")
	requireConfigured(t, pod, sidecar)
}

func TestDeployment(t *testing.T) {
	objects := manifest(t, "deployment.yaml")
	deployment := only[appsv1.Deployment](t, objects)
	requireRestricted(t, deployment.Spec.Template.Spec)
	requireProbes(t, deployment.Spec.Template.Spec.Containers[0], "/readyz")
	requireConfigured(t, deployment.Spec.Template.Spec, deployment.Spec.Template.Spec.Containers[0])
	requireSelected(t, deployment, objects)
}

// requireSelected checks that each selector finds the deployment's pods.
func requireSelected(t *testing.T, deployment *appsv1.Deployment, objects []any) {
	t.Helper()
	pods := labels.Set(deployment.Spec.Template.Labels)
	selectors := map[string]map[string]string{"Deployment": deployment.Spec.Selector.MatchLabels}
	for _, budget := range every[policyv1.PodDisruptionBudget](objects) {
		selectors["PodDisruptionBudget"] = budget.Spec.Selector.MatchLabels
		if policy := budget.Spec.UnhealthyPodEvictionPolicy; policy == nil || *policy != policyv1.AlwaysAllow {
			t.Error("while NATS is away no relay is ready, and the budget lets no node be drained")
		}
	}
	for _, service := range every[corev1.Service](objects) {
		selectors["Service"] = service.Spec.Selector
	}
	for _, spread := range deployment.Spec.Template.Spec.TopologySpreadConstraints {
		selectors["topologySpreadConstraints"] = spread.LabelSelector.MatchLabels
	}
	for kind, selector := range selectors {
		if len(selector) == 0 || !labels.SelectorFromSet(selector).Matches(pods) {
			t.Errorf("%s selects %v, the pods are %v", kind, selector, pods)
		}
	}
}

func TestMigrateJob(t *testing.T) {
	job := only[batchv1.Job](t, manifest(t, "migrate.yaml"))
	requireRestricted(t, job.Spec.Template.Spec)
	requireConfigured(t, job.Spec.Template.Spec, job.Spec.Template.Spec.Containers[0])
}
