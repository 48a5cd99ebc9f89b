{{/* A PodMonitor that keeps the metrics named in files/metrics.yaml; argument: dict root, component. */}}
{{- define "specpool.podMonitor" -}}
{{- $names := index (.root.Files.Get "files/metrics.yaml" | fromYaml) .component -}}
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata:
  name: {{ include "specpool.name" . }}
  labels:
    {{- include "specpool.labels" . | nindent 4 }}
    {{- with .root.Values.telemetry.podMonitor.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  selector:
    matchLabels:
      {{- include "specpool.selectorLabels" . | nindent 6 }}
  podMetricsEndpoints:
    - port: metrics
      path: /metrics
      interval: {{ .root.Values.telemetry.podMonitor.interval }}
      metricRelabelings:
        - action: keep
          sourceLabels: [__name__]
          regex: ({{ join "|" $names }})(_bucket|_sum|_count)?
{{- end -}}
