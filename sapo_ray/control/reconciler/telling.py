"""Conditions of jobs, each written in a transaction of its own that holds only under the job's lease."""

from __future__ import annotations

from collections.abc import Callable

from sapo_ray.control.reconciler import conditions
from sapo_ray.control.store import Lease, Store, jobs, leases


class Telling:
    """What the reconciler tells of a job beside its state."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock

    def hindered(self, job_id: str, lease: Lease, kind: str, reason: str) -> None:
        """Something is in the way of a job that has not ended; nothing is written if that was said before."""
        with self._store.read() as s:
            row = jobs.get_job(s, None, job_id)
            if row is None or row.finished_at or conditions.is_raised(row, kind):
                return
        with self._store.begin() as s:
            leases.check(s, lease)
            row = jobs.get_job(s, None, job_id, lock=True)
            if row is not None:
                conditions.raise_condition(s, row, kind, reason, self._clock())

    def free(self, job_id: str, lease: Lease, waiting: str | None) -> None:
        """Nothing of ours is in the job's way any more, but for the nodes for which it may be `waiting`."""
        wanted = {conditions.CLUSTER_PENDING: waiting} if waiting else {}
        with self._store.read() as s:
            row = jobs.get_job(s, None, job_id)
            if row is None or conditions.ours(row) == wanted:
                return
        with self._store.begin() as s:
            leases.check(s, lease)
            row = jobs.get_job(s, None, job_id, lock=True)
            if row is None:
                return
            if waiting:
                conditions.keep_only(s, row, conditions.CLUSTER_PENDING, waiting, self._clock())
            else:
                conditions.clear_conditions(s, row)
