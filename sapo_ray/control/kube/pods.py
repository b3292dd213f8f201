"""What a cluster's pods say: whether a driver can begin, and if not, why, in words that a tenant may read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from sapo_ray.control.kube.client import Object

CLUSTER, KIND, GROUP = "ray.io/cluster", "ray.io/node-type", "ray.io/group"
"""Labels by which KubeRay marks pods."""
TELLING = "Unschedulable", "SchedulingGated"
"""Reasons whose messages count nodes and name no addresses."""
QUOTA = "a quota of Kubernetes is used up"
"""What a tenant is told of it; the message of Kubernetes names the operator's quotas and numbers."""


def is_ready(pod: Object) -> bool:
    """Whether Ray runs in it."""
    return not is_going(pod) and _condition(pod, "Ready").get("status") == "True"


def is_going(pod: Object) -> bool:
    """Whether it is being deleted, or has ended."""
    return "deletionTimestamp" in pod["metadata"] or _status(pod).get("phase") in ("Succeeded", "Failed")


def heads(pods: Iterable[Object]) -> list[Object]:
    """Those that hold the head; as a rule one."""
    return [pod for pod in pods if _labels(pod).get(KIND) == "head"]


def of_group(pods: Iterable[Object], group: str) -> list[Object]:
    """Worker pods of a group that are not on their way out."""
    return [pod for pod in pods if _labels(pod).get(GROUP) == group and not is_going(pod)]


def hosts(pod: Object) -> set[str]:
    """Names under which processes in a pod may know their host."""
    spec, name = pod.get("spec") or {}, pod["metadata"]["name"][:63]
    known = {name, spec.get("hostname"), _status(pod).get("podIP")}
    return {host for host in (known | {spec.get("nodeName")} if spec.get("hostNetwork") else known) if host}


def lacking(pods: list[Object], wanted: Mapping[str, int]) -> str:
    """Which nodes are not ready yet and why; empty if head and `wanted` of each group are."""
    parts = []
    if not any(is_ready(pod) for pod in heads(pods)):
        parts.append(_said("head", 0, 1, heads(pods)))
    for group, count in wanted.items():
        mine = of_group(pods, group)
        ready = sum(is_ready(pod) for pod in mine)
        if ready < count:
            parts.append(_said(group, ready, count, [pod for pod in mine if not is_ready(pod)]))
    return "; ".join(parts)


def told_elsewhere(pods: list[Object], wanted: Mapping[str, int]) -> tuple[str, str] | None:
    """Of what a warning of Kubernetes may tell more: kind and name; without name the cluster, whose pods are not made.

    None if the pods tell it themselves.
    """
    groups = {group: of_group(pods, group) for group in wanted}
    if not heads(pods) or any(len(groups[group]) < count for group, count in wanted.items()):
        return "RayCluster", ""
    silent = (pod for pod in [*heads(pods), *chain.from_iterable(groups.values())] if why(pod) == "Pending")
    pod = next(silent, None)
    return None if pod is None else ("Pod", str(pod["metadata"]["name"]))


def why(pod: Object) -> str:
    """Why a pod is not ready: the container's reason, else the scheduler's, else its phase."""
    status = _status(pod)
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        state = container.get("state") or {}
        for kind in ("waiting", "terminated"):
            reason = (state.get(kind) or {}).get("reason")
            if reason and reason not in ("ContainerCreating", "PodInitializing", "Completed"):
                return str(reason)
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        reason = str(scheduled.get("reason", "Pending"))
        message = str(scheduled.get("message", "")) if reason in TELLING else ""
        return f"{reason}: {message[:300]}" if message else reason
    return "Terminating" if "deletionTimestamp" in pod["metadata"] else str(status.get("reason") or _phase(status))


def _said(group: str, ready: int, wanted: int, late: list[Object]) -> str:
    reasons = Counter(why(pod) for pod in late)
    if not reasons:
        return f"{group}: {ready} of {wanted} ready, no pod yet for the others"
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f"{group}: {ready} of {wanted} ready, {listed}"


def _phase(status: Mapping[str, Any]) -> str:
    phase = str(status.get("phase", "Pending"))
    return "Starting" if phase == "Running" else phase


def _condition(pod: Object, kind: str) -> Mapping[str, Any]:
    found = (one for one in _status(pod).get("conditions") or [] if one.get("type") == kind)
    return next(found, {})


def _status(pod: Object) -> Mapping[str, Any]:
    return pod.get("status") or {}


def _labels(pod: Object) -> Mapping[str, str]:
    return pod["metadata"].get("labels") or {}
