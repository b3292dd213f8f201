"""The chart, rendered by Helm's own library in this process; and by the helm command where there is one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from sapo_ray.config.load import resolve
from sapo_ray.control.kube.identity import Identity
from sapo_ray.control.kube.sizes import sizes_of
from sapo_ray.control.kube.template import ClusterTemplate
from sapo_ray.control.launcher import LaunchRequest

helm = pytest.importorskip("helm_python", reason="no helm-python-sdk: the chart is rendered with the CPU set only")

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "sapo-ray"
EXAMPLES = {path.stem: path for path in sorted((ROOT / "deploy" / "values").glob("*.yaml"))}
MANIFESTS = ROOT / "deploy" / "kuberay"
NAMESPACE = "rl"
JOB = "job-" + "a" * 20
SMALL = resolve({"preset": "quickstart", "learner": {"ranks": 1}, "verifier": {"processes": 1}})
Object = dict[str, Any]


class Refused(Exception):
    """The chart does not take these values; the message is what Helm's user reads."""


@cache
def chart() -> Any:
    """Immutable, so one for all tests."""
    return helm.Chart.load(CHART)


def texts(values: Mapping[str, Any], name: str = "demo", namespace: str = NAMESPACE) -> dict[str, str]:
    """Text of each template. Raises Refused."""
    return _texts(json.dumps(values), name, namespace)


@lru_cache(maxsize=256)
def _texts(values: str, name: str, namespace: str) -> dict[str, str]:
    try:
        return dict(chart().render(json.loads(values), name=name, namespace=namespace))
    except helm.HelmError as error:
        raise Refused(str(error)) from error


def render(values: Mapping[str, Any] | None = None, name: str = "demo", namespace: str = NAMESPACE) -> list[Object]:
    """All objects, those of `helm test` too. Raises Refused."""
    return [
        one
        for template, text in texts(values or {}, name, namespace).items()
        if template.endswith(".yaml")
        for one in yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if one
    ]


def example(name: str) -> Object:
    """Values of an example."""
    found: Object = yaml.safe_load(EXAMPLES[name].read_text())
    return found


def ray_cluster(objects: list[Object]) -> Object:
    """The RayCluster, be it an object, a manifest that the service applies, or one that it makes for a job."""
    for one in objects:
        if one["kind"] == "RayCluster":
            return one
        if one["kind"] == "ConfigMap" and "raycluster.json" in one["data"]:
            found: Object = json.loads(one["data"]["raycluster.json"])
            return found
        if one["kind"] == "ConfigMap" and "job-cluster.json" in one["data"]:
            return job_cluster(objects)
    raise LookupError("no RayCluster among the objects")


def job_cluster(objects: list[Object], job: str = JOB) -> Object:
    """The cluster that the service makes for a small job of tenant `research`, by what the chart gives it."""
    template = ClusterTemplate(json.loads(one(objects, "ConfigMap", "-job-cluster")["data"]["job-cluster.json"]))
    sizes = sizes_of(SMALL, 1, 1, template)
    return template.fill(service_identity(objects).filling(request_of(job), sizes, owners=[]))


def request_of(job: str) -> LaunchRequest:
    """First attempt at a small job of tenant `research`."""
    return LaunchRequest(
        submission_id=f"sapo-{job}-1",
        job_id=job,
        attempt=1,
        control_url="http://control",
        token_file=Path("/token"),
        tenant="research",
        spec=SMALL.model_dump(mode="json"),
    )


def service_identity(objects: list[Object]) -> Identity:
    """By which the service knows its clusters."""
    container = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return Identity(service=environment(container)["SAPO_KUBE_OWNER"], secret="s")


def one(objects: list[Object], kind: str, ending: str = "") -> Object:
    """The only object of a kind whose name ends so."""
    found = [thing for thing in objects if thing["kind"] == kind and thing["metadata"]["name"].endswith(ending)]
    assert len(found) == 1, [thing["metadata"]["name"] for thing in found]
    return found[0]


