{{/*
ACL rules of each role, as the docstring of services/nvila/cache/store.py lists what it needs. `-@all` first: nothing
else, no other keys, no channels. NOTES.txt adds what a client of a Redis Cluster needs. The probe may only ask whether
the server lives.
*/}}
{{- define "nvila.redisRules" -}}
gateway: "~nvila:* -@all +exists +set +get +eval +pttl +pexpire +unlink +info"
vision: "~nvila:* -@all +set +unlink"
decode: "~nvila:* -@all +exists +get +eval +pttl +pexpire"
{{- end }}
