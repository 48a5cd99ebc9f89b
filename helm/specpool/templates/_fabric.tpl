{{/* Where speculators go. They follow the targets: were both sides to require each other, neither could be first.
Nearness is preferred, never required, because one pool serves targets on many nodes; EFA does not work between
pods of one node, so there distance is required. */}}
{{- define "specpool.fabricAffinity" -}}
{{- $fabric := .Values.fabric -}}
{{- $targets := include "specpool.selectorLabels" (dict "root" . "component" "target") -}}
{{- if ne $fabric.profile "none" -}}
podAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: {{ include "specpool.fabricTopologyKey" . }}
        labelSelector:
          matchLabels:
            {{- $targets | nindent 12 }}
{{- end }}
{{- if eq $fabric.profile "efa" }}
podAntiAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    - topologyKey: kubernetes.io/hostname
      labelSelector:
        matchLabels:
          {{- $targets | nindent 10 }}
{{- end }}
{{- end -}}

{{- define "specpool.fabricTopologyKey" -}}
{{- $own := ternary "kubernetes.io/hostname" "topology.kubernetes.io/zone" (eq .Values.fabric.profile "same-node") -}}
{{- default $own .Values.fabric.topologyKey -}}
{{- end -}}
