{{/* Never two pods of a component on one node, of which each GPU holds one of either; argument: dict root, component. */}}
{{- define "specpool.apart" -}}
podAntiAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    - topologyKey: kubernetes.io/hostname
      labelSelector:
        matchLabels:
          {{- include "specpool.selectorLabels" . | nindent 10 }}
{{- end -}}

{{/* A speculator beside a target. Required, and on this side only: targets can always be first. */}}
{{- define "specpool.colocatedAffinity" -}}
podAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    - topologyKey: kubernetes.io/hostname
      labelSelector:
        matchLabels:
          {{- include "specpool.selectorLabels" (dict "root" . "component" "target") | nindent 10 }}
{{ include "specpool.apart" (dict "root" . "component" "speculator") }}
{{- end -}}
