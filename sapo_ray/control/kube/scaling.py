"""Which change of its rollout group a cluster needs. Pure.

The operator deletes any pod it likes as soon as a group has more pods than replicas. So replicas never fall by more
than the pods that are named for deletion in the same change, and a pod is named until it is gone: the operator may not
have seen the last change when the next one comes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sapo_ray.control.kube import pods as of
from sapo_ray.control.kube.client import Object


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """New values of a worker group."""

    replicas: int
    delete: list[str]
    """Pods for scaleStrategy.workersToDelete."""


def plan(group: Object, pods: list[Object], needed: int, busy: Collection[str] | None) -> Change | None:
    """The next change towards `needed` nodes, or None.

    Args:
        group: as it is in the RayCluster's workerGroupSpecs.
        pods: of the group, those that are being deleted left out.
        busy: hosts with rollout workers; a pod on none of them may go. None: not known, so none may.
    """
    replicas, needed = int(group.get("replicas") or 0), min(needed, int(group["maxReplicas"]))
    named = set((group.get("scaleStrategy") or {}).get("workersToDelete") or [])
    names = {pod["metadata"]["name"] for pod in pods}
    leaving = named & names
    if needed > replicas:
        # Those that are still there may stay, as far as there is a place for them now.
        return Change(replicas=needed, delete=sorted(leaving)[: max(0, len(pods) - needed)])
    if needed == replicas or busy is None:
        return None
    idle = [pod for pod in pods if pod["metadata"]["name"] not in leaving and not of.hosts(pod) & set(busy)]
    idle.sort(key=lambda pod: (of.is_ready(pod), pod["metadata"]["name"]))  # those that are only starting go first
    victims = [pod["metadata"]["name"] for pod in idle][: replicas - needed]
    return Change(replicas=replicas - len(victims), delete=sorted(leaving | set(victims))) if victims else None
