{{/* A peer: pods of one of our components. Takes: list root component. */}}
{{- define "nvila.peer" -}}
- podSelector:
    matchLabels:
      {{- include "nvila.selector" . | nindent 6 }}
{{- end }}

{{/* A NetworkPolicy's head: whom it is for. Takes: list root component. */}}
{{- define "nvila.policy" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "nvila.metadata" . | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "nvila.selector" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
{{- end }}

{{/* Names may be looked up. */}}
{{- define "nvila.egressDns" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end }}

{{/* Peers: those who ask vision and decode. Takes: root. */}}
{{- define "nvila.askers" -}}
{{- include "nvila.peer" (list . "gateway") }}
{{- if .Values.recordings.enabled }}
{{ include "nvila.peer" (list . "recordings") }}
{{- end }}
{{- end }}

{{/* Media from public addresses, and what else the operator allows. Takes: list root ports. */}}
{{- define "nvila.egressMedia" -}}
{{- $policy := (index . 0).Values.networkPolicy -}}
- ports:
    {{- range index . 1 }}
    - {port: {{ . }}}
    {{- end }}
  to:
    - ipBlock:
        cidr: 0.0.0.0/0
        {{- with $policy.fetchExcept }}
        except:
          {{- toYaml . | nindent 10 }}
        {{- end }}
{{- with $policy.fetchTo }}
- to:
    {{- toYaml . | nindent 4 }}
{{- end }}
{{- end }}

{{/* The database of recordings. Takes: root. */}}
{{- define "nvila.egressDatabase" -}}
{{- if .Values.recordings.enabled }}
{{ include "nvila.egressOutside" (list . (list (int .Values.recordings.database.port))) }}
{{- end }}
{{- end }}

{{/* One of our own services. Takes: list root component ports. */}}
{{- define "nvila.egressOwn" -}}
- to:
    {{- include "nvila.peer" (list (index . 0) (index . 1)) | nindent 4 }}
  ports:
    {{- range index . 2 }}
    - {port: {{ . }}}
    {{- end }}
{{- end }}

{{/* A service outside of the release. Takes: list root ports. */}}
{{- define "nvila.egressOutside" -}}
- ports:
    {{- range index . 1 }}
    - {port: {{ . }}}
    {{- end }}
  {{- with (index . 0).Values.networkPolicy.servicesTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* Token cache and collector, own or external: every program needs them. Takes: root. */}}
{{- define "nvila.egressCommon" -}}
{{- include "nvila.egressDns" . }}
{{- if .Values.redis.enabled }}
{{ include "nvila.egressOwn" (list . "redis" (list 6379)) }}
{{- else }}
{{ include "nvila.egressOutside" (list . (list (int .Values.redis.external.port))) }}
{{- end }}
{{- if .Values.tracing.endpoint }}
{{- $port := regexFind ":[0-9]+" (get (urlParse .Values.tracing.endpoint) "host") | trimPrefix ":" }}
{{- $port = $port | default (hasPrefix "https:" .Values.tracing.endpoint | ternary "443" "80") | int }}
{{- $ports := eq $port 4317 | ternary (list 4317 4318) (list $port) }}
{{ include "nvila.egressOutside" (list . $ports) }}
{{- else if .Values.tracing.collector.enabled }}
{{ include "nvila.egressOwn" (list . "collector" (list 4317 4318)) }}
{{- end }}
{{- end }}

{{/* Where weights come from: the hub, its mirror, or a store over HTTPS (or a store's own port). Takes: root. */}}
{{- define "nvila.egressModel" -}}
{{- if has .Values.model.source (list "hub" "objectStore") }}
{{- $ports := list 443 80 9000 }}
{{- with regexFind ":[0-9]+" (get (urlParse .Values.model.hub.endpoint) "host") }}
{{- $ports = append $ports (trimPrefix ":" . | int) | uniq }}
{{- end }}
{{ include "nvila.egressOutside" (list . $ports) }}
{{- end }}
{{- end }}
