{{/*
What pods of all components have in common.
*/}}

{{/* Labels and annotations of a pod. Takes: list root component, and a text whose change restarts pods. */}}
{{- define "nvila.podMetadata" -}}
{{- $root := index . 0 -}}
labels:
  {{- include "nvila.labels" (list $root (index . 1)) | nindent 2 }}
{{- $annotations := $root.Values.podAnnotations | deepCopy }}
{{- if gt (len .) 2 }}
{{- $_ := set $annotations "nvila/checksum" (index . 2 | sha256sum) }}
{{- end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Identity and placement. Takes: list root component values-of-the-component. */}}
{{- define "nvila.podSpec" -}}
{{- $root := index . 0 }}
{{- $component := index . 1 }}
{{- $own := index . 2 -}}
serviceAccountName: {{ include "nvila.component" (list $root $component) }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- toYaml $root.Values.podSecurityContext | nindent 2 }}
{{- with $root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- include "nvila.placement" . }}
{{- end }}

{{/* Name of one of our priority classes, which are not in a namespace. Takes: list root front-or-pools. */}}
{{- define "nvila.priorityClass" -}}
{{- printf "%s-%s" (index . 0).Release.Namespace (include "nvila.component" .) }}
{{- end }}

{{/* Where pods run. Takes: list root component values-of-the-component. */}}
{{- define "nvila.placement" -}}
{{- $root := index . 0 }}
{{- $component := index . 1 }}
{{- $own := index . 2 }}
{{- $class := $own.priorityClassName }}
{{- if and (not $class) $root.Values.priorityClasses.create }}
{{- $class = include "nvila.priorityClass" (list $root (has $component (list "gateway" "recordings" "redis") | ternary "front" "pools")) }}
{{- end }}
{{- with $class }}
priorityClassName: {{ . }}
{{- end }}
{{- with $own.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $own.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.spreadOver }}
topologySpreadConstraints:
  {{- range . }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "nvila.selector" (list $root $component) | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Resources of a pool's container, its GPUs included. Takes: values of the component. */}}
{{- define "nvila.resources" -}}
{{- $resources := deepCopy .resources }}
{{- if .gpu.count }}
{{- $limits := merge (dict .gpu.resource .gpu.count) ($resources.limits | default dict) }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* Environment from a map of settings. Takes: list prefix map. Lists become comma-separated; numbers stay whole. */}}
{{- define "nvila.settings" -}}
{{- $prefix := index . 0 }}
{{- range $field, $value := index . 1 }}
- name: {{ $prefix }}{{ upper $field }}
  value: {{ if kindIs "slice" $value }}{{ join "," $value | quote }}
    {{- else if and (kindIs "float64" $value) (eq (floor $value) $value) }}{{ $value | int64 | toString | quote }}
    {{- else }}{{ $value | toString | quote }}{{ end }}
{{- end }}
{{- end }}

{{/* Home, and where spans go. Takes: list root component. */}}
{{- define "nvila.commonEnv" -}}
{{- $root := index . 0 }}
{{- $tracing := $root.Values.tracing -}}
- name: HOME
  value: /tmp
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- $endpoint := $tracing.endpoint }}
{{- $protocol := $tracing.protocol }}
{{- if and (not $endpoint) $tracing.collector.enabled }}
{{- $endpoint = printf "http://%s:4317" (include "nvila.host" (list $root "collector")) }}
{{- $protocol = "grpc" }}
{{- end }}
{{- if $endpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ $endpoint | quote }}
- name: OTEL_EXPORTER_OTLP_PROTOCOL
  value: {{ $protocol | quote }}
- name: OTEL_TRACES_SAMPLER
  value: parentbased_traceidratio
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ $tracing.sampleRatio | quote }}
- name: OTEL_RESOURCE_ATTRIBUTES
  value: service.namespace={{ $root.Release.Name }},service.instance.id=$(POD_NAME),k8s.namespace.name={{ $root.Release.Namespace }},k8s.pod.name=$(POD_NAME)
{{- if $tracing.captureContent }}
- name: OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT
  value: "true"
{{- end }}
{{- end }}
{{- end }}

{{/* Environment with the address of the token cache as one role sees it. Takes: list root role, and the program when it
has another name than the role. */}}
{{- define "nvila.redisEnv" -}}
{{- $root := index . 0 }}
{{- $role := index . 1 }}
{{- $redis := $root.Values.redis }}
{{- $scheme := $redis.tls.enabled | ternary "rediss" "redis" }}
{{- if and (not $redis.enabled) $redis.external.cluster }}
{{- $scheme = printf "%s+cluster" $scheme }}
{{- end }}
{{- $query := $redis.tls.enabled | ternary "?ssl_ca_certs=/etc/nvila/redis-ca/ca.crt" "" }}
{{- $user := $redis.enabled | ternary $role (get $redis.external.users $role) }}
{{- $host := $redis.enabled | ternary (include "nvila.host" (list $root "redis")) $redis.external.host }}
{{- $port := $redis.enabled | ternary 6379 $redis.external.port | int }}
{{- $database := $redis.enabled | ternary 0 $redis.external.database | int -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "nvila.redisSecret" $root }}
      key: {{ $role }}-password
- name: NVILA_{{ last . | upper }}_REDIS_URL
  value: {{ printf "%s://%s:$(REDIS_PASSWORD)@%s:%d/%d%s" $scheme $user $host $port $database $query | quote }}
{{- end }}

{{/* Secret with the passwords of the token cache. */}}
{{- define "nvila.redisSecret" -}}
{{- .Values.redis.auth.existingSecret | default (include "nvila.component" (list . "redis")) }}
{{- end }}

{{/* Volumes of every pod of a program. Takes: list root shared-memory-MiB. */}}
{{- define "nvila.volumes" -}}
{{- $root := index . 0 -}}
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ index . 1 }}Mi
- name: tmp
  emptyDir: {}
{{- if $root.Values.redis.tls.enabled }}
- name: redis-ca
  secret:
    secretName: {{ $root.Values.redis.tls.existingSecret }}
    items:
      - key: ca.crt
        path: ca.crt
{{- end }}
{{- if include "nvila.tlsFolder" $root }}
- name: tls
  secret:
    secretName: {{ $root.Values.tls.existingSecret }}
{{- end }}
{{- end }}

{{/* And where they are seen. Takes: root. */}}
{{- define "nvila.mounts" -}}
- name: shared-memory
  mountPath: /dev/shm
- name: tmp
  mountPath: /tmp
{{- if .Values.redis.tls.enabled }}
- name: redis-ca
  mountPath: /etc/nvila/redis-ca
  readOnly: true
{{- end }}
{{- with include "nvila.tlsFolder" . }}
- name: tls
  mountPath: {{ . }}
  readOnly: true
{{- end }}
{{- end }}

{{/* MiB of shared memory of each component: what the program fills, and room for its bookkeeping. */}}
{{- define "nvila.sharedMiB.gateway" -}}{{ add .Values.gateway.frameMemoryMiB 64 }}{{- end }}
{{- define "nvila.sharedMiB.recordings" -}}{{ add .Values.recordings.frameMemoryMiB 64 }}{{- end }}
{{- define "nvila.sharedMiB.vision" -}}{{ add .Values.vision.pendingMiB 256 (div .Values.vision.pendingMiB 4) }}{{- end }}
{{- define "nvila.sharedMiB.decode" -}}{{ add .Values.decode.objectStoreMiB 256 (mul 1024 (sub (max 1 .Values.decode.gpu.count) 1)) }}{{- end }}
