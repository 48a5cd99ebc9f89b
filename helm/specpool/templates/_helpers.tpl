{{/* Prefix of all names: at most 40 characters, so that a StatefulSet "<prefix>-speculator" stays within the 52 that
its pods' revision label allows; a hash keeps shortened names apart. */}}
{{- define "specpool.fullname" -}}
{{- $chart := default .Chart.Name .Values.nameOverride -}}
{{- $name := printf "%s-%s" .Release.Name $chart -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if contains $chart .Release.Name -}}
{{- $name = .Release.Name -}}
{{- end -}}
{{- if gt (len $name) 40 -}}
{{- $name = printf "%s-%s" ($name | trunc 31 | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- $name | trimSuffix "-" -}}
{{- end -}}

{{/* Name of a component's resources; argument: dict root, component. */}}
{{- define "specpool.name" -}}
{{- printf "%s-%s" (include "specpool.fullname" .root) .component | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels that never change, for selectors; argument: dict root, component. */}}
{{- define "specpool.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "specpool.labels" -}}
{{ include "specpool.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 }}
{{- end -}}

{{/* The selector labels as one string, as the router's watch takes them. */}}
{{- define "specpool.selector" -}}
{{- $parts := list -}}
{{- range $key, $value := include "specpool.selectorLabels" . | fromYaml -}}
{{- $parts = append $parts (printf "%s=%s" $key $value) -}}
{{- end -}}
{{- join "," $parts -}}
{{- end -}}

{{- define "specpool.image" -}}
{{- with .root.Values.image -}}
{{- if .registry }}{{ trimSuffix "/" .registry }}/{{ end -}}
{{- .prefix }}-{{ $.component }}:{{ default $.root.Chart.AppVersion .tag -}}
{{- end -}}
{{- end -}}

{{/* Metadata of a pod template; argument: dict root, component. */}}
{{- define "specpool.podMetadata" -}}
labels:
  {{- include "specpool.labels" . | nindent 2 }}
{{- $annotated := eq .root.Values.telemetry.scrape "annotations" }}
{{- $tenants := and (eq .component "router") .root.Values.tenants.inline }}
{{- if or $annotated $tenants }}
annotations:
{{- end }}
{{- if $tenants }}
  # Routers read the file once: other tenants are another pod.
  checksum/tenants: {{ toYaml $tenants | sha256sum }}
{{- end }}
{{- if $annotated }}
  prometheus.io/scrape: "true"
  prometheus.io/port: {{ .root.Values.telemetry.metricsPort | quote }}
  prometheus.io/path: /metrics
{{- end }}
{{- end -}}

{{/* What every pod of ours has in its spec; argument: dict root, component. */}}
{{- define "specpool.podSpec" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
# Variables about Services named specpool-... would look like settings.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.drain }}
{{- /* Longer than pause and drain together by construction: nothing to keep in step by hand. */}}
terminationGracePeriodSeconds: {{ add .preStopSeconds .graceSeconds 15 }}
{{- end }}
{{- with index .root.Values .component }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "specpool.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What every container of ours has besides its environment; argument: dict root, component, startupTimeoutSeconds. */}}
{{- define "specpool.container" -}}
name: {{ .component }}
image: {{ include "specpool.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: [specpool, {{ .component }}]
securityContext:
  {{- include "specpool.containerSecurityContext" . | nindent 2 }}
ports:
  - name: grpc
    containerPort: {{ .root.Values.grpcPort }}
  - name: metrics
    containerPort: {{ .root.Values.telemetry.metricsPort }}
startupProbe:
  grpc: {port: {{ .root.Values.grpcPort }}}
  periodSeconds: 5
  failureThreshold: {{ div (add .startupTimeoutSeconds 4) 5 }}
readinessProbe:
  {{- if eq .component "router" }}
  # The router is there at once, but of use only while a target can take requests.
  grpc: {port: {{ .root.Values.grpcPort }}, service: specpool.v1.InferenceService}
  {{- else }}
  grpc: {port: {{ .root.Values.grpcPort }}}
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  # A draining server is not serving: only one that stays so for longer than a drain takes is restarted.
  grpc: {port: {{ .root.Values.grpcPort }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ div (add .root.Values.drain.graceSeconds 39) 10 }}
lifecycle:
  preStop:
    sleep:
      seconds: {{ .root.Values.drain.preStopSeconds }}
{{- end -}}

{{/* Environment that every service has; argument: dict root, component. */}}
{{- define "specpool.commonEnv" -}}
{{- $prefix := printf "SPECPOOL_%s" (upper .component) -}}
- name: POD_IP
  valueFrom:
    fieldRef: {fieldPath: status.podIP}
- name: {{ $prefix }}_ID
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
- name: {{ $prefix }}_LISTEN
  value: {{ printf "0.0.0.0:%d" (int .root.Values.grpcPort) | quote }}
- name: {{ $prefix }}_ADVERTISE
  value: {{ printf "$(POD_IP):%d" (int .root.Values.grpcPort) | quote }}
- name: {{ $prefix }}_DRAIN_GRACE_S
  value: {{ .root.Values.drain.graceSeconds | quote }}
- name: {{ $prefix }}_LOG_LEVEL
  value: {{ .root.Values.logLevel | quote }}
{{- with .root.Values.telemetry }}
- name: {{ $prefix }}_METRICS_PORT
  value: {{ .metricsPort | quote }}
- name: {{ $prefix }}_OTLP_ENDPOINT
  value: {{ .otlpEndpoint | quote }}
- name: {{ $prefix }}_TRACE_SAMPLING_RATIO
  value: {{ .samplingRatio | quote }}
{{- end }}
{{- end -}}

{{/* Environment of targets and speculators; argument: dict root, component. */}}
{{- define "specpool.engineEnv" -}}
{{- $prefix := printf "SPECPOOL_%s" (upper .component) -}}
{{ include "specpool.commonEnv" . }}
- name: {{ $prefix }}_MAX_LOOKAHEAD
  value: {{ .root.Values.speculation.lookahead | int | quote }}
{{- with index .root.Values .component }}
- name: {{ $prefix }}_MODEL
  value: {{ .model | quote }}
- name: {{ $prefix }}_DEVICE
  value: {{ .device | quote }}
- name: {{ $prefix }}_TENSOR_PARALLEL
  value: {{ max 1 (int .gpu.count) | quote }}
- name: {{ $prefix }}_DEVICE_MEMORY_SHARE
  value: {{ .gpu.memoryShare | quote }}
- name: {{ $prefix }}_DTYPE
  value: {{ .dtype | quote }}
- name: {{ $prefix }}_KV_CACHE_BYTES
  value: {{ .kvCacheBytes | int64 | quote }}
- name: {{ $prefix }}_ATTENTION_BACKEND
  value: {{ .attentionBackend | quote }}
- name: {{ $prefix }}_BLOCK_SIZE
  value: {{ .blockSize | int | quote }}
{{- end }}
- name: HOME
  value: /var/cache/specpool
- name: SPECPOOL_CACHE
  value: /var/cache/specpool
- name: HF_HOME
  value: /var/cache/specpool/huggingface
{{- with .root.Values.huggingFace.tokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: token}
{{- end }}
{{- end -}}

{{/* Arguments of this and the next: dict root, component. */}}
{{- define "specpool.engineVolumeMounts" -}}
- name: models
  mountPath: /var/cache/specpool
- name: tmp
  mountPath: /tmp
{{- if gt (int (index .root.Values .component).gpu.count) 1 }}
- name: shm
  mountPath: /dev/shm
{{- end }}
{{- end -}}

{{/* Volumes of targets and speculators. */}}
{{- define "specpool.engineVolumes" -}}
{{- with .root.Values.modelCache }}
- name: models
  {{- if .existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .existingClaim }}
  {{- else if .sizeLimit }}
  emptyDir:
    sizeLimit: {{ .sizeLimit }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}
- name: tmp
  emptyDir: {}
{{- if gt (int (index .root.Values .component).gpu.count) 1 }}
# NCCL's: the 64 MiB that a container has by default are too few.
- name: shm
  emptyDir:
    medium: Memory
{{- end }}
{{- end -}}

{{/* Resources of an engine: the user's, plus GPU and RDMA device; argument: dict root, component. */}}
{{- define "specpool.engineResources" -}}
{{- $engine := index .root.Values .component -}}
{{- $devices := dict -}}
{{- if $engine.gpu.count }}{{ $_ := set $devices $engine.gpu.resourceName (int $engine.gpu.count) }}{{ end -}}
{{- with .root.Values.fabric.rdmaResource }}{{ $_ := set $devices . 1 }}{{ end -}}
{{- $resources := deepCopy $engine.resources -}}
{{- if $devices -}}
{{- $_ := set $resources "limits" (merge $devices ($resources.limits | default dict)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "specpool.sessionStoreUrl" -}}
{{- if .Values.redis.enabled -}}
redis://{{ include "specpool.name" (dict "root" . "component" "redis") }}:6379/0
{{- else -}}
{{- .Values.redis.external.url -}}
{{- end -}}
{{- end -}}

{{- define "specpool.tenantsSecret" -}}
{{- if .Values.tenants.inline -}}
{{- include "specpool.name" (dict "root" . "component" "tenants") -}}
{{- else -}}
{{- .Values.tenants.existingSecret -}}
{{- end -}}
{{- end -}}
