{{/*
What the decode program is told, alike in a plain pod, a Ray head and a Ray worker. Takes: list root fewest most replicas
of one Ray cluster.
*/}}
{{- define "nvila.decodeEnv" -}}
{{- $root := index . 0 }}
{{- $own := $root.Values.decode }}
{{- include "nvila.commonEnv" (list $root "decode") }}
- name: NVILA_DECODE_MODEL
  value: {{ include "nvila.modelFolder" $root }}
- name: NVILA_DECODE_MODEL_NAME
  value: {{ include "nvila.modelName" $root }}
{{ include "nvila.redisEnv" (list $root "decode") }}
- name: NVILA_DECODE_HOST
  value: 0.0.0.0
- name: NVILA_DECODE_HTTP_PORT
  value: "8100"
- name: NVILA_DECODE_GRPC_PORT
  value: "9000"
{{- with include "nvila.tlsFolder" $root }}
- name: NVILA_DECODE_TLS_DIR
  value: {{ . }}
- name: NVILA_DECODE_TLS_PORT
  value: {{ include "nvila.decodePort" $root | quote }}
{{- end }}
- name: NVILA_DECODE_MIN_REPLICAS
  value: {{ index . 1 | quote }}
- name: NVILA_DECODE_MAX_REPLICAS
  value: {{ index . 2 | quote }}
- name: NVILA_DECODE_TARGET_ONGOING_REQUESTS
  value: {{ $own.autoscaling.targetOngoingRequests | quote }}
- name: NVILA_DECODE_REPLICA_GPUS
  value: {{ $own.gpu.count | quote }}
- name: NVILA_DECODE_DRAIN_S
  value: {{ $root.Values.requestTimeoutSeconds | int | quote }}
{{- include "nvila.settings" (list "NVILA_DECODE_" $own.settings) }}
{{- with $own.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}
