{{/* Secrets of yours that are named and not there, or lack their key. Only where Helm can look: every namespace has the
     ConfigMap kube-root-ca.crt, and `helm template` finds none. */}}
{{- define "sapo-ray.secretChecks" -}}
{{- $v := .Values -}}
{{- $ns := .Release.Namespace -}}
{{- $found := list -}}
{{- if lookup "v1" "ConfigMap" $ns "kube-root-ca.crt" -}}
{{- range (fromYaml (include "sapo-ray.namedSecrets" .)).named -}}
{{- if .name -}}
{{- $make := printf "kubectl -n %s create secret generic %s --from-literal=%s=%s" $ns .name (default "NAME" .key) .example -}}
{{- $secret := lookup "v1" "Secret" $ns .name -}}
{{- if not $secret -}}
{{- $found = append $found (printf "%s: there is no Secret %s in namespace %s; make it with `%s`" .at .name $ns $make) -}}
{{- else if and .key (not (get (default dict $secret.data) .key)) -}}
{{- $or := ternary (printf ", or set %s to one that it has" .keyAt) "" (not (empty .keyAt)) -}}
{{- $found = append $found (printf "%s: Secret %s in namespace %s has no key %s; add it with `%s --dry-run=client -o yaml | kubectl apply -f -`%s" .at .name $ns .key $make $or) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "found" $found) -}}
{{- end -}}

{{/* Where a Secret is named, its name if there is one, the key that it needs, where that is set, and what it may hold. */}}
{{- define "sapo-ray.namedSecrets" -}}
{{- $v := .Values -}}
named:
  {{- if eq $v.database.kind "postgresql" }}
  - {{ toJson (dict "at" "database.postgresql.existingSecret" "name" $v.database.postgresql.existingSecret "key" $v.database.postgresql.key "keyAt" "database.postgresql.key" "example" "postgresql+psycopg://user:password@host/name") }}
  {{- end }}
  - {{ toJson (dict "at" "control.adminKey.existingSecret" "name" $v.control.adminKey.existingSecret "key" $v.control.adminKey.key "keyAt" "control.adminKey.key" "example" "$(openssl rand -hex 24)") }}
  {{- range $tenant, $name := $v.control.tenantSecrets }}
  - {{ toJson (dict "at" (printf "control.tenantSecrets.%s" $tenant) "name" $name "example" "VALUE") }}
  {{- end }}
  {{- if eq $v.ray.mode "external" }}
  - {{ toJson (dict "at" "ray.external.tokenSecret" "name" $v.ray.external.tokenSecret "key" $v.ray.external.tokenKey "keyAt" "ray.external.tokenKey" "example" "TOKEN") }}
  {{- else }}
  {{- if $v.ray.auth.enabled }}
  - {{ toJson (dict "at" "ray.auth.existingSecret" "name" $v.ray.auth.existingSecret "key" "auth_token" "example" "$(openssl rand -hex 32)") }}
  {{- end }}
  {{- if $v.ray.gcsFaultTolerance.enabled }}
  - {{ toJson (dict "at" "ray.gcsFaultTolerance.existingSecret" "name" $v.ray.gcsFaultTolerance.existingSecret "key" $v.ray.gcsFaultTolerance.passwordKey "keyAt" "ray.gcsFaultTolerance.passwordKey" "example" "PASSWORD") }}
  {{- end }}
  {{- end }}
{{- end -}}
