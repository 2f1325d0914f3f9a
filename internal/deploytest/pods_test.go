package deploytest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// requireRestricted checks what the restricted pod security standard asks for,
// and what the relay can do in addition.
func requireRestricted(t *testing.T, pod corev1.PodSpec) {
	t.Helper()
	security := pod.SecurityContext
	if security == nil || security.RunAsNonRoot == nil || !*security.RunAsNonRoot {
		t.Error("the pod may run as root")
	}
	if security == nil || security.SeccompProfile == nil || security.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Error("the pod has no seccomp profile")
	}
	if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
		t.Error("the pod gets a token for the Kubernetes API")
	}
	if pod.EnableServiceLinks == nil || *pod.EnableServiceLinks {
		t.Error("the pod gets variables of Services, which can begin with OUTBOX_")
	}
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		s := c.SecurityContext
		if s == nil || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
			t.Errorf("%s can write its root file system", c.Name)
		}
		if s == nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation {
			t.Errorf("%s can gain privileges", c.Name)
		}
		if s == nil || s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
			t.Errorf("%s has capabilities", c.Name)
		}
		requireCoherent(t, pod, c)
	}
}

// requireCoherent checks that what the container names is there.
func requireCoherent(t *testing.T, pod corev1.PodSpec, c corev1.Container) {
	t.Helper()
	for _, mount := range c.VolumeMounts {
		if !slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == mount.Name }) {
			t.Errorf("%s mounts %s, which is no volume", c.Name, mount.Name)
		}
	}
	for _, probe := range []*corev1.Probe{c.StartupProbe, c.LivenessProbe, c.ReadinessProbe} {
		if probe != nil && !slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool {
			return intstr.FromString(p.Name) == probe.HTTPGet.Port
		}) {
			t.Errorf("%s is probed at %s, which is no port of it", c.Name, probe.HTTPGet.Port.String())
		}
	}
	limit := c.Resources.Limits.Memory()
	if limit.IsZero() || c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() {
		t.Errorf("%s has no memory limit, or requests nothing", c.Name)
	}
	for _, env := range c.Env {
		if env.Name != "GOMEMLIMIT" {
			continue
		}
		soft := resource.MustParse(strings.TrimSuffix(env.Value, "B"))
		if soft.Cmp(*limit) >= 0 {
			t.Errorf("GOMEMLIMIT %s is not below the limit of %s", env.Value, limit)
		}
	}
}

// requireProbes checks a container that relays.
func requireProbes(t *testing.T, c corev1.Container, ready string) {
	t.Helper()
	if c.LivenessProbe == nil || c.LivenessProbe.HTTPGet.Path != "/healthz" {
		t.Errorf("%s: no liveness probe of /healthz", c.Name)
	}
	got := ""
	if c.ReadinessProbe != nil {
		got = c.ReadinessProbe.HTTPGet.Path
	}
	if got != ready {
		t.Errorf("%s: readiness probe of %q, want %q", c.Name, got, ready)
	}
}

// requireConfigured starts the relay's program with the container's variables,
// on copies of the files that it mounts: the configuration has no fault.
func requireConfigured(t *testing.T, pod corev1.PodSpec, c corev1.Container) {
	t.Helper()
	root := mounted(t, pod, c)
	cmd := exec.Command(relay, "healthcheck") // which nobody answers
	cmd.Env = []string{}
	for _, env := range c.Env {
		cmd.Env = append(cmd.Env, env.Name+"="+strings.ReplaceAll(env.Value, "/etc/", root+"/etc/"))
		if env.Name == "OUTBOX_POSTGRES_URL" {
			t.Errorf("%s has a secret in its environment", c.Name)
		}
	}
	out, _ := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 1 || bytes.Contains(out, []byte("OUTBOX_")) {
		t.Errorf("%s ends with exit code %d:\n%s", c.Name, cmd.ProcessState.ExitCode(), out)
	}
}

// mounted writes the files of the container's Secrets below a folder.
func mounted(t *testing.T, pod corev1.PodSpec, c corev1.Container) (root string) {
	t.Helper()
	root = t.TempDir()
	for _, mount := range c.VolumeMounts {
		i := slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == mount.Name })
		dir := filepath.Join(root, mount.MountPath)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range fileNames(pod.Volumes[i]) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte("postgres://relay:secret@db/app\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return root
}

// fileNames are those of a volume; a whole Secret is that of the docs.
func fileNames(v corev1.Volume) (names []string) {
	if v.Projected == nil {
		return []string{"postgres-url"}
	}
	for _, source := range v.Projected.Sources {
		for _, item := range source.Secret.Items {
			names = append(names, item.Path)
		}
	}
	return names
}
