{{/* Annotations of ingress-nginx: whole bodies pass unbuffered, answers as they come, no time limit before ours. */}}
{{- define "nvila.nginx" -}}
{{- if eq .Values.gateway.ingress.className "nginx" }}
nginx.ingress.kubernetes.io/proxy-body-size: "0"
nginx.ingress.kubernetes.io/proxy-buffering: "off"
nginx.ingress.kubernetes.io/proxy-request-buffering: "off"
nginx.ingress.kubernetes.io/proxy-read-timeout: {{ add .Values.requestTimeoutSeconds 30 | quote }}
nginx.ingress.kubernetes.io/proxy-send-timeout: {{ add .Values.requestTimeoutSeconds 30 | quote }}
{{- end }}
{{- end }}

{{/* An Ingress' spec. Takes: list root host port-name. */}}
{{- define "nvila.ingressSpec" -}}
{{- $root := index . 0 }}
{{- with $root.Values.gateway.ingress.className }}
ingressClassName: {{ . }}
{{- end }}
{{- with $root.Values.gateway.ingress.tlsSecret }}
tls:
  - hosts: [{{ index $ 1 | quote }}]
    secretName: {{ . }}
{{- end }}
rules:
  - host: {{ index . 1 | quote }}
    http:
      paths:
        - path: /
          pathType: Prefix
          backend:
            service:
              name: {{ include "nvila.component" (list $root "gateway") }}
              port:
                name: {{ index . 2 }}
{{- end }}
