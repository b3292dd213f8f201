"""Doing what was decided, so that a death between any two lines leaves something the next reconciler can go on from.

Order is the whole trick. What cannot be taken back (a submission, deleted files) happens between a transaction that
announces it and one that notes it; repeating it is harmless. Every transaction first checks the lease, then that the
job is still as it was when the decision was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import assert_never

import structlog
from sqlalchemy.orm import Session

from sapo_ray.control.launcher import Launcher, LaunchRefused, LaunchRequest
from sapo_ray.control.reconciler import conditions, queries, remains
from sapo_ray.control.reconciler.actions import (
    Action,
    Begin,
    Finish,
    NewToken,
    NoteLaunched,
    Recover,
    Settle,
    Stop,
    Submit,
    Wait,
)
from sapo_ray.control.reconciler.hooks import Hooks
from sapo_ray.control.reconciler.tokens import remove_tokens, token_file, write_token
from sapo_ray.control.reconciler.views import AttemptView, Seen
from sapo_ray.control.store import (
    AttemptRow,
    BadBatch,
    JobRow,
    Lease,
    LeaseLost,
    SequenceGap,
    Store,
    StoreUnavailable,
    Superseded,
    attempts,
    events,
    jobs,
    leases,
)

log = structlog.get_logger("sapo_ray.control.reconciler")


class Changed(Exception):
    """The job is not any more what it was when the decision was made; look again."""


class Acting:
    """The reconciler's hands: carries out one action for one job."""

    def __init__(
        self, store: Store, launcher: Launcher, control_url: str, hooks: Hooks, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._launcher = launcher
        self._control_url = control_url
        self._hooks = hooks
        self._clock = clock

    def do(self, action: Action, seen: Seen, lease: Lease) -> None:
        """Carry out `action`. Raises Changed, NotStarted, LeaseLost, StoreUnavailable, LauncherUnavailable, OSError."""
        if not isinstance(action, Wait):
            log.info("reconcile", job_id=seen.job.id, state=seen.job.state, action=repr(action)[:500])
        match action:
            case Wait():
                return
            case Begin():
                self._begin(action, seen, lease)
            case NewToken():
                self._new_token(seen, lease)
            case Submit():
                self._submit(seen, lease)
            case NoteLaunched():
                self._note_launched(seen, lease)
            case Stop():
                self._still_ours(lease)
                self._launcher.stop(_attempt(seen).submission_id)
            case Recover():
                with self._unchanged(seen, lease) as (s, row):
                    _move(s, row, "recovering", action.reason)
            case Settle():
                self._settle(action, seen, lease)
            case Finish():
                self._finish(action, seen, lease)
            case _:
                assert_never(action)

    def _begin(self, action: Begin, seen: Seen, lease: Lease) -> None:
        with self._unchanged(seen, lease) as (s, row):
            row.restarts += 1
            attempt, token = attempts.begin_attempt(s, row)
            _move(s, row, "starting", action.reason)
        self._hooks.restarted(seen.job.tenant)
        write_token(seen.job.run_dir, attempt.number, token)

    def _new_token(self, seen: Seen, lease: Lease) -> None:
        """The submission id stays, so a rival that still has the old token cannot start a second driver."""
        with self._unchanged(seen, lease) as (s, _):
            token = attempts.renew_token(s, self._locked_attempt(s, seen))
        write_token(seen.job.run_dir, _attempt(seen).number, token)

    def _submit(self, seen: Seen, lease: Lease) -> None:
        job, attempt = seen.job, _attempt(seen)
        with self._store.read() as s:
            row = jobs.get_job(s, None, job.id)
            if row is None:
                raise Changed
            spec, workers, least = row.spec, row.scale_target, row.scale_min
        request = LaunchRequest(
            submission_id=attempt.submission_id,
            job_id=job.id,
            attempt=attempt.number,
            control_url=self._control_url,
            token_file=token_file(job.run_dir, attempt.number),
            tenant=job.tenant,
            spec=spec,
            workers=workers,
            least_workers=least,
            metadata={"sapo_job": job.id, "sapo_attempt": str(attempt.number), "sapo_tenant": job.tenant},
        )
        self._still_ours(lease)
        try:
            self._launcher.submit(request)
        except LaunchRefused as error:
            log.warning("launch_refused", job_id=job.id, attempt=attempt.number, reason=str(error))
            with self._unchanged(seen, lease) as (s, row):
                attempts.end_attempt(s, self._locked_attempt(s, seen), error.told)
                _move(s, row, "failed", error.told)
            return
        self._note_launched(seen, lease)
        self._hooks.launched(job.tenant)

    def _note_launched(self, seen: Seen, lease: Lease) -> None:
        """Whatever became of the job meanwhile, the driver is out there."""
        with self._store.begin() as s:
            leases.check(s, lease)
            attempts.mark_launched(s, self._locked_attempt(s, seen))

    def _settle(self, action: Settle, seen: Seen, lease: Lease) -> None:
        job, attempt = seen.job, _attempt(seen)
        with self._never_in_the_way("the rest of the journal", seen, lease):
            self._take_rest_of_journal(seen, lease)
        with self._never_in_the_way("the driver's log", seen, lease):
            remains.keep_log(job.run_dir, attempt.number, self._launcher.logs(attempt.submission_id))
        with self._store.read() as s:
            row = jobs.get_job(s, None, job.id)
            if row is None or row.state != job.state:  # the journal had the driver's last word: decide again
                raise Changed
        remove_tokens(job.run_dir, attempt.number)  # before the end is noted: afterwards nobody would
        dropped = remains.discard(job.run_dir) if job.discard and "cancelled" in (action.then, job.state) else None
        with self._unchanged(seen, lease) as (s, row):
            attempts.end_attempt(s, self._locked_attempt(s, seen), action.reason)
            if action.then is not None:
                _move(s, row, action.then, action.reason)
            if dropped is not None:
                events.append_control_event(s, row, "discarded", what=dropped)

    @contextmanager
    def _never_in_the_way(self, what: str, seen: Seen, lease: Lease) -> Iterator[None]:
        """Something worth keeping that may fail for good: then the job is told so, and settled all the same."""
        try:
            yield
        except (Changed, LeaseLost, StoreUnavailable):
            raise
        except Exception as error:
            log.warning("remains_lost", job_id=seen.job.id, attempt=_attempt(seen).number, what=what, exc_info=error)
            reason = f"{what} of attempt {_attempt(seen).number} could not be kept ({type(error).__name__})"
            with self._unchanged(seen, lease) as (s, row):
                conditions.raise_condition(s, row, conditions.REMAINS_LOST, reason, self._clock())

    def _take_rest_of_journal(self, seen: Seen, lease: Lease) -> None:
        job, attempt = seen.job, _attempt(seen)
        with self._store.read() as s:
            row = queries.unended_attempt(s, job.id)
            if row is None or row.number != attempt.number:
                raise Changed
            next_seq = row.next_seq
        for batch in remains.undelivered(job.run_dir, attempt.number, next_seq):
            try:
                with self._store.begin() as s:
                    leases.check(s, lease)
                    events.ingest(s, job.id, attempt.number, batch[0]["seq"], batch)
            except (SequenceGap, Superseded) as error:
                raise Changed from error
            except BadBatch as error:
                log.warning("journal_refused", job_id=job.id, attempt=attempt.number, error=str(error))
                return

    def _finish(self, action: Finish, seen: Seen, lease: Lease) -> None:
        job = seen.job
        dropped = remains.discard(job.run_dir) if action.state == "cancelled" and job.discard else None
        with self._unchanged(seen, lease) as (s, row):
            _move(s, row, action.state, action.reason)
            if dropped is not None:
                events.append_control_event(s, row, "discarded", what=dropped)

    @contextmanager
    def _unchanged(self, seen: Seen, lease: Lease) -> Iterator[tuple[Session, JobRow]]:
        """A transaction on the locked job under the lease, if the job is as it was seen."""
        with self._store.begin() as s:
            leases.check(s, lease)
            row = jobs.get_job(s, None, seen.job.id, lock=True)
            if row is None or row.state != seen.job.state:
                raise Changed
            attempt = queries.unended_attempt(s, row.id)
            if (attempt.number if attempt else None) != (seen.attempt.number if seen.attempt else None):
                raise Changed
            yield s, row

    def _locked_attempt(self, s: Session, seen: Seen) -> AttemptRow:
        row = queries.unended_attempt(s, seen.job.id, lock=True)
        if row is None or row.number != _attempt(seen).number:
            raise Changed
        return row

    def _still_ours(self, lease: Lease) -> None:
        """Before something that no transaction guards. A moment's staleness is harmless: see the submission id."""
        with self._store.begin() as s:
            leases.check(s, lease)
        if self._clock() >= lease.until:
            raise LeaseLost


def _attempt(seen: Seen) -> AttemptView:
    assert seen.attempt is not None
    return seen.attempt


def _move(s: Session, row: JobRow, state: str, reason: str) -> None:
    jobs.set_state(s, row, state, reason, allowed={row.state})
