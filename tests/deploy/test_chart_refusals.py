"""Values that cannot work are refused before anything is installed: the message has the key, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
from chart_rendering import FEATURES, Object, Refused, overlaid, render

SCHEMA: dict[str, tuple[Object, tuple[str, ...]]] = {
    "an unknown key": ({"contrl": {"replicas": 1}}, ("contrl",)),
    "an unknown key of a part": ({"control": {"replica": 2}}, ("/control", "replica")),
    "an unknown setting of the service": ({"control": {"settings": {"max_runing": 1}}}, ("settings", "max_runing")),
    "a setting that the chart makes": ({"control": {"settings": {"database_url": "x"}}}, ("database_url",)),
    "a setting out of bounds": ({"control": {"settings": {"rate_burst": 0}}}, ("rate_burst", "minimum")),
    "a setting of the service in the environment": (
        {"control": {"extraEnv": [{"name": "SAPO_PORT", "value": "1"}]}},
        ("/control/extraEnv/0/name",),
    ),
    "a variable of the operator's": (
        {"ray": {"extraEnv": [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}]}},
        ("/ray/extraEnv/0/name",),
    ),
    "an unknown key of a group": ({"ray": {"groups": {"rollout": {"gpu": 1}}}}, ("/ray/groups/rollout", "gpu")),
    "a wrong role": ({"ray": {"groups": {"x": {"role": "rolout"}}}}, ("/ray/groups/x/role", "rollout")),
    "a name that no pod may have": ({"ray": {"groups": {"Big_GPU": {"role": "rollout"}}}}, ("Big_GPU",)),
    "a word for a number": ({"ray": {"groups": {"rollout": {"max": "many"}}}}, ("/ray/groups/rollout/max", "integer")),
    "fewer than no nodes": ({"ray": {"groups": {"rollout": {"min": -1}}}}, ("/ray/groups/rollout/min", "minimum")),
    "no replica": ({"control": {"replicas": 0}}, ("/control/replicas", "minimum")),
    "an amount that is none": ({"ray": {"head": {"memory": "16 GB"}}}, ("/ray/head/memory",)),
    "a resource that Ray does not count": (
        {"ray": {"groups": {"rollout": {"gpuResource": "nvidia.com/mig-1g.10gb"}}}},
        ("/ray/groups/rollout/gpuResource",),
    ),
    "an unknown database": ({"database": {"kind": "mysql"}}, ("/database/kind", "postgresql")),
    "a digest that is none": ({"image": {"control": {"digest": "latest"}}}, ("/image/control/digest",)),
    "root": ({"podSecurity": {"runAsUser": 0}}, ("/podSecurity/runAsUser", "minimum")),
    "an access mode that does not exist": ({"storage": {"accessMode": "RWX"}}, ("/storage/accessMode",)),
    "an address without port": (
        {"ray": {"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis"}}},
        ("/ray/gcsFaultTolerance/redisAddress",),
    ),
    "a setting that follows from ray.mode": (
        {"control": {"settings": {"shared_cluster": False}}},
        ("settings", "shared_cluster"),
    ),
    "a mode that does not exist": ({"ray": {"mode": "perjob"}}, ("/ray/mode", "perJob")),
    "a folder outside of the storage": (
        {"storage": {"sharedFolders": ["../etc"]}},
        ("/storage/sharedFolders/0",),
    ),
    "a volume of the chart's own": (
        {"control": {"extraVolumes": [{"name": "data", "emptyDir": {}}]}},
        ("/control/extraVolumes/0/name",),
    ),
    "an empty peer, which is everybody": ({"networkPolicy": {"apiFrom": [{}]}}, ("/networkPolicy/apiFrom/0",)),
}
CHECKS: dict[str, tuple[Object, tuple[str, ...]]] = {
    "SQLite with two replicas": (
        {"control": {"replicas": 2}},
        ("control.replicas: is 2", "database.kind=sqlite", "set control.replicas=1, or database.kind=postgresql"),
    ),
    "PostgreSQL without its secret": (
        {"database": {"kind": "postgresql"}},
        ("database.postgresql.existingSecret: is empty", "kubectl -n rl create secret generic"),
    ),
    "storage that is not shared": (
        {"storage": {"accessMode": "ReadWriteOnce"}},
        ("storage.accessMode: is ReadWriteOnce", "ReadWriteMany", "singleNode=true"),
    ),
    "a folder of one node for many": (
        {"storage": {"hostPath": "/srv"}},
        ("storage.hostPath", "ReadWriteMany", "singleNode=true"),
    ),
    "two storages": (
        {"singleNode": True, "storage": {"hostPath": "/srv", "existingClaim": "a"}},
        ("storage.hostPath: is set beside storage.existingClaim",),
    ),
    "a GPU group without GPUs": (
        {"ray": {"groups": {"rollout": {"gpus": 0}}}},
        ("ray.groups.rollout.gpus: is 0", "ray.accelerator=gpu", "set it to 1 or more, or ray.accelerator=cpu"),
    ),
    "GPUs that nothing uses": (
        {"ray": {"accelerator": "cpu"}},
        ("ray.groups.learner.gpus: is 1", "ray.groups.rollout.gpus: is 1", "set it to 0"),
    ),
    "max below min": (
        {"ray": {"groups": {"rollout": {"min": 5, "max": 4}}}},
        ("ray.groups.rollout.max: is 4, less than min, 5", "raise max or lower min"),
    ),
    "a group without role": ({"ray": {"groups": {"more": {"gpus": 1}}}}, ("ray.groups.more.role: is missing",)),
    "no learner": (
        {"ray": {"groups": {"learner": None}}},
        ("no node can have the role learner", "max of 1 or more"),
    ),
    "no rollout node in a cluster of fixed size": (
        {"ray": {"autoscaling": {"enabled": False}, "groups": {"learner": {"min": 1}}}},
        ("no node can have the role rollout", "min of 1 or more"),
    ),
    "verifiers that come too late": (
        {"ray": {"groups": {"verifier": {"min": 0}}}},
        ("ray.groups.verifier.min: is 0", "120 s", "set min to 1"),
    ),
    "shared memory that fills the memory": (
        {"ray": {"head": {"shm": "16Gi"}, "groups": {"verifier": {"shm": 9000000000}}}},
        ("ray.head.shm: is 16Gi", "ray.groups.verifier.shm: is", "three tenths of ray.groups.verifier.memory"),
    ),
    "a Ray without tokens": ({"ray": {"version": "2.51.0"}}, ("ray.version: 2.51.0", "ray.auth.enabled=false")),
    "a secret of the operator's name": (
        {"ray": {"auth": {"existingSecret": "demo-sapo-ray-cluster"}}},
        ("ray.auth.existingSecret", "rename the Secret"),
    ),
    "Redis nowhere": (
        {"ray": {"gcsFaultTolerance": {"enabled": True}}},
        ("ray.gcsFaultTolerance.redisAddress: is empty", "host:port"),
    ),
    "Kueue that cannot scale": (
        {"kueue": {"queue": "gpus"}},
        ("kueue.elastic: is false", "ElasticJobsViaWorkloadSlices", "ray.autoscaling.enabled=false"),
    ),
    "a priority without queue": ({"kueue": {"priorityClass": "high"}}, ("kueue.priorityClass", "kueue.queue")),
    "Kueue without a cluster": (
        overlaid(FEATURES["external"], FEATURES["kueue"]),
        ("kueue.queue: means nothing with ray.mode=external",),
    ),
    "a cluster of yours that is nowhere": (
        {"ray": {"mode": "external"}},
        ("ray.external.jobsUrl: is empty", "http://head.ray.svc:8265"),
    ),
    "two clusters": (
        {"ray": {"external": {"jobsUrl": "http://a:1"}}},
        ("ray.external.jobsUrl: is set, but ray.mode is managed",),
    ),
    "clusters without a token": (
        {"ray": {"mode": "perJob"}},
        ("ray.auth: with ray.mode=perJob", "ray.auth.existingSecret", "kubectl -n rl create secret generic"),
    ),
    "clusters that need none": (
        overlaid(FEATURES["per_job"], FEATURES["no_token"]),
        ("ray.auth: with ray.mode=perJob", "ray.auth.enabled=true"),
    ),
    "a Redis for heads that are not mended": (
        overlaid(FEATURES["per_job"], FEATURES["redis"]),
        ("ray.gcsFaultTolerance.enabled: is true", "set it to false"),
    ),
    "Kueue that would suspend what is scaled": (
        overlaid(FEATURES["per_job"], {"kueue": {"queue": "gpus"}}),
        ("kueue.elastic: is false", "ElasticJobsViaWorkloadSlices", "leave kueue.queue empty"),
    ),
    "a second group of a role": (
        overlaid(FEATURES["per_job"], FEATURES["more_groups"]),
        ("ray.groups.rollout-big: with ray.mode=perJob", "move its values to ray.groups.rollout", "=null"),
    ),
    "no verifier in jobs' clusters": (
        overlaid(FEATURES["per_job"], {"ray": {"groups": {"verifier": None}}}),
        ("no node can have the role verifier", "max of 1 or more"),
    ),
    "folders that jobs may not share": (
        overlaid(FEATURES["per_job"], {"storage": {"sharedFolders": ["models", "datasets/team-a"]}}),
        ("storage.sharedFolders: datasets/team-a", "name another folder"),
    ),
    "shared folders where everything is": (
        {"storage": {"sharedFolders": ["models"]}},
        ("storage.sharedFolders: is for ray.mode=perJob, and ray.mode is managed", "leave it empty"),
    ),
    "a cluster of yours and one for each job": (
        overlaid(FEATURES["external"], FEATURES["per_job"]),
        ("ray.external.jobsUrl: is set, but ray.mode is perJob",),
    ),
    "an Ingress without host": (
        {"control": {"ingress": {"enabled": True}}, "networkPolicy": {"enabled": False}},
        ("control.ingress.host: is empty",),
    ),
    "an Ingress that is shut out": (
        {"control": {"ingress": {"enabled": True, "host": "a.example.com"}}},
        ("networkPolicy.ingressFrom: is empty", "namespaceSelector"),
    ),
    "a load balancer that reaches nothing": (
        {"control": {"service": {"type": "LoadBalancer"}}},
        ("networkPolicy.apiFrom: lets in pods of this namespace alone", "LoadBalancer", "ipBlock"),
    ),
    "a mount of nothing": (
        {"ray": {"extraVolumeMounts": [{"name": "hub", "mountPath": "/etc/hub"}]}},
        ("ray.extraVolumeMounts: hub is not among ray.extraVolumes",),
    ),
    "a ServiceMonitor of nothing": (
        {"monitoring": {"metrics": False, "serviceMonitor": {"enabled": True}}},
        ("monitoring.metrics: is false",),
    ),
}


def refusal(values: dict[str, Any], name: str = "demo") -> str:
    with pytest.raises(Refused) as caught:
        render(values, name)
    return str(caught.value)


@pytest.mark.parametrize("case", SCHEMA)
def test_the_schema_refuses(case: str) -> None:
    values, words = SCHEMA[case]
    message = refusal(values)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("case", CHECKS)
def test_values_that_contradict_each_other_are_refused_with_key_and_remedy(case: str) -> None:
    values, words = CHECKS[case]
    message = refusal(values)
    assert all(word in message for word in words), message


def test_all_problems_are_told_at_once() -> None:
    message = refusal({"control": {"replicas": 3}, "ray": {"groups": {"rollout": {"min": 9}, "verifier": {"min": 0}}}})
    assert message.count("\n  - ") == 3, message


def test_a_name_that_kuberay_would_cut_is_refused() -> None:
    assert "has 37 characters" in refusal({}, "a" * 28)
    assert "begins with a letter" in refusal({}, "1st")
    assert len(render({}, "a" * 27)) > 8


def test_without_budgets_and_policies_everything_that_is_refused_is_refused_still() -> None:
    off = overlaid(FEATURES["no_policies"], FEATURES["no_budgets"], FEATURES["static"])
    assert "ray.groups.rollout.max" in refusal(overlaid(off, {"ray": {"groups": {"rollout": {"min": 9}}}}))
