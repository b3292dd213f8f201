{{/* Names. All begin with the fullname; its bound keeps every name that KubeRay makes from the cluster's whole. */}}
{{- define "sapo-ray.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name -}}
{{- end -}}
{{- end -}}

{{- define "sapo-ray.control" -}}{{ include "sapo-ray.fullname" . }}-control{{- end -}}
{{- define "sapo-ray.cluster" -}}{{ include "sapo-ray.fullname" . }}-cluster{{- end -}}
{{- define "sapo-ray.manifest" -}}{{ include "sapo-ray.fullname" . }}-raycluster{{- end -}}
{{- define "sapo-ray.jobCluster" -}}{{ include "sapo-ray.fullname" . }}-job-cluster{{- end -}}
{{- define "sapo-ray.headAccount" -}}{{ include "sapo-ray.fullname" . }}-ray-head{{- end -}}
{{- define "sapo-ray.workerAccount" -}}{{ include "sapo-ray.fullname" . }}-ray-worker{{- end -}}
{{- define "sapo-ray.dataClaim" -}}
{{- default (printf "%s-data" (include "sapo-ray.fullname" .)) .Values.storage.existingClaim -}}
{{- end -}}
{{- define "sapo-ray.databaseClaim" -}}
{{- default (printf "%s-database" (include "sapo-ray.fullname" .)) .Values.database.sqlite.existingClaim -}}
{{- end -}}

{{/* Labels. Those of pods that Ray makes name no version: a change of them would restart all of them. */}}
{{- define "sapo-ray.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "sapo-ray.labels" -}}
{{ include "sapo-ray.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "sapo-ray.rayLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
sapo-ray.io/service: {{ include "sapo-ray.fullname" . }}
{{- end -}}

{{/* Ray pods of this release, by labels: of its one cluster, or of all that the service has made for jobs and marked. */}}
{{- define "sapo-ray.raySelector" -}}
{{- if eq .Values.ray.mode "perJob" -}}
sapo-ray.io/service: {{ include "sapo-ray.control" . }}
{{- else -}}
ray.io/cluster: {{ include "sapo-ray.cluster" . }}
{{- end -}}
{{- end -}}

{{/* Whether Ray's autoscaler runs; the service itself sizes clusters that it has made for one job. */}}
{{- define "sapo-ray.autoscales" -}}
{{- if and .Values.ray.autoscaling.enabled (ne .Values.ray.mode "perJob") -}}true{{- end -}}
{{- end -}}

{{/* An image of image.control or image.worker: digest before tag before appVersion. Takes (list $ "control"). */}}
{{- define "sapo-ray.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.image (index . 1) -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "sapo-ray.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "sapo-ray.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.runAsUser }}
runAsGroup: {{ .Values.podSecurity.runAsGroup }}
fsGroup: {{ .Values.podSecurity.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
{{- with .Values.podSecurity.supplementalGroups }}
supplementalGroups: {{ toJson . }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "sapo-ray.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Where its pods run, of control, ray.head or a group. */}}
{{- define "sapo-ray.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "sapo-ray.dataVolume" -}}
name: data
{{- if .Values.storage.hostPath }}
hostPath:
  path: {{ .Values.storage.hostPath }}
  type: Directory
{{- else }}
persistentVolumeClaim:
  claimName: {{ include "sapo-ray.dataClaim" . }}
{{- end }}
{{- end -}}

{{/* Which folders of the storage a Ray pod sees, and where. With a cluster for each job: the job's run, its tenant's data
     sets and downloads, and what is everybody's. The service fills in job and tenant. */}}
{{- define "sapo-ray.rayData" -}}
{{- $at := .Values.storage.mountPath -}}
{{- if eq .Values.ray.mode "perJob" -}}
{{- range $folder := list "runs/$(SAPO_JOB_ID)" "datasets/$(SAPO_TENANT)" "cache/$(SAPO_TENANT)" }}
- name: data
  mountPath: {{ $at }}/{{ $folder }}
  subPath: {{ $folder }}
  {{- if hasPrefix "datasets" $folder }}
  readOnly: true
  {{- end }}
{{- end }}
{{- range .Values.storage.sharedFolders }}
- name: data
  mountPath: {{ $at }}/{{ . }}
  subPath: {{ . }}
  readOnly: true
{{- end }}
{{- else }}
- name: data
  mountPath: {{ $at }}
{{- end }}
{{- end -}}

{{/* The pod's account, for the one container that needs it: what is mounted everywhere is everybody's. */}}
{{- define "sapo-ray.accountVolume" -}}
name: kube-account
projected:
  defaultMode: 288
  sources:
    - serviceAccountToken:
        path: token
        expirationSeconds: 3607
    - configMap:
        name: kube-root-ca.crt
        items:
          - key: ca.crt
            path: ca.crt
    - downwardAPI:
        items:
          - path: namespace
            fieldRef:
              fieldPath: metadata.namespace
{{- end -}}

{{- define "sapo-ray.accountMount" -}}
name: kube-account
mountPath: /var/run/secrets/kubernetes.io/serviceaccount
readOnly: true
{{- end -}}

{{/* A setting as the environment has it: lists as JSON, whole numbers without exponent. */}}
{{- define "sapo-ray.setting" -}}
{{- if kindIs "slice" . -}}
{{- toJson . -}}
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* Worker groups with what groupDefaults say, as YAML of {groups: {name: group}}. */}}
{{- define "sapo-ray.groups" -}}
{{- $groups := dict -}}
{{- range $name, $group := .Values.ray.groups -}}
{{- if $group -}}
{{- $_ := set $groups $name (mergeOverwrite (deepCopy $.Values.ray.groupDefaults) (deepCopy $group)) -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "groups" $groups) -}}
{{- end -}}

{{/* Bytes of a Kubernetes quantity, as a string. */}}
{{- define "sapo-ray.bytes" -}}
{{- $unit := regexFind "[A-Za-z]*$" (toString .) -}}
{{- $power := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976 -}}
{{- mulf (trimSuffix $unit (toString .) | float64) (get $power $unit | float64) | int64 -}}
{{- end -}}

{{/* What Ray's object store takes of a pod's /dev/shm. Left to itself Ray takes three tenths of the memory, and where
     that is more than there is shared memory, it puts all objects on disk. */}}
{{- define "sapo-ray.objectStore" -}}
{{- mulf (include "sapo-ray.bytes" .shm | float64) 0.8 | int64 -}}
{{- end -}}
