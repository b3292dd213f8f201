{{/* The RayCluster. What changes here restarts all Ray pods where upgradeStrategy is Recreate: nothing names a version
     of the chart. CPUs, memory and GPUs stand in the containers' limits alone, from which operator and autoscaler read. */}}
{{- define "sapo-ray.raycluster" -}}
{{- $v := .Values -}}
{{- $perJob := eq $v.ray.mode "perJob" -}}
{{- $autoscales := include "sapo-ray.autoscales" . -}}
apiVersion: ray.io/v1
kind: RayCluster
metadata:
  {{- if not $perJob }}
  name: {{ include "sapo-ray.cluster" . }}
  namespace: {{ .Release.Namespace }}
  {{- end }}
  labels:
    {{- include (ternary "sapo-ray.selector" "sapo-ray.labels" $perJob) . | nindent 4 }}
    app.kubernetes.io/component: ray
    {{- with $v.kueue.queue }}
    kueue.x-k8s.io/queue-name: {{ . }}
    {{- end }}
    {{- with $v.kueue.priorityClass }}
    kueue.x-k8s.io/priority-class: {{ . }}
    {{- end }}
  {{- if and $v.kueue.queue $v.kueue.elastic }}
  annotations:
    kueue.x-k8s.io/elastic-job: "true"
  {{- end }}
