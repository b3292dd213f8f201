"""The operator's RayCluster, from which each job's own is made: read, checked, and filled in.

The operator decides what nodes are like (images, resources, volumes, tolerations) and how many a job may have at most;
the service fills in the name, labels, numbers, the token and the environment by which a driver knows its cluster.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sapo_ray.errors import ConfigError

GROUPS = ("rollout", "learner", "verifier")
"""Worker groups that a template has; a node's role is its group's name."""
RESOURCE_KEYS = ("num-cpus", "num-gpus", "memory", "resources")


@dataclass(frozen=True, kw_only=True, slots=True)
class Filling:
    """What one job's cluster has beside the template."""

    name: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    owners: list[dict[str, Any]]
    replicas: Mapping[str, int]
    """Nodes, by group."""
    environment: Mapping[str, str]
    role_label: str
    secret: str
    """Holds the token that this cluster's Ray wants, as `auth_token`."""


class ClusterTemplate:
    """A RayCluster that was checked as far as its own text goes."""

    def __init__(self, body: Mapping[str, Any], name: str = "cluster template") -> None:
        """Raises ConfigError, which names all that is wrong in `name`."""
        problems = _problems(body)
        if problems:
            raise ConfigError(f"{name}: " + "; ".join(problems))
        self._body = body

    @classmethod
    def load(cls, path: Path) -> ClusterTemplate:
        """Read YAML or JSON. Raises ConfigError."""
        try:
            body = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"SAPO_CLUSTER_TEMPLATE {path} cannot be read: {error}") from error
        return cls(body if isinstance(body, dict) else {}, f"SAPO_CLUSTER_TEMPLATE {path}")

    def most(self, group: str) -> int:
        """Most nodes of a group that a job may have."""
        return int(self._group(group)["maxReplicas"])

    def gpus(self, group: str) -> int:
        """GPUs of a node."""
        spec = self._group(group)
        said = (spec.get("rayStartParams") or {}).get("num-gpus") or (spec.get("resources") or {}).get("GPU")
        if said is not None:
            return int(float(said))
        return sum(int(n) for name, n in _limits(spec).items() if name.lower().endswith("gpu"))

    def cpus(self, group: str) -> int:
        """Logical CPUs of a node, as Ray will count them."""
        spec = self._group(group)
        said = (spec.get("rayStartParams") or {}).get("num-cpus") or (spec.get("resources") or {}).get("CPU")
        if said is None:
            said = _limits(spec).get("cpu") or _limits(spec, "requests").get("cpu", "0")
        return _whole(str(said))

    def fill(self, filling: Filling) -> dict[str, Any]:
        """The body of one job's RayCluster."""
        body = copy.deepcopy(dict(self._body))
        metadata = body.get("metadata") or {}
        body["metadata"] = {
            "name": filling.name,
            "labels": (metadata.get("labels") or {}) | dict(filling.labels),
            "annotations": (metadata.get("annotations") or {}) | dict(filling.annotations),
            "ownerReferences": filling.owners,
        }
        body.pop("status", None)
        spec = body["spec"]
        spec["authOptions"] = {"mode": "token", "secretName": filling.secret}
        _dress(spec["headGroupSpec"], filling)
        for group in spec["workerGroupSpecs"]:
            _dress(group, filling)
            name = group["groupName"]
            if name in GROUPS:
                group["labels"] = (group.get("labels") or {}) | {filling.role_label: name}
                group |= {"minReplicas": 0, "replicas": filling.replicas[name]}
        return body

    def _group(self, name: str) -> dict[str, Any]:
        group: dict[str, Any] = next(g for g in self._body["spec"]["workerGroupSpecs"] if g["groupName"] == name)
        return group


def _dress(group: dict[str, Any], filling: Filling) -> None:
    """Labels for a group's pods, the environment of its Ray container, ours first, and whose folders are mounted."""
    template = group["template"]
    metadata = template["metadata"] = dict(template.get("metadata") or {})
    metadata["labels"] = (metadata.get("labels") or {}) | dict(filling.labels)
    ray = template["spec"]["containers"][0]
    ours = [{"name": name, "value": value} for name, value in filling.environment.items()]
    ray["env"] = ours + [one for one in ray.get("env") or [] if one.get("name") not in filling.environment]
    for container in [*template["spec"]["containers"], *(template["spec"].get("initContainers") or [])]:
        for mount in container.get("volumeMounts") or []:
            for key in {"mountPath", "subPath"} & mount.keys():
                for name, value in filling.environment.items():
                    mount[key] = mount[key].replace(f"$({name})", value)


