package deploytest

import (
	"errors"
	"strings"
	"testing"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// kinds make an empty object of each kind that the deploy files have.
var kinds = map[string]func() any{
	"apps/v1 Deployment":                      func() any { return new(appsv1.Deployment) },
	"batch/v1 Job":                            func() any { return new(batchv1.Job) },
	"policy/v1 PodDisruptionBudget":           func() any { return new(policyv1.PodDisruptionBudget) },
	"v1 Service":                              func() any { return new(corev1.Service) },
	"v1 ConfigMap":                            func() any { return new(corev1.ConfigMap) },
	"monitoring.coreos.com/v1 ServiceMonitor": func() any { return new(monitoringv1.ServiceMonitor) },
	"monitoring.coreos.com/v1 PrometheusRule": func() any { return new(monitoringv1.PrometheusRule) },
}

// decode reads all objects of a manifest; an unknown or doubled key fails.
func decode(t *testing.T, manifest string) (objects []any) {
	t.Helper()
	for document := range strings.SplitSeq("\n"+manifest, "\n---") {
		var head struct{ APIVersion, Kind string }
		if err := yaml.Unmarshal([]byte(document), &head); err != nil {
			t.Fatalf("%v\n%s", err, document)
		}
		if head.Kind == "" {
			continue
		}
		made := kinds[head.APIVersion+" "+head.Kind]
		if made == nil {
			t.Fatalf("%s %s is of no kind that is expected", head.APIVersion, head.Kind)
		}
		object := made()
		if err := strict([]byte(document), object); err != nil {
			t.Fatalf("%s: %v\n%s", head.Kind, err, document)
		}
		objects = append(objects, object)
	}
	return objects
}

// strict decodes as the API server does: letters' case counts, and sigs.k8s.io/yaml
// alone does not look at it.
func strict(document []byte, object any) error {
	text, err := yaml.YAMLToJSONStrict(document)
	if err != nil {
		return err
	}
	faults, err := json.UnmarshalStrict(text, object)
	return errors.Join(append(faults, err)...)
}

// only returns the object of this type, and fails unless there is exactly one.
func only[T any](t *testing.T, objects []any) *T {
	t.Helper()
	all := every[T](objects)
	if len(all) != 1 {
		t.Fatalf("there are %d objects of type %T", len(all), *new(T))
	}
	return all[0]
}

func every[T any](objects []any) (all []*T) {
	for _, object := range objects {
		if o, ok := object.(*T); ok {
			all = append(all, o)
		}
	}
	return all
}
