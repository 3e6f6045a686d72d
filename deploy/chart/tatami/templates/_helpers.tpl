{{/* Names. `kind` is hostpath or nfs. */}}
{{- define "tatami.name" -}}
{{- default .Release.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels: dict "root" $ "component" "hostpath-node" */}}
{{- define "tatami.selector" -}}
app.kubernetes.io/name: tatami
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "tatami.labels" -}}
{{ include "tatami.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* An image: dict "root" $ "image" .Values.image "tag" the default tag */}}
{{- define "tatami.image" -}}
{{- $registry := .image.registry | default .root.Values.global.imageRegistry -}}
{{- with $registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- .image.repository -}}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .tag }}{{ end -}}
{{- end -}}

{{- define "tatami.nfs.enabled" -}}
{{- if .Values.nfs.pools }}true{{ end -}}
{{- end -}}

{{/* Whether a pool's data is to be found on the controller's machine. */}}
{{- define "tatami.nfs.data" -}}
{{- range .Values.nfs.pools }}{{ if .data }}true{{ end }}{{ end -}}
{{- end -}}

{{/* Whether pod authors may have volumes of their own in one of these pools: .Values.hostpath.pools */}}
{{- define "tatami.inline" -}}
{{- range . }}{{ if .inline }}true{{ end }}{{ end -}}
{{- end -}}

{{- define "tatami.snapshots" -}}
{{- if or (eq .Values.snapshots "always") (and (eq .Values.snapshots "auto") (.Capabilities.APIVersions.Has "snapshot.storage.k8s.io/v1")) }}true{{ end -}}
{{- end -}}

{{/* A class' parameter, which Kubernetes wants as a string. YAML's whole numbers arrive here as floats: not as 1e+06. */}}
{{- define "tatami.parameter" -}}
{{- kindIs "float64" . | ternary (printf "%.0f" (. | float64)) (toString .) | quote -}}
{{- end -}}

{{- define "tatami.pluginDir" -}}
{{ .root.Values.kubeletDir }}/plugins/{{ .driver }}
{{- end -}}

{{/* The socket by which the kubelet finds the driver: dict "root" $ "driver" its name */}}
{{- define "tatami.registrationSocket" -}}
{{ .root.Values.kubeletDir }}/plugins_registry/{{ .driver }}-reg.sock
{{- end -}}

{{/* pools.toml. JSON's strings and lists are TOML's, too. dict "backend" "hostpath" "kind" .Values.hostpath */}}
{{- define "tatami.poolsToml" -}}
[driver]
backend = {{ .backend | toJson }}
name = {{ .kind.driverName | toJson }}
{{- with .kind.defaultPool }}
default_pool = {{ . | toJson }}
{{- end }}
{{- with .kind.maxVolumesPerNode }}
max_volumes_per_node = {{ int64 . }}
{{- end }}
{{- range $name, $pool := .kind.pools }}

[pools.{{ $name }}]
{{- range $key, $value := $pool }}
{{ $key }} = {{ $value | toJson }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What all containers but the privileged one have. */}}
{{- define "tatami.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* A sidecar's head: dict "root" $ "name" "provisioner" */}}
{{- define "tatami.sidecar" -}}
{{- $sidecar := index .root.Values.sidecars .name -}}
name: {{ .name }}
image: {{ include "tatami.image" (dict "root" .root "image" $sidecar.image) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- include "tatami.confined" .root | nindent 2 }}
resources: {{- toYaml $sidecar.resources | nindent 2 }}
{{- end -}}

{{- define "tatami.sidecar.args" -}}
- --csi-address=/csi/csi.sock
- --v=2
{{- end -}}

{{- define "tatami.sidecar.extraArgs" -}}
{{- with (index .root.Values.sidecars .name).extraArgs -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}

{{/* The API's credentials, mounted into the sidecars alone: the driver never speaks to the API server. */}}
{{- define "tatami.token.volume" -}}
name: api-access
projected:
  defaultMode: 0444
  sources:
    - serviceAccountToken: {path: token, expirationSeconds: 3607}
    - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
    - downwardAPI: {items: [{path: namespace, fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}]}
{{- end -}}

{{- define "tatami.token.mount" -}}
{name: api-access, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
{{- end -}}

{{- define "tatami.pod.env" -}}
- {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
- {name: NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
{{- end -}}

{{/* The driver's probes over HTTP. */}}
{{- define "tatami.probes.http" -}}
# Asked every second until it serves, so that an upgrade goes on to the next node as soon as this one is back.
startupProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 1
  timeoutSeconds: 5
  failureThreshold: 120
# Liveness waits for nothing but the driver itself; a restart would bring no pool back.
livenessProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 20
  timeoutSeconds: 5
  failureThreshold: 5
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end -}}

{{/* The same without a port, for pods in the host's network. dict "socket" what is there when it serves */}}
{{- define "tatami.probes.exec" -}}
# No port of the host is taken: the probe asks on the driver's own socket. A Python starts for it, hence not every few seconds.
livenessProbe:
  exec: {command: [tatami, call, --timeout, "5", Probe]}
  initialDelaySeconds: 30
  periodSeconds: 30
  timeoutSeconds: 15
  failureThreshold: 3
readinessProbe:
  exec: {command: [test, -S, {{ .socket }}]}
  periodSeconds: 10
  timeoutSeconds: 5
{{- end -}}

{{- define "tatami.pullSecrets" -}}
{{- with .Values.global.imagePullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Placement: dict "of" .Values.hostpath.node */}}
{{- define "tatami.placement" -}}
nodeSelector:
  kubernetes.io/os: linux
  {{- with .of.nodeSelector }}{{ toYaml . | nindent 2 }}{{ end }}
{{- with .of.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* Pod annotations: dict "of" values "config" text */}}
{{- define "tatami.pod.annotations" -}}
checksum/pools: {{ .config | sha256sum }}
{{- with .of.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Replicas on different nodes, if there are: dict "of" values "labels" $labels */}}
{{- define "tatami.affinity" -}}
affinity:
{{- if .of.affinity }}
  {{- toYaml .of.affinity | nindent 2 }}
{{- else }}
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels: {{- include "tatami.selector" .labels | nindent 14 }}
{{- end }}
{{- end -}}

{{- define "tatami.groupSnapshots" -}}
{{- if .Capabilities.APIVersions.Has "groupsnapshot.storage.k8s.io/v1" }}true{{ end -}}
{{- end -}}
