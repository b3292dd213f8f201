"""The reconciler: brings what is (drivers in the cluster) to what is wanted (jobs in the store), round after round.

    round:  ping the cluster -> admit from the queues -> look at each job -> decide (pure) -> act -> look again ...

Replicas share the jobs by leases. Nothing is remembered between rounds that is not in the store, except which leases
are held; so a new process goes on wherever another one died.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy.orm import Session

from sapo_ray.control.launcher import (
    UNREACHABLE,
    ClusterLauncher,
    ClusterUnavailable,
    Launcher,
    LauncherUnavailable,
    LaunchStatus,
    NotStarted,
)
from sapo_ray.control.reconciler import conditions, queries, remains
from sapo_ray.control.reconciler.acting import Acting, Changed
from sapo_ray.control.reconciler.actions import Stop, Wait
from sapo_ray.control.reconciler.admission import Admission
from sapo_ray.control.reconciler.decision import decide
from sapo_ray.control.reconciler.hooks import Hooks
from sapo_ray.control.reconciler.limits import Limits
from sapo_ray.control.reconciler.own_clusters import OwnClusters
from sapo_ray.control.reconciler.telling import Telling
from sapo_ray.control.reconciler.tokens import read_token
from sapo_ray.control.reconciler.views import AttemptView, JobView, Seen
from sapo_ray.control.store import (
    Lease,
    LeaseLost,
    Store,
    StoreUnavailable,
    attempts,
    events,
    idempotency,
    jobs,
    leases,
)

log = structlog.get_logger("sapo_ray.control.reconciler")

STEPS_PER_ROUND = 8
"""Actions for one job in one round; a launch takes three."""


def new_holder() -> str:
    """A name for this process that no other ever had."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


