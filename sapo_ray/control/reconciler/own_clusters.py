"""Clusters that were made for one driver each: their rollout nodes follow its workers, and they go when it is over.

What a driver says of its workers (event `workers`) decides. More wanted: nodes are added. Fewer: the driver drains
workers first, and only then nodes on which it has none are given back; while it places, starts or drains any, none is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from sapo_ray.control.launcher import ClusterLauncher, LauncherUnavailable, OwnCluster
from sapo_ray.control.reconciler.limits import Limits
from sapo_ray.control.reconciler.views import Seen
from sapo_ray.control.store import Store, attempts, events

log = structlog.get_logger("sapo_ray.control.reconciler")

UNSETTLED = ("starting", "pending", "draining")


class OwnClusters:
    """What the reconciler does for them; nothing where drivers share a cluster."""

    def __init__(
        self, store: Store, launcher: ClusterLauncher | None, limits: Limits, clock: Callable[[], float]
    ) -> None:
        self._store, self._launcher, self._limits, self._clock = store, launcher, limits, clock
        self._looked: dict[str, tuple[float, str | None]] = {}
        """By submission: when its nodes were looked at, and what they lacked."""
        self._sweep_due = 0.0

    def follow(self, seen: Seen) -> str | None:
        """Bring a driver's nodes to what it wants of them. Returns which are not there yet and why, or None."""
        attempt = seen.attempt
        if self._launcher is None or attempt is None or attempt.state != "launched" or not seen.job.wants_driver:
            return None
        looked, lacks = self._looked.get(attempt.submission_id, (0.0, None))
        now = self._clock()
        if now - looked < self._limits.nodes_s:
            return lacks
        with self._store.read() as s:
            said = events.newest_of_kind(s, seen.job.id, attempt.number, "workers", 1)
            data = dict(said[0].data) if said else {}
        wanted = data.get("wanted")
        if isinstance(wanted, int) and wanted > 0:
            try:
                lacks = self._launcher.scale(attempt.submission_id, wanted, _busy(data))
            except LauncherUnavailable as error:
                log.warning("nodes_not_followed", job_id=seen.job.id, reason=str(error))
        self._looked[attempt.submission_id] = (now, lacks)
        return lacks

    def sweep(self) -> None:
        """Remove clusters whose attempt is over. Raises LauncherUnavailable, StoreUnavailable."""
        if self._launcher is None or self._clock() < self._sweep_due:
            return
        self._sweep_due = self._clock() + self._limits.clusters_s
        there = self._launcher.clusters()
        for cluster in there:
            if self._is_over(cluster):
                log.info("cluster_removed", cluster=cluster.submission_id)
                self._launcher.remove(cluster.submission_id)
        names = {cluster.submission_id for cluster in there}
        self._looked = {name: found for name, found in self._looked.items() if name in names}

    def _is_over(self, cluster: OwnCluster) -> bool:
        """The attempt is made before its cluster, so one that the store does not know was deleted with its job."""
        with self._store.read() as s:
            row = attempts.get_attempt(s, cluster.job_id, cluster.attempt)
            if row is None or row.submission_id != cluster.submission_id:
                return True
            ended_at = row.ended_at if row.state == "ended" else None
        return ended_at is not None and self._clock() - ended_at >= self._limits.keep_clusters_s


def _busy(data: dict[str, Any]) -> set[str] | None:
    """Hosts on which a driver has workers; None while that changes, or if it does not say."""
    nodes = data.get("nodes")
    if not isinstance(nodes, list) or any(data.get(name) for name in UNSETTLED):
        return None
    return {str(node) for node in nodes}
