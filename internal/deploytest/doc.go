// Package deploytest checks deploy/kubernetes and deploy/helm against the types
// of Kubernetes and by Helm itself. It is a module of its own: the relay's has
// none of these libraries.
package deploytest
