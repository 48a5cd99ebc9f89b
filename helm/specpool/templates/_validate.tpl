{{/* Refuses values that contradict each other, naming both. Limits of single values are in values.schema.json. */}}
{{- define "specpool.validate" -}}
{{- $errors := concat
  (include "specpool.validateEngines" . | fromJsonArray)
  (include "specpool.validateColocated" . | fromJsonArray)
  (include "specpool.validateSpeculation" . | fromJsonArray)
  (include "specpool.validateFabric" . | fromJsonArray)
  (include "specpool.validateStores" . | fromJsonArray)
  (include "specpool.validateTelemetry" . | fromJsonArray) -}}
{{- if $errors -}}
{{- fail (printf "contradictory values:\n- %s" (join "\n- " $errors)) -}}
{{- end -}}
{{- end -}}

{{- define "specpool.validateEngines" -}}
{{- $errors := list -}}
{{- range $name := list "target" "speculator" -}}
{{- $engine := index $.Values $name -}}
{{- $count := int $engine.gpu.count -}}
{{- if and (eq $engine.device "cuda") (eq $count 0) -}}
{{- $errors = append $errors (printf "%s.device is cuda but %s.gpu.count is 0: set the count to 1, or the device to cpu" $name $name) -}}
{{- end -}}
{{- if and (eq $engine.device "cpu") (gt $count 0) -}}
{{- $errors = append $errors (printf "%s.device is cpu but %s.gpu.count is %d: the GPU would stand idle; set the count to 0" $name $name $count) -}}
{{- end -}}
{{- if and (gt $count 1) (contains "mig-" $engine.gpu.resourceName) -}}
{{- $errors = append $errors (printf "%s.gpu.count is %d but %s.gpu.resourceName is %s: a model cannot be split over MIG slices" $name $count $name $engine.gpu.resourceName) -}}
{{- end -}}
{{- if and (eq $engine.device "cpu") (lt (float64 $engine.gpu.memoryShare) 1.0) -}}
{{- $errors = append $errors (printf "%s.gpu.memoryShare is %v but %s.device is cpu: only a GPU is shared out" $name $engine.gpu.memoryShare $name) -}}
{{- end -}}
{{- if and (eq $engine.device "cpu") (eq $engine.dtype "float16") -}}
{{- $errors = append $errors (printf "%s.dtype is float16 but %s.device is cpu: use bfloat16 or float32 there" $name $name) -}}
{{- end -}}
{{- if and (eq $engine.attentionBackend "native") (eq $engine.device "cuda") -}}
{{- $errors = append $errors (printf "%s.attentionBackend is native but %s.device is cuda: use sdpa, flex or flash there" $name $name) -}}
{{- end -}}
{{- if eq $engine.attentionBackend "flash" -}}
{{- if eq $engine.device "cpu" -}}
{{- $errors = append $errors (printf "%s.attentionBackend is flash but %s.device is cpu: use sdpa or native there" $name $name) -}}
{{- end -}}
{{- if eq $engine.dtype "float32" -}}
{{- $errors = append $errors (printf "%s.attentionBackend is flash but %s.dtype is float32: use bfloat16 or float16, or sdpa or flex" $name $name) -}}
{{- end -}}
{{- if ne (mod (int $engine.blockSize) 256) 0 -}}
{{- $errors = append $errors (printf "%s.attentionBackend is flash but %s.blockSize is %d: it needs a multiple of 256" $name $name (int $engine.blockSize)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{- define "specpool.validateColocated" -}}
{{- $errors := list -}}
{{- if .Values.colocated -}}
{{- range $name := list "target" "speculator" -}}
{{- $engine := index $.Values $name -}}
{{- if ne $engine.device "cuda" -}}
{{- $errors = append $errors (printf "colocated is true but %s.device is %s: both engines share one CUDA device" $name $engine.device) -}}
{{- end -}}
{{- if gt (int $engine.gpu.count) 1 -}}
{{- $errors = append $errors (printf "colocated is true but %s.gpu.count is %d: both engines share one GPU" $name (int $engine.gpu.count)) -}}
{{- end -}}
{{- end -}}
{{- $target := .Values.target -}}
{{- $speculator := .Values.speculator -}}
{{- if ne $target.gpu.resourceName $speculator.gpu.resourceName -}}
{{- $errors = append $errors (printf "colocated is true but target.gpu.resourceName is %s and speculator.gpu.resourceName is %s: name the one resource that the device plugin shares" $target.gpu.resourceName $speculator.gpu.resourceName) -}}
{{- end -}}
{{- if and (eq $target.device $speculator.device) (gt (addf $target.gpu.memoryShare $speculator.gpu.memoryShare) 1.0) -}}
{{- $errors = append $errors (printf "colocated is true but target.gpu.memoryShare is %v and speculator.gpu.memoryShare is %v: together they must be at most 1, for example 0.75 and 0.2" $target.gpu.memoryShare $speculator.gpu.memoryShare) -}}
{{- end -}}
{{- if or (eq (int $speculator.replicas) 0) (gt (int $speculator.replicas) (int $target.replicas)) -}}
{{- $errors = append $errors (printf "colocated is true but speculator.replicas is %d and target.replicas is %d: each speculator needs a target's GPU" (int $speculator.replicas) (int $target.replicas)) -}}
{{- end -}}
{{- if has .Values.speculation.distributionTransport (list "nccl" "auto") -}}
{{- $errors = append $errors (printf "colocated is true but speculation.distributionTransport is %s: NCCL refuses two processes on one GPU, set it to grpc or gloo" .Values.speculation.distributionTransport) -}}
{{- end -}}
{{- if ne .Values.fabric.profile "none" -}}
{{- $errors = append $errors (printf "colocated is true but fabric.profile is %s: pods that share a GPU are on one node, set it to none" .Values.fabric.profile) -}}
{{- end -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{- define "specpool.validateSpeculation" -}}
{{- $errors := list -}}
{{- with .Values.speculation -}}
{{- if lt (int .rowBudget) (int .fanOut) -}}
{{- $errors = append $errors (printf "speculation.rowBudget is %d but speculation.fanOut is %d: the rows of one step must hold the guesses of one sequence" (int .rowBudget) (int .fanOut)) -}}
{{- end -}}
{{- if eq .distributionTransport "nccl" -}}
{{- range $name := list "target" "speculator" -}}
{{- if eq (index $.Values $name).device "cpu" -}}
{{- $errors = append $errors (printf "speculation.distributionTransport is nccl but %s.device is cpu: nccl moves tensors between GPUs; use gloo" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{- define "specpool.validateFabric" -}}
{{- $errors := list -}}
{{- with .Values.fabric -}}
{{- $rdma := has .profile (list "infiniband" "ethernet-rdma" "efa") -}}
{{- if and $rdma (not .rdmaResource) -}}
{{- $errors = append $errors (printf "fabric.profile is %s but fabric.rdmaResource is empty: name the device plugin's resource" .profile) -}}
{{- end -}}
{{- if and (not $rdma) .rdmaResource -}}
{{- $errors = append $errors (printf "fabric.rdmaResource is %s but fabric.profile is %s, which uses no RDMA device" .rdmaResource .profile) -}}
{{- end -}}
{{- if and (eq .profile "none") .topologyKey -}}
{{- $errors = append $errors (printf "fabric.topologyKey is %s but fabric.profile is none, which places pods anywhere" .topologyKey) -}}
{{- end -}}
{{- if and (eq .profile "same-node") .topologyKey (ne .topologyKey "kubernetes.io/hostname") -}}
{{- $errors = append $errors (printf "fabric.topologyKey is %s but fabric.profile is same-node: leave the key empty" .topologyKey) -}}
{{- end -}}
{{- if and (ne .profile "none") (eq (int $.Values.speculator.replicas) 0) -}}
{{- $errors = append $errors (printf "fabric.profile is %s but speculator.replicas is 0: there is no speculator to place" .profile) -}}
{{- end -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{- define "specpool.validateStores" -}}
{{- $errors := list -}}
{{- with .Values.redis -}}
{{- if and .enabled .external.url -}}
{{- $errors = append $errors (printf "redis.enabled is true but redis.external.url is %s: choose one session store" .external.url) -}}
{{- end -}}
{{- if and .enabled .external.existingSecret -}}
{{- $errors = append $errors (printf "redis.enabled is true but redis.external.existingSecret is %s: choose one session store" .external.existingSecret) -}}
{{- end -}}
{{- if and .external.url .external.existingSecret -}}
{{- $errors = append $errors (printf "redis.external.url is %s but redis.external.existingSecret is %s: give the URL once" .external.url .external.existingSecret) -}}
{{- end -}}
{{- if not (or .enabled .external.url .external.existingSecret) -}}
{{- $errors = append $errors "redis.enabled is false but redis.external.url and redis.external.existingSecret are empty: routers need a session store" -}}
{{- end -}}
{{- if and (not .enabled) .storage -}}
{{- $errors = append $errors (printf "redis.storage is %s but redis.enabled is false: there is no volume to size" .storage) -}}
{{- end -}}
{{- end -}}
{{- with .Values.tenants -}}
{{- if and .inline .existingSecret -}}
{{- $errors = append $errors (printf "tenants.inline is set but tenants.existingSecret is %s: keep the tenants in one place" .existingSecret) -}}
{{- end -}}
{{- if and $.Values.helmTest.apiKeySecret (not (or .inline .existingSecret)) -}}
{{- $errors = append $errors (printf "helmTest.apiKeySecret is %s but tenants.inline and tenants.existingSecret are empty: no key is asked for" $.Values.helmTest.apiKeySecret) -}}
{{- end -}}
{{- end -}}
{{- with .Values.modelCache -}}
{{- if and .existingClaim .sizeLimit -}}
{{- $errors = append $errors (printf "modelCache.existingClaim is %s but modelCache.sizeLimit is %s: the claim has its own size" .existingClaim .sizeLimit) -}}
{{- end -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{- define "specpool.validateTelemetry" -}}
{{- $errors := list -}}
{{- if eq (int .Values.grpcPort) (int .Values.telemetry.metricsPort) -}}
{{- $errors = append $errors (printf "grpcPort is %d but telemetry.metricsPort is %d: they must differ" (int .Values.grpcPort) (int .Values.telemetry.metricsPort)) -}}
{{- end -}}
{{- if and .Values.telemetry.podMonitor.labels (ne .Values.telemetry.scrape "podMonitor") -}}
{{- $errors = append $errors (printf "telemetry.podMonitor.labels is set but telemetry.scrape is %s: there is no PodMonitor to label" .Values.telemetry.scrape) -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}
