{{- define "outbox-relay.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "outbox-relay.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "outbox-relay.labels" -}}
{{ include "outbox-relay.selector" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "outbox-relay.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "outbox-relay.podSecurity" -}}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "outbox-relay.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* The variables of config: a large number stays one, 67108864 and not 6.7e+07. */}}
{{- define "outbox-relay.config" -}}
{{- range $name, $value := .Values.config }}
- name: OUTBOX_{{ $name }}
  value: {{ if kindIs "float64" $value }}{{ if eq $value (floor $value) }}{{ printf "%.0f" $value | quote }}{{ else }}{{ $value | quote }}{{ end }}{{ else }}{{ $value | quote }}{{ end }}
{{- end }}
{{- end }}

{{- /* Paths are values of NATS_CREDS and its like; the others have a twin for a path. */}}
{{- define "outbox-relay.secretVariables" -}}
{{- range $name, $_ := .Values.secrets }}
- name: OUTBOX_{{ $name }}{{ if not (has $name (list "NATS_CREDS" "NATS_CA" "NATS_CERT" "NATS_KEY")) }}_FILE{{ end }}
  value: /etc/outbox-relay/secrets/{{ $name }}
{{- end }}
{{- end }}

{{- define "outbox-relay.projected" -}}
projected:
  sources:
    {{- range $name, $from := . }}
    - secret:
        name: {{ $from.secret }}
        items: [{key: {{ $from.key | quote }}, path: {{ $name | quote }}}]
    {{- end }}
{{- end }}
