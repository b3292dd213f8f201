"""Bounds of everything the reconciler waits for, in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long is waited for whom, and how often something is tried again."""

    max_running_per_tenant: int = 2
    """Jobs of one tenant that may have a driver at the same time; more are queued."""
    restarts: int = 3
    """Drivers of one job that are replaced after a failure; the next failure is the job's."""
    heartbeat_timeout_s: float = 60.0
    """Silence after which a driver that has reported counts as lost."""
    start_deadline_s: float = 300.0
    """Time from launch to the first report: Ray's queue, the environment, imports."""
    forgotten_grace_s: float = 15.0
    """Silence after which a driver whose submission the cluster does not know counts as gone with the old cluster."""
    exit_grace_s: float = 30.0
    """Time a driver has to exit after it reported its end."""
    pause_grace_s: float = 7200.0
    """Time to finish a step, checkpoint and exit; then it is stopped, and resumes from its last checkpoint."""
    cancel_grace_s: float = 600.0
    """Time to export and exit; then it is stopped."""
    discard_grace_s: float = 60.0
    """The same if nothing is to be exported."""
    retry_delay_s: float = 2.0
    """Wait before the first replacement of a driver, doubled for each further one."""
    retry_delay_max_s: float = 60.0
    lease_s: float = 15.0
    """How long a replica may work on a job without renewing its claim."""
    tick_s: float = 1.0
    """Pause between two rounds over all jobs."""
    housekeeping_s: float = 30.0
    """Pause between two searches for files of discarded jobs."""
    nodes_s: float = 5.0
    """Pause between two looks at the nodes of a driver's own cluster."""
    clusters_s: float = 10.0
    """Pause between two searches for clusters whose driver is over."""
    keep_clusters_s: float = 0.0
    """How long such a cluster is kept."""
    sweep_s: float = 600.0
    """Pause between two sweeps of idempotency keys that are older than a day."""

    def retry_delay(self, restarts: int) -> float:
        """Wait before replacement number `restarts + 1`."""
        return float(min(self.retry_delay_max_s, self.retry_delay_s * 2**restarts))
