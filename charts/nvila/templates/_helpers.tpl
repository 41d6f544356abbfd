{{/*
Names, labels, images and addresses: everything that two templates must agree on.
*/}}

{{/* The chart's name, for labels. */}}
{{- define "nvila.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/*
Beginning of all names, at most 40 characters: KubeRay allows 47 for a RayService, and "-decode" follows. A name that is
cut ends in a hash of the whole, so that two releases whose names begin alike stay apart.
*/}}
{{- define "nvila.fullname" -}}
{{- $chart := .Values.nameOverride | default .Chart.Name }}
{{- $release := contains $chart .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $chart) }}
{{- $name := .Values.fullnameOverride | default $release }}
{{- if gt (len $name) 40 }}
{{- $name = printf "%s-%s" (trunc 33 $name | trimSuffix "-") (sha256sum $name | trunc 6) }}
{{- end }}
{{- $name }}
{{- end }}

{{/* Name of a component's objects. Takes: list root component. */}}
{{- define "nvila.component" -}}
{{- printf "%s-%s" (include "nvila.fullname" (index . 0)) (index . 1) }}
{{- end }}

{{/* What selects a component's pods; never changes over upgrades. Takes: list root component. */}}
{{- define "nvila.selector" -}}
app.kubernetes.io/name: {{ include "nvila.name" (index . 0) }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Labels of a component's objects. Takes: list root component. */}}
{{- define "nvila.labels" -}}
{{- $root := index . 0 }}
{{- include "nvila.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: nvila
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Name and labels of an object. Takes: list root component. */}}
{{- define "nvila.metadata" -}}
name: {{ include "nvila.component" . }}
namespace: {{ (index . 0).Release.Namespace }}
labels:
  {{- include "nvila.labels" . | nindent 2 }}
{{- end }}

{{/* An image's address: its registry or the one for all, its digest or its tag. Takes: list root image. */}}
{{- define "nvila.image" -}}
{{- $root := index . 0 }}
{{- $image := index . 1 }}
{{- $registry := $root.Values.images.registry | default $image.registry }}
{{- $name := empty $registry | ternary $image.repository (printf "%s/%s" $registry $image.repository) }}
{{- if $image.digest }}
{{- printf "%s@%s" $name $image.digest }}
{{- else }}
{{- printf "%s:%s" $name ($image.tag | default $root.Chart.AppVersion) }}
{{- end }}
{{- end }}

{{/* DNS name of a component's service. Takes: list root component. */}}
{{- define "nvila.host" -}}
{{- printf "%s.%s.svc.%s" (include "nvila.component" .) (index . 0).Release.Namespace (index . 0).Values.clusterDomain }}
{{- end }}

{{/* Folder of the certificate for calls between our programs; nothing where they speak in the clear. */}}
{{- define "nvila.tlsFolder" -}}
{{- if .Values.tls.enabled }}/etc/nvila/tls{{ end }}
{{- end }}

{{/* Port of decode's gRPC API: with TLS one that speaks nothing else. */}}
{{- define "nvila.decodePort" -}}
{{- .Values.tls.enabled | ternary 9443 9000 }}
{{- end }}

{{/* Application protocol of vision's and decode's ports. */}}
{{- define "nvila.grpcProtocol" -}}
{{- .Values.tls.enabled | ternary "https" "kubernetes.io/h2c" }}
{{- end }}

{{/* Whether the vision pool may be empty: "true" or nothing. */}}
{{- define "nvila.visionMaySleep" -}}
{{- $auto := .Values.vision.autoscaling }}
{{- if and (eq $auto.kind "keda") $auto.scaleToZero.enabled }}true{{ end }}
{{- end }}

{{/* Secret with the API keys. */}}
{{- define "nvila.keysSecret" -}}
{{- .Values.gateway.auth.existingSecret | default (include "nvila.component" (list . "gateway-keys")) }}
{{- end }}

{{/* A secret's value that outlives upgrades: what the cluster has, else a new one. Takes: list root secret key. */}}
{{- define "nvila.kept" -}}
{{- $root := index . 0 }}
{{- $known := (lookup "v1" "Secret" $root.Release.Namespace (index . 1)).data | default dict }}
{{- get $known (index . 2) | default (randAlphaNum 32 | b64enc) }}
{{- end }}

{{/* What contradicts itself; each message says what to do. */}}
{{- define "nvila.check" -}}
{{- $v := .Values }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "nvila.fullname" .)) }}
{{- fail (printf "%s cannot begin the names of Services, which need lower case, digits and dashes after a letter: set fullnameOverride" (include "nvila.fullname" .)) }}
{{- end }}
{{- if and (eq $v.model.source "hub") (empty $v.model.hub.repo) }}
{{- fail "model.source is hub: name the repository in model.hub.repo" }}
{{- end }}
{{- $publisher := $v.model.hub.repo | splitList "/" | first | lower }}
{{- if and (eq $v.model.source "hub") (has $publisher (list "efficient-large-model" "nvidia")) (ne $v.model.acceptLicense "CC-BY-NC-4.0") }}
{{- fail (printf "%s is published under CC-BY-NC-4.0 (no commercial use). Set model.acceptLicense=CC-BY-NC-4.0 if you accept that" $v.model.hub.repo) }}
{{- end }}
{{- if and (eq $v.model.source "objectStore") (empty $v.model.objectStore.path) }}
{{- fail "model.source is objectStore: say which folder in model.objectStore.path" }}
{{- end }}
{{- if and (eq $v.model.source "existingClaim") (empty $v.model.existingClaim.name) }}
{{- fail "model.source is existingClaim: name the claim in model.existingClaim.name" }}
{{- end }}
{{- if and (not $v.redis.enabled) (empty $v.redis.external.host) }}
{{- fail "redis.enabled is false: say in redis.external.host which Redis holds the visual tokens" }}
{{- end }}
{{- if and (not $v.redis.enabled) (empty $v.redis.auth.existingSecret) }}
{{- fail "redis.external needs redis.auth.existingSecret, with the passwords of its users" }}
{{- end }}
{{- if and $v.redis.external.cluster $v.redis.external.database }}
{{- fail (printf "redis.external.cluster: a Redis Cluster has database 0 only, and redis.external.database is %d" (int $v.redis.external.database)) }}
{{- end }}
{{- if or (hasKey ($v.redis.resources.limits | default dict) "memory") (hasKey ($v.redis.resources.requests | default dict) "memory") }}
{{- fail "redis.resources: memory follows from redis.maxMemoryMiB, half as much again; set that instead" }}
{{- end }}
{{- if and $v.redis.tls.enabled (empty $v.redis.tls.existingSecret) }}
{{- fail "redis.tls.enabled needs redis.tls.existingSecret, with its certificates" }}
{{- end }}
{{- if and $v.tls.enabled (empty $v.tls.existingSecret) }}
{{- fail "tls.enabled needs tls.existingSecret, with ca.crt, tls.crt and tls.key for vision and decode" }}
{{- end }}
{{- $ray := eq $v.decode.mode "rayservice" }}
{{- $kind := $v.decode.autoscaling.kind }}
{{- if and $ray (has $kind (list "keda" "hpa")) }}
{{- fail (printf "decode.autoscaling.kind is %s, which cannot scale a RayService: set it to ray" $kind) }}
{{- end }}
{{- if and (not $ray) (eq $kind "ray") }}
{{- fail "decode.autoscaling.kind is ray, which needs decode.mode=rayservice; with deployment choose keda or hpa" }}
{{- end }}
{{- if and $ray (eq $v.decode.rayservice.upgradeStrategy "NewClusterWithIncrementalUpgrade") (or (ne $kind "ray") (empty $v.decode.rayservice.incremental.gatewayClassName)) }}
{{- fail "decode.rayservice.upgradeStrategy NewClusterWithIncrementalUpgrade needs decode.autoscaling.kind=ray and decode.rayservice.incremental.gatewayClassName" }}
{{- end }}
{{- if eq (int $v.gateway.service.httpPort) (int $v.gateway.service.grpcPort) }}
{{- fail (printf "gateway.service.httpPort and grpcPort are both %d: one of them must be another" (int $v.gateway.service.httpPort)) }}
{{- end }}
{{- range $pool := list "gateway" "vision" "decode" }}
{{- $auto := (index $v $pool).autoscaling }}
{{- if gt (int $auto.minReplicas) (int $auto.maxReplicas) }}
{{- fail (printf "%s.autoscaling.minReplicas is %d, more than maxReplicas, %d" $pool (int $auto.minReplicas) (int $auto.maxReplicas)) }}
{{- end }}
{{- end }}
{{- if and $v.gateway.route.enabled (empty $v.gateway.route.parentRefs) }}
{{- fail "gateway.route.enabled: name the gateways in gateway.route.parentRefs" }}
{{- end }}
{{- end }}
