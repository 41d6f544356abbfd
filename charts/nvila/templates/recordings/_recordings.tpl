{{/*
Where recordings are kept: what gateway and workers must agree on.
*/}}

{{/* Environment with the database, the cold store and the keys of what is secret. Takes: list root prefix-of-the-variables. */}}
{{- define "nvila.recordingsEnv" -}}
{{- $own := (index . 0).Values.recordings }}
{{- if $own.enabled -}}
- name: NVILA_{{ index . 1 }}_DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ $own.database.existingSecret }}
      key: url
{{- with $own.secretKeys.existingSecret }}
- name: NVILA_{{ index $ 1 }}_SECRET_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: keys
{{- end }}
{{- with $own.coldUrl }}
- name: NVILA_{{ index $ 1 }}_COLD_URL
  value: {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* The object store's credentials, as its library reads them. Takes: root. */}}
{{- define "nvila.recordingsStore" -}}
{{- with .Values.recordings }}
{{- if and .enabled .coldSecret -}}
envFrom:
  - secretRef:
      name: {{ .coldSecret }}
{{- end }}
{{- end }}
{{- end }}

{{/* What contradicts itself; each message says what to do. Takes: root. */}}
{{- define "nvila.recordingsCheck" -}}
{{- $v := .Values }}
{{- if empty $v.recordings.database.existingSecret }}
{{- fail "recordings.enabled: name a secret with the address of a PostgreSQL database (key url) in recordings.database.existingSecret" }}
{{- end }}
{{- if not $v.gateway.data.persistence.enabled }}
{{- fail "recordings.enabled: gateway and workers share uploaded files and live video: set gateway.data.persistence.enabled" }}
{{- end }}
{{- end }}
