"""Who may leave the queue: per tenant, highest priority first, then oldest, as long as the limit allows.

A job over the limit is never refused: it waits, with the reason; its position is computed when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from sapo_ray.control.reconciler import conditions, queries
from sapo_ray.control.reconciler.hooks import Hooks
from sapo_ray.control.reconciler.limits import Limits
from sapo_ray.control.reconciler.tokens import write_token
from sapo_ray.control.reconciler.views import JobView
from sapo_ray.control.store import Lease, Store, attempts, jobs, leases

MOST_A_ROUND = 500
"""Waiting jobs that one round tells of a change."""

log = structlog.get_logger("sapo_ray.control.reconciler")


def why_waiting(running: int, limit: int) -> str | None:
    """Why no further job of a tenant may start, or None if one may."""
    if running < limit:
        return None
    return f"{running} of at most {limit} jobs of this tenant are running"


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """A job that has left the queue and is to be launched."""

    job: JobView
    lease: Lease


class Admission:
    """Moves jobs from queued to starting, each with its first or next attempt."""

    def __init__(self, store: Store, holder: str, limits: Limits, hooks: Hooks, clock: Callable[[], float]) -> None:
        self._store = store
        self._holder = holder
        self._limits = limits
        self._hooks = hooks
        self._clock = clock

    def tenants(self) -> list[str]:
        """Tenants with queued jobs."""
        with self._store.read() as s:
            return queries.tenants_that_wait(s)

    def hold(self, condition: str, reason: str) -> None:
        """Nobody is admitted: say why, as the reason and as a condition. So many a round that rounds stay short."""
        with self._store.read() as s:
            if not queries.is_anybody_unexplained(s, reason):
                return
        with self._store.begin() as s:
            for row in queries.jobs_to_hold(s, reason, MOST_A_ROUND):
                row.reason = reason
                conditions.raise_condition(s, row, condition, reason, self._clock())

    def release(self, condition: str) -> bool:
        """What held them is over: take the condition from those that still wait. Whether all were reached."""
        with self._store.read() as s:  # as a rule there is nobody
            if not queries.waiting_with(s, condition, 1, lock=False):
                return True
        with self._store.begin() as s:
            found = queries.waiting_with(s, condition, MOST_A_ROUND)
            for row in found:
                conditions.clear_conditions(s, row)
        return len(found) < MOST_A_ROUND

    def admit(self, tenant: str) -> list[Admitted]:
        """Admit as many jobs of a tenant as may run now. Each is one transaction."""
        admitted: list[Admitted] = []
        busy: set[str] = set()
        while True:
            with self._store.read() as s:  # most rounds have nobody to admit, and need no writing transaction
                reason = why_waiting(jobs.count_live(s, tenant), self._limits.max_running_per_tenant)
                if reason is None and queries.first_in_queue(s, tenant, busy) is None:
                    return admitted
            if reason is not None:
                self._explain(tenant, reason)
                return admitted
            one = self._admit_one(tenant, busy)
            if one is not None:
                admitted.append(one)

    def _admit_one(self, tenant: str, busy: set[str]) -> Admitted | None:
        now = self._clock()
        with self._store.begin() as s:
            queries.lock_queue(s, tenant)
            if why_waiting(jobs.count_live(s, tenant), self._limits.max_running_per_tenant) is not None:
                return None
            first = queries.first_in_queue(s, tenant, busy)
            if first is None:
                return None
            lease = leases.acquire(s, first.id, self._holder, self._limits.lease_s, now)
            if lease is None:
                busy.add(first.id)  # another replica looks after it; the next may go
                return None
            row = jobs.get_job(s, None, first.id, lock=True)
            if row is None or row.state != "queued":  # the user was quicker
                busy.add(first.id)
                return None
            waited = now - row.since
            attempt, token = attempts.begin_attempt(s, row)
            jobs.set_state(s, row, "starting", f"launching attempt {attempt.number}", allowed={"queued"})
            job, number = queries.job_view(row), attempt.number
        self._hooks.admitted(tenant, max(0.0, waited))
        log.info("admitted", job_id=job.id, tenant=tenant, attempt=number, waited_s=round(waited, 3))
        try:
            write_token(job.run_dir, number, token)
        except OSError as error:  # the round that follows finds the attempt without a token, and says so
            log.warning("token_not_written", job_id=job.id, error=str(error))
        return Admitted(job=job, lease=lease)

    def _explain(self, tenant: str, reason: str) -> None:
        with self._store.read() as s:
            if not queries.is_unexplained(s, tenant, reason):
                return
        with self._store.begin() as s:
            queries.lock_queue(s, tenant)  # two replicas would lock the same rows in different orders
            queries.explain_waiting(s, tenant, reason)
