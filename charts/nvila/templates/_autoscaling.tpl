{{/* How fast a pool grows and shrinks. Takes: the pool's autoscaling values. */}}
{{- define "nvila.behavior" -}}
scaleUp:
  stabilizationWindowSeconds: {{ .upStabilizationSeconds }}
  selectPolicy: Max
  policies:
    - {type: Percent, value: {{ .upPercentPerMinute }}, periodSeconds: 60}
    - {type: Pods, value: 2, periodSeconds: 60}
scaleDown:
  stabilizationWindowSeconds: {{ .downStabilizationSeconds }}
  policies:
    - {type: Percent, value: {{ .downPercentPerMinute }}, periodSeconds: 60}
{{- end }}

{{/* Labels by which Prometheus knows a component's samples. Takes: list root component. */}}
{{- define "nvila.samples" -}}
namespace="{{ (index . 0).Release.Namespace }}",app_kubernetes_io_instance="{{ (index . 0).Release.Name }}",app_kubernetes_io_component="{{ index . 1 }}"
{{- end }}

{{/*
A Prometheus trigger. KEDA wants as many pods as its value goes into the sum. A query without result is an error, not
zero, so that missing metrics lead to the fallback and not to an empty pool. Takes: dict root name query threshold.
*/}}
{{- define "nvila.trigger" -}}
- type: prometheus
  name: {{ .name }}
  metricType: AverageValue
  metadata:
    serverAddress: {{ .root.Values.monitoring.prometheusUrl | quote }}
    query: {{ .query | quote }}
    threshold: {{ .threshold | toString | quote }}
    ignoreNullValues: "false"
  {{- with .root.Values.monitoring.triggerAuthentication }}
  authenticationRef:
    name: {{ . }}
  {{- end }}
{{- end }}

{{/* A HorizontalPodAutoscaler on a backlog metric. Takes: list root component metric. */}}
{{- define "nvila.backlogHpa" -}}
{{- $root := index . 0 }}
{{- $auto := (index $root.Values (index . 1)).autoscaling }}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  {{- include "nvila.metadata" (list $root (index . 1)) | nindent 2 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ include "nvila.component" (list $root (index . 1)) }}
  minReplicas: {{ $auto.minReplicas }}
  maxReplicas: {{ $auto.maxReplicas }}
  metrics:
    - type: Pods
      pods:
        metric:
          name: {{ index . 2 }}
        target:
          type: AverageValue
          averageValue: {{ $auto.targetBacklogSeconds | quote }}
  behavior:
    {{- include "nvila.behavior" $auto | nindent 4 }}
{{- end }}