class Reconciler:
    """One replica's reconciler. `tick()` is one round; `run()` goes round until told to stop."""

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        limits: Limits,
        *,
        control_url: str,
        holder: str | None = None,
        hooks: Hooks | None = None,
        clusters: ClusterLauncher | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clusters` is the launcher again, if it makes a cluster for each driver."""
        self.holder = holder or new_holder()
        self._store = store
        self._launcher = launcher
        self._limits = limits
        self._hooks = hooks or Hooks()
        self._clock = clock
        self._watching_since = self._last_round = clock()
        self._acting = Acting(store, launcher, control_url, self._hooks, clock)
        self._telling = Telling(store, clock)
        self._clusters = OwnClusters(store, clusters, limits, clock)
        self._admission = Admission(store, self.holder, limits, self._hooks, clock)
        self._leases: dict[str, Lease] = {}
        self._unreachable: str | None = None
        self._held = True
        """Jobs may wait with the condition that the cluster cannot be reached."""
        self._housekeeping_due = self._sweep_due = 0.0

    def run(self, stop: threading.Event) -> None:
        """Go round until `stop` is set; no error ends it."""
        log.info("reconciler_started", holder=self.holder)
        while not stop.is_set():
            try:
                self.tick()
            except Exception as error:  # noqa: BLE001 - the loop outlives everything; what happened is logged, counted
                self._note_failure(error)
            stop.wait(self._limits.tick_s)
        self.release()
        log.info("reconciler_stopped", holder=self.holder)

    def tick(self) -> None:
        """One round over queues and jobs. One job's error is logged and does not keep the others waiting."""
        self._mind_the_gap()
        self._unreachable = self._ping()
        if self._unreachable is None:
            if self._held:
                self._held = not self._admission.release(conditions.LAUNCHER_UNAVAILABLE)
            for tenant in self._admission.tenants():
                for admitted in self._admission.admit(tenant):
                    self._leases[admitted.job.id] = admitted.lease
        else:
            self._held = True
            self._admission.hold(conditions.LAUNCHER_UNAVAILABLE, UNREACHABLE)
        with self._store.read() as s:
            found = queries.jobs_to_look_at(s, self.holder, self._clock())
        for job_id in found:
            try:
                self._reconcile(job_id)
            except Exception as error:  # noqa: BLE001 - see tick
                self._note_failure(error, job_id)
        self._leases = {job_id: self._leases[job_id] for job_id in found if job_id in self._leases}
        if self._clock() >= self._housekeeping_due:
            self._housekeeping_due = self._clock() + self._limits.housekeeping_s
            self._discard_files()
            self._held = True  # another replica may have held jobs, and died
        self._sweep_clusters()
        if self._clock() >= self._sweep_due:
            self._sweep_due = self._clock() + self._limits.sweep_s
            self._sweep()
        self._last_round = self._clock()
        self._hooks.round_over(self._last_round)

    def release(self) -> None:
        """Let other replicas have the jobs at once."""
        for job_id, lease in self._leases.items():
            try:
                with self._store.begin() as s:
                    leases.release(s, lease)
            except Exception as error:  # noqa: BLE001 - it runs out by itself
                self._note_failure(error, job_id)
        self._leases = {}

    def _reconcile(self, job_id: str) -> None:
        """Bring one job as far as it goes now."""
        lease: Lease | None = None
        waiting: str | None = None
        for _ in range(STEPS_PER_ROUND):
            lease = self._lease(job_id)
            if lease is None:
                return
            try:
                seen = self._look(job_id)
                if seen is None:
                    return
                action = decide(seen, self._limits)
                self._acting.do(action, seen, lease)
            except Changed:
                continue
            except LeaseLost:
                self._leases.pop(job_id, None)
                return
            except NotStarted as error:
                waiting = str(error)
                break
            except LauncherUnavailable as error:
                if self._unreachable is None:
                    log.warning("launcher_unavailable", job_id=job_id, reason=str(error))
                if not isinstance(error, ClusterUnavailable):  # others may be reached
                    self._unreachable = str(error)
                self._telling.hindered(job_id, lease, conditions.LAUNCHER_UNAVAILABLE, UNREACHABLE)
                raise
            except OSError as error:
                self._telling.hindered(job_id, lease, conditions.RUN_DIR_UNAVAILABLE, conditions.unusable(error))
                raise
            if isinstance(action, Wait | Stop):
                waiting = self._clusters.follow(seen)
                break
        if lease is not None:
            self._telling.free(job_id, lease, waiting)

    def _look(self, job_id: str) -> Seen | None:
        """Everything a decision needs; None if nothing can or need be decided."""
        with self._store.read() as s:
            row = jobs.get_job(s, None, job_id)
            attempt = queries.unended_attempt(s, job_id)
            if row is None:
                return None
            job, view = queries.job_view(row), queries.attempt_view(attempt) if attempt else None
            kept = view is not None and view.state == "launching" and _token_is_kept(s, job, view)
        launch = LaunchStatus(state="UNKNOWN")
        if view is not None:
            if self._unreachable is not None:
                raise LauncherUnavailable(self._unreachable)
            launch = self._launcher.status(view.submission_id)
        return Seen(
            job=job,
            attempt=view,
            launch=launch,
            token_kept=kept,
            now=self._clock(),
            watching_since=self._watching_since,
        )

    def _lease(self, job_id: str) -> Lease | None:
        """This replica's claim on a job, renewed at half time; None if another has it."""
        now = self._clock()
        lease = self._leases.get(job_id)
        if lease is not None and lease.until - now > self._limits.lease_s / 2:
            return lease
        with self._store.begin() as s:
            lease = leases.acquire(s, job_id, self.holder, self._limits.lease_s, now)
        if lease is None:
            self._leases.pop(job_id, None)
        else:
            self._leases[job_id] = lease
        return lease

    def _mind_the_gap(self) -> None:
        """While the store was gone, or this process asleep, no driver could be heard: their clocks start afresh."""
        now = self._clock()
        if now - self._last_round > self._limits.heartbeat_timeout_s / 2:
            log.warning("rounds_were_missed", seconds=round(now - self._last_round, 1))
            self._watching_since = now

    def _ping(self) -> str | None:
        try:
            self._launcher.ping()
        except LauncherUnavailable as error:
            self._hooks.failed_round("launcher")
            if self._unreachable is None:
                log.warning("launcher_unavailable", reason=str(error))
            return str(error)
        if self._unreachable is not None:
            log.info("launcher_back")
        return None

    def _discard_files(self) -> None:
        """Files of jobs that were cancelled with `discard` while no driver ran."""
        with self._store.read() as s:
            found = [queries.job_view(row) for row in queries.discarded_jobs(s)]
        for job in found:
            try:
                dropped = remains.discard(job.run_dir)
                with self._store.begin() as s:
                    row = jobs.get_job(s, None, job.id, lock=True)
                    if row is not None:
                        events.append_control_event(s, row, "discarded", what=dropped)
            except Exception as error:  # noqa: BLE001 - see tick
                self._note_failure(error, job.id)

    def _sweep_clusters(self) -> None:
        if self._unreachable is None:
            try:
                self._clusters.sweep()
            except Exception as error:  # noqa: BLE001 - see tick
                self._note_failure(error)

    def _sweep(self) -> None:
        """Idempotency keys that are no longer kept; what is left over waits for the next sweep."""
        try:
            with self._store.read() as s:
                due = idempotency.any_old(s, self._clock())
            if due:
                with self._store.begin() as s:
                    idempotency.sweep(s, self._clock())
        except Exception as error:  # noqa: BLE001 - see tick
            self._note_failure(error)

    def _note_failure(self, error: Exception, job_id: str | None = None) -> None:
        kind = next((name for kinds, name in _KINDS if isinstance(error, kinds)), "bug")
        self._hooks.failed_round(kind)
        if kind == "bug":
            log.error("reconciler_error", job_id=job_id, exc_info=error)
        elif kind != "launcher" and not (kind == "cluster" and job_id):  # told where they are met, and as a condition
            log.warning("reconciler_error", job_id=job_id, kind=kind, error=str(error))


def _token_is_kept(s: Session, job: JobView, attempt: AttemptView) -> bool:
    """Whether the driver will find the token that the store would accept from it."""
    token = read_token(job.run_dir, attempt.number)
    found = attempts.by_token(s, token) if token else None
    return found is not None and (found.job_id, found.number) == (job.id, attempt.number)


_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (ClusterUnavailable, "cluster"),  # one driver's own, which says nothing of the others'
    (LauncherUnavailable, "launcher"),
    (StoreUnavailable, "store"),
    (OSError, "run_dir"),
)
