{{/*
The checkpoint: fetched and checked by init containers of the pods that need it, seen at /models/<name>.
*/}}

{{/* Name of the model, and of its folder. */}}
{{- define "nvila.modelName" -}}
{{- $model := .Values.model }}
{{- $default := "random-tiny" }}
{{- if eq $model.source "hub" }}{{ $default = base $model.hub.repo }}{{ end }}
{{- if eq $model.source "objectStore" }}{{ $default = base $model.objectStore.path }}{{ end }}
{{- if eq $model.source "existingClaim" }}{{ $default = base ($model.existingClaim.subPath | default $model.existingClaim.name) }}{{ end }}
{{- $model.name | default $default }}
{{- end }}

{{- define "nvila.modelFolder" -}}
/models/{{ include "nvila.modelName" . }}
{{- end }}

{{/* Claim that holds it; nothing when each pod has its own. */}}
{{- define "nvila.modelClaim" -}}
{{- if eq .Values.model.source "existingClaim" }}{{ .Values.model.existingClaim.name }}
{{- else if eq .Values.model.volume.kind "claim" }}{{ include "nvila.component" (list . "model") }}
{{- end }}
{{- end }}

{{- define "nvila.modelVolumes" -}}
- name: model
  {{- if include "nvila.modelClaim" . }}
  persistentVolumeClaim:
    claimName: {{ include "nvila.modelClaim" . }}
    {{- if eq .Values.model.source "existingClaim" }}
    readOnly: true
    {{- end }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.model.volume.size }}
  {{- end }}
- name: model-script
  configMap:
    name: {{ include "nvila.component" (list . "model") }}
{{- end }}

{{/* Where a program sees it, read-only. */}}
{{- define "nvila.modelMount" -}}
- name: model
  mountPath: {{ eq .Values.model.source "existingClaim" | ternary (include "nvila.modelFolder" .) "/models" }}
  {{- with and (eq .Values.model.source "existingClaim") .Values.model.existingClaim.subPath }}
  subPath: {{ . }}
  {{- end }}
  readOnly: true
{{- end }}

{{/* What brings it there. Takes: list root image-of-the-component. */}}
{{- define "nvila.modelInit" -}}
{{- $root := index . 0 }}
{{- $model := $root.Values.model }}
{{- $folder := include "nvila.modelFolder" $root }}
{{- if eq $model.source "objectStore" -}}
- name: copy-model
  image: {{ include "nvila.image" (list $root $model.objectStore.image) }}
  imagePullPolicy: {{ $root.Values.images.pullPolicy }}
  securityContext:
    {{- toYaml $root.Values.securityContext | nindent 4 }}
  command: [sh, -c]
  args:
    - 'test -e "$FOLDER/../.$(basename "$FOLDER").complete" || rclone copy --config="" --checksum "$SOURCE" "$FOLDER"'
  env:
    - name: HOME
      value: /tmp
    - name: SOURCE
      value: {{ $model.objectStore.path | quote }}
    - name: FOLDER
      value: {{ $folder }}
  {{- with $model.objectStore.existingSecret }}
  envFrom:
    - secretRef:
        name: {{ . }}
  {{- end }}
  resources:
    requests: {cpu: 500m, memory: 256Mi}
    limits: {memory: 1Gi}
  volumeMounts:
    - name: model
      mountPath: /models
    - name: tmp
      mountPath: /tmp
{{- end }}
{{- if or (ne $model.source "existingClaim") $model.sha256 }}
- name: prepare-model
  image: {{ include "nvila.image" (list $root (index . 1)) }}
  imagePullPolicy: {{ $root.Values.images.pullPolicy }}
  securityContext:
    {{- toYaml $root.Values.securityContext | nindent 4 }}
  command: [python, /etc/nvila/model/prepare_model.py]
  args:
    - {{ $model.source }}
    - {{ $folder }}
    {{- if eq $model.source "hub" }}
    - --repo={{ $model.hub.repo }}
    - --revision={{ $model.hub.revision }}
    {{- end }}
    {{- with $model.sha256 }}
    - --sha256={{ . }}
    {{- end }}
  env:
    - name: HOME
      value: /tmp
    {{- if eq $model.source "hub" }}
    {{- with $model.hub.endpoint }}
    - name: HF_ENDPOINT
      value: {{ . | quote }}
    {{- end }}
    {{- with $model.hub.existingSecret }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef:
          name: {{ . }}
          key: token
    {{- end }}
    {{- end }}
  resources:
    requests: {cpu: 500m, memory: 1Gi}
    limits: {memory: 4Gi}
  volumeMounts:
    {{- if eq $model.source "existingClaim" }}
    {{- include "nvila.modelMount" $root | nindent 4 }}
    {{- else }}
    - name: model
      mountPath: /models
    {{- end }}
    - name: model-script
      mountPath: /etc/nvila/model
      readOnly: true
    - name: tmp
      mountPath: /tmp
{{- end }}
{{- end }}