def pod_templates(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod that comes of the objects, by name of what makes it."""
    for thing in objects:
        if thing["kind"] == "Deployment":
            yield thing["metadata"]["name"], thing["spec"]["template"]
        if thing["kind"] == "Pod":
            yield thing["metadata"]["name"], thing
    try:
        spec = ray_cluster(objects)["spec"]
    except LookupError:
        return
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def environment(container: Object) -> dict[str, Any]:
    """Name to value, or to where it comes from."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container.get("env", [])}


def overlaid(*layers: Mapping[str, Any]) -> Object:
    """Later values over earlier ones, as Helm merges files."""
    merged: Object = {}
    for layer in layers:
        _merge(merged, layer)
    return merged


def _merge(into: Object, layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


FEATURES: dict[str, Object] = {
    "postgresql": {
        "control": {"replicas": 2},
        "database": {"kind": "postgresql", "postgresql": {"existingSecret": "db"}},
    },
    "static": {"ray": {"mode": "static"}},
    "external": {"ray": {"mode": "external", "external": {"jobsUrl": "http://ray:8265", "tokenSecret": "ray-token"}}},
    "per_job": {
        "ray": {"mode": "perJob", "auth": {"existingSecret": "ray-token"}},
        "storage": {"sharedFolders": ["models"]},
    },
    "fixed_size": {
        "ray": {"autoscaling": {"enabled": False}, "groups": {"rollout": {"min": 2}, "learner": {"min": 1}}}
    },
    "redis": {
        "ray": {"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis.db:6379", "existingSecret": "redis"}}
    },
    "no_token": {"ray": {"auth": {"enabled": False}}},
    "own_token": {"ray": {"auth": {"existingSecret": "ray-token"}}},
    "keep_pods": {"ray": {"upgradeStrategy": "None"}},
    "kueue": {"kueue": {"queue": "gpus", "elastic": True, "priorityClass": "research"}},
    "cpu": {"ray": {"accelerator": "cpu", "groups": {"rollout": {"gpus": 0}, "learner": {"gpus": 0}}}},
    "more_groups": {
        "ray": {
            "groupDefaults": {"nodeSelector": {"pool": "a"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
            "groups": {
                "rollout-big": {
                    "role": "rollout",
                    "image": "example.com/worker@sha256:" + "a" * 64,
                    "gpus": 2,
                    "extraResources": {"rdma/hca": 1},
                    "priority": 5,
                    "runtimeClassName": "nvidia",
                    "priorityClassName": "high",
                    "podAnnotations": {"example.com/a": "b"},
                    "protect": True,
                    "topologySpreadConstraints": [
                        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
                    ],
                }
            },
        }
    },
    "extras": {
        "control": {
            "settings": {"max_running_per_tenant": 8, "allow_models": ["builtin:*", "Qwen/*"], "rate_per_s": 0.5},
            "adminKey": {"existingSecret": "admin"},
            "tenantSecrets": {"research": "research-tokens", "Lab.2": "lab"},
            "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
            "extraVolumes": [{"name": "authorities", "configMap": {"name": "company-ca"}}],
            "extraVolumeMounts": [{"name": "authorities", "mountPath": "/etc/ca", "readOnly": True}],
            "serviceAccountAnnotations": {"a/b": "c"},
            "podAnnotations": {"d": "e"},
            "nodeSelector": {"pool": "cpu"},
            "priorityClassName": "high",
        },
        "ray": {
            "extraEnv": [{"name": "NCCL_DEBUG", "value": "INFO"}],
            "extraVolumes": [{"name": "hub", "secret": {"secretName": "hub"}}],
            "extraVolumeMounts": [{"name": "hub", "mountPath": "/etc/hub", "subPath": "token", "readOnly": True}],
            "serviceAccountAnnotations": {"a/b": "c"},
        },
        "podSecurity": {"supplementalGroups": [5000]},
    },
    "ingress": {
        "control": {"ingress": {"enabled": True, "className": "nginx", "host": "rl.example.com", "tlsSecret": "tls"}},
        "networkPolicy": {"ingressFrom": [{"namespaceSelector": {"matchLabels": {"name": "ingress"}}}]},
    },
    "monitoring": {
        "monitoring": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "p"}},
            "alerts": {"enabled": True, "labels": {"release": "p"}},
            "dashboard": {"enabled": True},
        }
    },
    "no_metrics": {"monitoring": {"metrics": False}},
    "one_node": {"singleNode": True, "storage": {"hostPath": "/srv/rl"}},
    "claims": {"storage": {"existingClaim": "runs"}, "database": {"sqlite": {"existingClaim": "db"}}},
    "classes": {"storage": {"storageClass": "nfs", "keep": False}, "database": {"sqlite": {"storageClass": "ssd"}}},
    "images": {
        "image": {
            "control": {"repository": "example.com/c", "digest": "sha256:" + "b" * 64},
            "worker": {"repository": "example.com/w", "tag": "x"},
            "pullSecrets": ["registry"],
            "pullPolicy": "Always",
        }
    },
    "internet": {
        "networkPolicy": {
            "internetFor": ["head", "rollout", "learner", "verifier"],
            "internetPorts": [80, 443],
            "database": {"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}]},
            "redis": {"to": [{"podSelector": {"matchLabels": {"app": "redis"}}}]},
            "extraEgress": {
                "control": [{"ports": [{"port": 443}]}],
                "ray": [{"to": [{"podSelector": {"matchLabels": {"app": "mlflow"}}}], "ports": [{"port": 5000}]}],
            },
        }
    },
    "no_policies": {"networkPolicy": {"enabled": False}},
    "no_budgets": {"podDisruptionBudget": {"enabled": False}},
    "names": {"nameOverride": "trainer", "fullnameOverride": "a-name-of-just-thirty-six-characters"},
    "load_balancer": {
        "control": {"service": {"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}}},
        "networkPolicy": {"apiFrom": [{"ipBlock": {"cidr": "203.0.113.0/24"}}]},
    },
}
"""What may be switched on, or off, each by itself."""
CONTRADICTIONS = {
    frozenset({"external", "kueue"}),
    frozenset({"external", "static"}),
    frozenset({"external", "per_job"}),
    *(frozenset({"per_job", name}) for name in ("redis", "no_token", "more_groups")),
    frozenset({"cpu", "more_groups"}),
    frozenset({"monitoring", "no_metrics"}),
    frozenset({"one_node", "claims"}),
}
"""Pairs of features that must be refused, or overwrite each other."""
ALL_ON = [name for name in FEATURES if not name.startswith("no_") and name not in ("external", "static", "cpu")]
ALL_ON = [name for name in ALL_ON if name not in ("one_node", "fixed_size", "per_job")]
ALL_ON_PER_JOB = [name for name in ALL_ON if name not in ("redis", "more_groups")] + ["per_job"]
CASES: dict[str, Object] = {
    "defaults": {},
    **{name: example(name) for name in EXAMPLES},
    **FEATURES,
    "all on": overlaid(*(FEATURES[name] for name in ALL_ON)),
    "all on per job": overlaid(*(FEATURES[name] for name in ALL_ON_PER_JOB)),
}
WITH_RAY = [name for name in CASES if name != "external"]
PER_JOB = [name for name in CASES if CASES[name].get("ray", {}).get("mode") == "perJob"]
