"""Before the cluster itself is ended, as an embedded one is: drivers end in good order and cost no job a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from sapo_ray.control.launcher import Launcher, LauncherUnavailable, LaunchStatus
from sapo_ray.control.reconciler import queries
from sapo_ray.control.reconciler.acting import Acting, Changed
from sapo_ray.control.reconciler.actions import Settle, Settled
from sapo_ray.control.reconciler.ending import settled_state
from sapo_ray.control.reconciler.hooks import Hooks
from sapo_ray.control.reconciler.views import JobView, Seen
from sapo_ray.control.store import LeaseLost, Store, jobs, leases
from sapo_ray.errors import SapoRayError

log = structlog.get_logger("sapo_ray.control.reconciler")

REASON = "the service was stopped; the job goes on from its last checkpoint when it runs again"
POLL_S = 0.25
LEASE_S = 60.0


def stand_down(
    store: Store,
    launcher: Launcher,
    holder: str,
    bound_s: float,
    hurry: threading.Event | None = None,
    clock: Callable[[], float] = time.time,
) -> list[str]:
    """Stop all drivers, wait for their end, and queue their jobs again. Call after the loop ended.

    Waits at most `bound_s`, or until `hurry` is set. Returns the jobs whose drivers had not ended by then; the next
    reconciler finds them gone, which costs a restart.
    """
    with store.read() as s:
        ids = queries.jobs_to_look_at(s, holder, clock())
    drivers = {id: seen for id in ids if (seen := _look(store, id, clock())) is not None}
    for id, seen in drivers.items():
        assert seen.attempt is not None
        try:
            launcher.stop(seen.attempt.submission_id)
        except LauncherUnavailable as error:
            log.warning("not_stopped", job_id=id, reason=str(error))
            return sorted(drivers)
    acting = Acting(store, launcher, "", Hooks(), clock)
    deadline = time.monotonic() + bound_s
    hurry = hurry or threading.Event()
    while drivers and time.monotonic() < deadline and not hurry.is_set():
        for id in list(drivers):
            try:
                if _settle(store, launcher, acting, holder, id, clock):
                    del drivers[id]
            except (SapoRayError, OSError, Changed) as error:
                log.warning("not_settled", job_id=id, error=str(error))
        if drivers:
            hurry.wait(POLL_S)
    return sorted(drivers)


def _settle(
    store: Store, launcher: Launcher, acting: Acting, holder: str, job_id: str, clock: Callable[[], float]
) -> bool:
    """End the attempt if its driver is gone. Whether there is nothing left to wait for."""
    seen = _look(store, job_id, clock())
    if seen is None:
        return True
    assert seen.attempt is not None
    if not launcher.status(seen.attempt.submission_id).over:
        return False
    with store.begin() as s:
        lease = leases.acquire(s, job_id, holder, LEASE_S, clock())
    if lease is None:
        raise LeaseLost(f"another replica looks after {job_id}")
    acting.do(Settle(then=_then(seen.job), reason=REASON), seen, lease)
    with store.begin() as s:
        leases.release(s, lease)
    return True


def _then(job: JobView) -> Settled:
    return "queued" if job.wants_driver else settled_state(job)


def _look(store: Store, job_id: str, now: float) -> Seen | None:
    """The job, if it has a driver."""
    with store.read() as s:
        row = jobs.get_job(s, None, job_id)
        attempt = queries.unended_attempt(s, job_id)
        if row is None or attempt is None:
            return None
        return Seen(
            job=queries.job_view(row),
            attempt=queries.attempt_view(attempt),
            launch=LaunchStatus(state="UNKNOWN"),
            token_kept=False,
            now=now,
            watching_since=now,
        )