spec:
  rayVersion: {{ $v.ray.version | quote }}
  enableInTreeAutoscaling: {{ ternary true false (ne $autoscales "") }}
  {{- if $autoscales }}
  autoscalerOptions:
    version: v2
    idleTimeoutSeconds: {{ $v.ray.autoscaling.idleTimeoutSeconds }}
    upscalingMode: {{ $v.ray.autoscaling.upscalingMode }}
    imagePullPolicy: {{ $v.image.pullPolicy }}
    resources:
      {{- toYaml $v.ray.autoscaling.resources | nindent 6 }}
    securityContext:
      {{- include "sapo-ray.containerSecurity" . | nindent 6 }}
    env:
      - name: HOME
        value: /tmp
      {{- include "sapo-ray.noToken" . | nindent 6 }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      - {{- include "sapo-ray.accountMount" . | nindent 8 }}
  {{- end }}
  upgradeStrategy:
    type: {{ ternary "None" $v.ray.upgradeStrategy $perJob }}
  {{- if not $perJob }}
  authOptions:
    mode: {{ ternary "token" "disabled" $v.ray.auth.enabled }}
    {{- if and $v.ray.auth.enabled $v.ray.auth.existingSecret }}
    secretName: {{ $v.ray.auth.existingSecret }}
    {{- end }}
  {{- end }}
  {{- if $v.ray.gcsFaultTolerance.enabled }}
  gcsFaultToleranceOptions:
    redisAddress: {{ $v.ray.gcsFaultTolerance.redisAddress }}
    {{- with $v.ray.gcsFaultTolerance.existingSecret }}
    redisPassword:
      valueFrom:
        secretKeyRef:
          name: {{ . }}
          key: {{ $v.ray.gcsFaultTolerance.passwordKey }}
    {{- end }}
  {{- end }}
  headGroupSpec:
    rayStartParams:
      num-cpus: "0"
      dashboard-host: "0.0.0.0"
      object-store-memory: {{ include "sapo-ray.objectStore" $v.ray.head | quote }}
    template:
      {{- include "sapo-ray.rayPod" (dict "root" . "pod" $v.ray.head "name" "head" "head" true) | nindent 6 }}
  workerGroupSpecs:
    {{- range $name, $group := (fromYaml (include "sapo-ray.groups" .)).groups }}
    - groupName: {{ $name }}
      minReplicas: {{ int $group.min }}
      maxReplicas: {{ int $group.max }}
      replicas: {{ int $group.min }}
      numOfHosts: 1
      {{- if $autoscales }}
      {{- if $group.idleTimeoutSeconds }}
      idleTimeoutSeconds: {{ int $group.idleTimeoutSeconds }}
      {{- end }}
      {{- if $group.priority }}
      priority: {{ int $group.priority }}
      {{- end }}
      {{- end }}
      labels:
        sapo-ray.io/role: {{ $group.role }}
      rayStartParams:
        object-store-memory: {{ include "sapo-ray.objectStore" $group | quote }}
      template:
        {{- include "sapo-ray.rayPod" (dict "root" $ "pod" $group "name" $name "head" false) | nindent 8 }}
    {{- end }}
{{- end -}}

{{/* A pod of the cluster. Takes root, pod (ray.head or a group), name, and whether it is the head. */}}
{{- define "sapo-ray.rayPod" -}}
{{- $v := .root.Values -}}
metadata:
  labels:
    {{- include "sapo-ray.rayLabels" .root | nindent 4 }}
    app.kubernetes.io/component: ray-{{ .name }}
  {{- with .pod.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ ternary (include "sapo-ray.headAccount" .root) (include "sapo-ray.workerAccount" .root) .head }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- include "sapo-ray.pullSecrets" .root | nindent 2 }}
  securityContext:
    {{- include "sapo-ray.podSecurity" .root | nindent 4 }}
  {{- with include "sapo-ray.scheduling" .pod }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
    - name: ray-{{ ternary "head" "worker" .head }}
      image: {{ default (include "sapo-ray.image" (list .root "worker")) .pod.image }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      securityContext:
        {{- include "sapo-ray.containerSecurity" .root | nindent 8 }}
      env:
        - name: HOME
          value: /tmp
        # For podSecurity.runAsUser that the image does not know: torch and vLLM name folders after the user.
        - name: USER
          value: sapo
        {{- include "sapo-ray.noToken" .root | nindent 8 }}
        {{- if and (eq $v.ray.accelerator "gpu") (not .pod.gpus) }}
        # Where NVIDIA's runtime is the node's default, an image may ask for all GPUs, and Ray would count them here.
        - name: NVIDIA_VISIBLE_DEVICES
          value: void
        {{- end }}
        - name: HF_HOME
          value: {{ $v.storage.mountPath }}/cache/{{ ternary "$(SAPO_TENANT)/" "" (eq $v.ray.mode "perJob") }}huggingface
        - name: RAY_USAGE_STATS_ENABLED
          value: "0"
        {{- if .head }}
        - name: SAPO_ROLE_LABEL
          value: sapo-ray.io/role
        - name: SAPO_ACCELERATOR
          value: {{ $v.ray.accelerator }}
        # Time a driver has between SIGTERM and SIGKILL; of itself Ray gives three seconds.
        - name: RAY_JOB_STOP_WAIT_TIME_S
          value: "10"
        {{- end }}
        {{- with $v.ray.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if .head }}
      ports:
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
      {{- end }}
      resources:
        {{- range $kind := list "requests" "limits" }}
        {{ $kind }}:
          cpu: {{ $.pod.cpu | quote }}
          memory: {{ $.pod.memory | quote }}
          {{- if $.pod.gpus }}
          {{ $.pod.gpuResource }}: {{ int $.pod.gpus }}
          {{- end }}
          {{- range $resource, $amount := $.pod.extraResources }}
          {{ $resource }}: {{ $amount }}
          {{- end }}
        {{- end }}
      volumeMounts:
        {{- include "sapo-ray.rayData" .root | trim | nindent 8 }}
        - name: shm
          mountPath: /dev/shm
        - name: tmp
          mountPath: /tmp
        {{- with $v.ray.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - {{- include "sapo-ray.dataVolume" .root | nindent 6 }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .pod.shm }}
    - name: tmp
      emptyDir: {}
    {{- if and .head (include "sapo-ray.autoscales" .root) }}
    - {{- include "sapo-ray.accountVolume" .root | nindent 6 }}
    {{- end }}
    {{- with $v.ray.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* The images want a token, and KubeRay takes nothing back of that. */}}
{{- define "sapo-ray.noToken" -}}
{{- if not .Values.ray.auth.enabled }}
- name: RAY_AUTH_MODE
  value: disabled
{{- end }}
{{- end -}}