def _problems(body: Mapping[str, Any]) -> list[str]:
    """What is wrong with a template, each with its key and what to do."""
    if (body.get("apiVersion"), body.get("kind")) != ("ray.io/v1", "RayCluster"):
        return ["it must be a RayCluster of ray.io/v1 (apiVersion, kind, spec)"]
    spec = body.get("spec")
    if not isinstance(spec, dict):
        return ["spec is missing"]
    found = _of_spec(spec)
    groups = spec.get("workerGroupSpecs")
    groups = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    names = [group.get("groupName") for group in groups]
    for name in GROUPS:
        if names.count(name) != 1:
            found.append(f"spec.workerGroupSpecs needs one group with groupName {name}, it has {names.count(name)}")
    found += _of_pods("spec.headGroupSpec", spec.get("headGroupSpec"))
    for group in groups:
        found += _of_group(f"spec.workerGroupSpecs[{group.get('groupName')}]", group)
    return found


def _of_spec(spec: Mapping[str, Any]) -> list[str]:
    found = []
    if spec.get("enableInTreeAutoscaling"):
        found.append("spec.enableInTreeAutoscaling must be false: the service itself chooses the nodes of a job")
    auth = spec.get("authOptions") or {}
    if auth.get("mode", "token") != "token" or auth.get("secretName") or auth.get("enableK8sTokenAuth"):
        found.append("spec.authOptions must be left out: the service gives each cluster a token of its own")
    version = re.match(r"(\d+)\.(\d+)", str(spec.get("rayVersion", "")))
    if version is None or (int(version[1]), int(version[2])) < (2, 52):
        found.append(f"spec.rayVersion must be 2.52 or later, which knows tokens, got {spec.get('rayVersion')!r}")
    return found


def _of_group(key: str, group: Mapping[str, Any]) -> list[str]:
    found = _of_pods(key, group)
    most = group.get("maxReplicas")
    if not isinstance(most, int) or most < 1:
        found.append(f"{key}.maxReplicas must say how many nodes a job may have at most (1 or more), got {most!r}")
    if group.get("numOfHosts", 1) != 1:
        found.append(f"{key}.numOfHosts must be 1")
    if group.get("idleTimeoutSeconds") is not None:
        found.append(f"{key}.idleTimeoutSeconds is for Ray's autoscaler, which is off here; remove it")
    return found


def _of_pods(key: str, group: Any) -> list[str]:
    """Rules of the operator that its schema does not hold: it would make no pod, and say so only in its log."""
    if not isinstance(group, dict):
        return [f"{key} is missing"]
    pods = (group.get("template") or {}).get("spec") or {}
    if not pods.get("containers"):
        return [f"{key}.template.spec.containers needs the Ray container, as the first"]
    found = []
    start = group.get("rayStartParams") or {}
    if "labels" in start:
        found.append(f"{key}.rayStartParams.labels must be {key}.labels")
    if group.get("resources") and any(name in start for name in RESOURCE_KEYS):
        found.append(f"{key} has resources in both `resources` and `rayStartParams`; keep one of them")
    return found


def _limits(group: Mapping[str, Any], kind: str = "limits") -> dict[str, Any]:
    resources = group["template"]["spec"]["containers"][0].get("resources") or {}
    return resources.get(kind) or {}


def _whole(quantity: str) -> int:
    """CPUs of a Kubernetes quantity, rounded up as KubeRay does. Raises ConfigError."""
    try:
        return -(-int(quantity[:-1]) // 1000) if quantity.endswith("m") else -int(-float(quantity) // 1)
    except ValueError:
        raise ConfigError(f"SAPO_CLUSTER_TEMPLATE: {quantity!r} is not a number of CPUs, e.g. 4 or 3500m") from None
