{{/* What no schema can say: values that contradict each other. All problems at once, each with its key and remedy. */}}
{{- define "sapo-ray.checks" -}}
{{- $v := .Values -}}
{{- $found := list -}}
{{- $name := include "sapo-ray.fullname" . -}}
{{- if gt (len $name) 36 -}}
{{- $found = append $found (printf "fullnameOverride: the name %q, from the release's, has %d characters and KubeRay's names have room for 36; set fullnameOverride to a shorter one" $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- $found = append $found (printf "fullnameOverride: the name %q, from the release's, is none that a Service may have; set fullnameOverride to one that begins with a letter and has only a-z, 0-9 and -" $name) -}}
{{- end -}}
{{- if and (eq $v.database.kind "sqlite") (gt (int $v.control.replicas) 1) -}}
{{- $found = append $found (printf "control.replicas: is %d, but with database.kind=sqlite one pod alone may write; set control.replicas=1, or database.kind=postgresql with database.postgresql.existingSecret" (int $v.control.replicas)) -}}
{{- end -}}
{{- if and (eq $v.database.kind "postgresql") (not $v.database.postgresql.existingSecret) -}}
{{- $found = append $found (printf "database.postgresql.existingSecret: is empty, but database.kind=postgresql needs the Secret that holds the database's URL; make it with `kubectl -n %s create secret generic sapo-ray-database --from-literal=%s=postgresql+psycopg://user:password@host/name` and name it here" .Release.Namespace $v.database.postgresql.key) -}}
{{- end -}}
{{- if not $v.singleNode -}}
{{- if $v.storage.hostPath -}}
{{- $found = append $found "storage.hostPath: a folder of one node is not shared with the others; use storage.existingClaim or storage.storageClass with accessMode=ReadWriteMany, or set singleNode=true if there is one node only" -}}
{{- else if ne $v.storage.accessMode "ReadWriteMany" -}}
{{- $found = append $found (printf "storage.accessMode: is %s, which pods of one node alone can share; set it to ReadWriteMany with a storage.storageClass that can, or singleNode=true if there is one node only" $v.storage.accessMode) -}}
{{- end -}}
{{- end -}}
{{- if and $v.storage.hostPath $v.storage.existingClaim -}}
{{- $found = append $found "storage.hostPath: is set beside storage.existingClaim; keep one of the two" -}}
{{- end -}}
{{- if and $v.storage.existingClaim (not $v.singleNode) -}}
{{- $claim := lookup "v1" "PersistentVolumeClaim" .Release.Namespace $v.storage.existingClaim -}}
{{- if and $claim (not (has "ReadWriteMany" (dig "spec" "accessModes" list $claim))) -}}
{{- $found = append $found (printf "storage.existingClaim: %s is not ReadWriteMany; name one that is, or set singleNode=true if there is one node only" $v.storage.existingClaim) -}}
{{- end -}}
{{- end -}}
{{- if and $v.control.ingress.enabled (not $v.control.ingress.host) -}}
{{- $found = append $found "control.ingress.host: is empty; set the host name by which the service is reached, or control.ingress.enabled=false" -}}
{{- end -}}
{{- if and $v.control.ingress.enabled $v.networkPolicy.enabled (not $v.networkPolicy.ingressFrom) -}}
{{- $found = append $found "networkPolicy.ingressFrom: is empty, so the Ingress could reach nothing; set it to the controller's pods, e.g. [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ingress-nginx}}}]" -}}
{{- end -}}
{{- if and (ne $v.control.service.type "ClusterIP") $v.networkPolicy.enabled -}}
{{- $outside := false -}}
{{- range $v.networkPolicy.apiFrom -}}{{- if or .ipBlock .namespaceSelector -}}{{- $outside = true -}}{{- end -}}{{- end -}}
{{- if not $outside -}}
{{- $found = append $found (printf "networkPolicy.apiFrom: lets in pods of this namespace alone, so a Service of type %s would reach nothing; add whom it is for, e.g. {ipBlock: {cidr: 203.0.113.0/24}}" $v.control.service.type) -}}
{{- end -}}
{{- end -}}
{{- if and $v.monitoring.serviceMonitor.enabled (not $v.monitoring.metrics) -}}
{{- $found = append $found "monitoring.metrics: is false, so the ServiceMonitor would find nothing; set it to true, or monitoring.serviceMonitor.enabled=false" -}}
{{- end -}}
{{- if and $v.monitoring.alerts.enabled (not $v.monitoring.metrics) -}}
{{- $found = append $found "monitoring.metrics: is false, so the alerts would know of nothing; set it to true, or monitoring.alerts.enabled=false" -}}
{{- end -}}
{{- range $part := list "control" "ray" -}}
{{- $names := list -}}
{{- range (index $v $part).extraVolumes -}}{{- $names = append $names .name -}}{{- end -}}
{{- range (index $v $part).extraVolumeMounts -}}
{{- if not (has .name $names) -}}
{{- $found = append $found (printf "%s.extraVolumeMounts: %s is not among %s.extraVolumes; add it there" $part .name $part) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $v.kueue.priorityClass (not $v.kueue.queue) -}}
{{- $found = append $found "kueue.priorityClass: means nothing without kueue.queue; set kueue.queue too" -}}
{{- end -}}
{{- if eq $v.ray.mode "external" -}}
{{- if not $v.ray.external.jobsUrl -}}
{{- $found = append $found "ray.external.jobsUrl: is empty, but ray.mode=external needs your cluster's dashboard; set it, e.g. http://head.ray.svc:8265" -}}
{{- end -}}
{{- if $v.kueue.queue -}}
{{- $found = append $found "kueue.queue: means nothing with ray.mode=external; leave it empty" -}}
{{- end -}}
{{- else -}}
{{- if $v.ray.external.jobsUrl -}}
{{- $found = append $found (printf "ray.external.jobsUrl: is set, but ray.mode is %s; set ray.mode=external, or leave it empty" $v.ray.mode) -}}
{{- end -}}
{{- if and $v.ray.auth.enabled (semverCompare "<2.52.0" $v.ray.version) -}}
{{- $found = append $found (printf "ray.version: %s has no token authentication; use images with Ray 2.52 or later, or set ray.auth.enabled=false" $v.ray.version) -}}
{{- end -}}
{{- if and $v.ray.auth.existingSecret (eq $v.ray.auth.existingSecret (include "sapo-ray.cluster" .)) -}}
{{- $found = append $found (printf "ray.auth.existingSecret: must not bear the RayCluster's own name %s, under which the operator keeps its; rename the Secret" $v.ray.auth.existingSecret) -}}
{{- end -}}
{{- if and $v.ray.gcsFaultTolerance.enabled (not $v.ray.gcsFaultTolerance.redisAddress) -}}
{{- $found = append $found "ray.gcsFaultTolerance.redisAddress: is empty; set host:port of a Redis, or ray.gcsFaultTolerance.enabled=false" -}}
{{- end -}}
{{- if eq $v.ray.mode "perJob" -}}
{{- $found = concat $found (fromYaml (include "sapo-ray.perJobChecks" .)).found -}}
{{- else if $v.storage.sharedFolders -}}
{{- $found = append $found (printf "storage.sharedFolders: is for ray.mode=perJob, and ray.mode is %s; leave it empty" $v.ray.mode) -}}
{{- end -}}
{{- if and $v.kueue.queue (include "sapo-ray.autoscales" .) (not $v.kueue.elastic) -}}
{{- $found = append $found "kueue.elastic: is false, and Kueue then refuses a cluster that scales itself; set it to true if Kueue has the feature gate ElasticJobsViaWorkloadSlices, or ray.autoscaling.enabled=false" -}}
{{- end -}}
{{- $found = concat $found (fromYaml (include "sapo-ray.groupChecks" .)).found -}}
{{- end -}}
{{- $found = concat $found (fromYaml (include "sapo-ray.secretChecks" .)).found -}}
{{- if $found -}}
{{- fail (printf "\n\nThese values cannot work:\n  - %s\n" (join "\n  - " $found)) -}}
{{- end -}}
{{- end -}}

{{- define "sapo-ray.groupChecks" -}}
{{- $v := .Values -}}
{{- $perJob := eq $v.ray.mode "perJob" -}}
{{- $found := list -}}
{{- $most := dict "rollout" 0 "learner" 0 "verifier" 0 -}}
{{- $least := 0 -}}
{{- $pods := dict -}}
{{- range $name, $group := (fromYaml (include "sapo-ray.groups" .)).groups -}}
{{- $key := printf "ray.groups.%s" $name -}}
{{- $_ := set $pods $key $group -}}
{{- if not $group.role -}}
{{- $found = append $found (printf "%s.role: is missing; set rollout, learner or verifier" $key) -}}
{{- else -}}
{{- $size := ternary $group.max $group.min (or $v.ray.autoscaling.enabled $perJob) | int -}}
{{- $_ := set $most $group.role (add (index $most $group.role) $size) -}}
{{- if eq $group.role "verifier" -}}{{- $least = add $least (int $group.min) -}}{{- end -}}
{{- if gt (int $group.min) (int $group.max) -}}
{{- $found = append $found (printf "%s.max: is %d, less than min, %d; raise max or lower min" $key (int $group.max) (int $group.min)) -}}
{{- end -}}
{{- if and (eq $v.ray.accelerator "gpu") (ne $group.role "verifier") (eq (int $group.gpus) 0) -}}
{{- $found = append $found (printf "%s.gpus: is 0, but with ray.accelerator=gpu each %s needs GPUs; set it to 1 or more, or ray.accelerator=cpu" $key $group.role) -}}
{{- end -}}
{{- if and (eq $v.ray.accelerator "cpu") (gt (int $group.gpus) 0) -}}
{{- $found = append $found (printf "%s.gpus: is %d, but with ray.accelerator=cpu nothing would use them; set it to 0, or ray.accelerator=gpu" $key (int $group.gpus)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $key, $pod := merge (dict "ray.head" $v.ray.head) $pods -}}
{{- if ge (include "sapo-ray.bytes" $pod.shm | float64) (include "sapo-ray.bytes" $pod.memory | float64) -}}
{{- $found = append $found (printf "%s.shm: is %v, and shared memory counts in with the memory, %v; set it to about three tenths of %s.memory" $key $pod.shm $pod.memory $key) -}}
{{- end -}}
{{- end -}}
{{- range $role, $size := $most -}}
{{- if eq (int $size) 0 -}}
{{- $found = append $found (printf "ray.groups: no node can have the role %s, so no job could start; give a group of that role a %s of 1 or more" $role (ternary "max" "min" (or $v.ray.autoscaling.enabled $perJob))) -}}
{{- end -}}
{{- end -}}
{{- if and (gt (int $most.verifier) 0) (eq (int $least) 0) (not $perJob) -}}
{{- $found = append $found "ray.groups.verifier.min: is 0, but a verifier must start within 120 s, sooner than a node comes; set min to 1 or more for one verifier group" -}}
{{- end -}}
{{- toYaml (dict "found" $found) -}}
{{- end -}}

{{- define "sapo-ray.perJobChecks" -}}
{{- $v := .Values -}}
{{- $found := list -}}
{{- if not (and $v.ray.auth.enabled $v.ray.auth.existingSecret) -}}
{{- $found = append $found (printf "ray.auth: with ray.mode=perJob each job's cluster has a token of its own, derived from one of the service's; set ray.auth.enabled=true and ray.auth.existingSecret to a Secret that `kubectl -n %s create secret generic sapo-ray-token --from-literal=auth_token=$(openssl rand -hex 32)` makes" .Release.Namespace) -}}
{{- end -}}
{{- if $v.ray.gcsFaultTolerance.enabled -}}
{{- $found = append $found "ray.gcsFaultTolerance.enabled: is true, but with ray.mode=perJob a lost head takes its driver with it, and the job goes on in a new cluster; set it to false" -}}
{{- end -}}
{{- if and $v.kueue.queue (not $v.kueue.elastic) -}}
{{- $found = append $found "kueue.elastic: is false, and Kueue then suspends a cluster whose size the service changes; set it to true if Kueue has the feature gate ElasticJobsViaWorkloadSlices, or leave kueue.queue empty" -}}
{{- end -}}
{{- range $name, $group := (fromYaml (include "sapo-ray.groups" .)).groups -}}
{{- if and $group.role (ne $name $group.role) -}}
{{- $found = append $found (printf "ray.groups.%s: with ray.mode=perJob there is one group for each role, of the role's name; move its values to ray.groups.%s and set ray.groups.%s=null" $name $group.role $name) -}}
{{- end -}}
{{- end -}}
{{- range .Values.storage.sharedFolders -}}
{{- if has (first (splitList "/" .)) (list "runs" "datasets" "cache" "trash") -}}
{{- $found = append $found (printf "storage.sharedFolders: %s holds what jobs may not see of each other; name another folder of the storage" .) -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "found" $found) -}}
{{- end -}}
