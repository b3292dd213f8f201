"""What the reconciler asks the store in one query each."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from sqlalchemy import Text, and_, exists, or_, select, text, update
from sqlalchemy import cast as cast_to
from sqlalchemy.orm import Session

from sapo_ray.api.jobs import LIVE
from sapo_ray.control.reconciler.views import AttemptState, AttemptView, JobView
from sapo_ray.control.store import AttemptRow, EventRow, JobRow, LeaseRow
from sapo_ray.control.store.projection import DISK_FULL

_UNENDED = exists().where(AttemptRow.job_id == JobRow.id, AttemptRow.state != "ended")


def jobs_to_look_at(s: Session, holder: str, now: float) -> list[str]:
    """Live jobs, others whose driver may still run, and paused ones that should not be; oldest first.

    Those that another replica holds are its business.
    """
    with_driver = select(AttemptRow.job_id).where(AttemptRow.state != "ended")
    unwanted = and_(JobRow.state == "paused", JobRow.desired_state == "run")
    query = (
        select(JobRow.id)
        .outerjoin(LeaseRow, LeaseRow.job_id == JobRow.id)
        .where(or_(JobRow.state.in_(sorted(LIVE)), JobRow.id.in_(with_driver), unwanted))
        .where(or_(LeaseRow.job_id.is_(None), LeaseRow.holder == holder, LeaseRow.until <= now))
        .order_by(JobRow.id)
    )
    return list(s.scalars(query))


def tenants_that_wait(s: Session) -> list[str]:
    """Tenants with queued jobs."""
    return list(s.scalars(select(JobRow.tenant).where(JobRow.state == "queued").distinct().order_by(JobRow.tenant)))


def first_in_queue(s: Session, tenant: str, skip: set[str]) -> JobRow | None:
    """The tenant's job to run next: highest priority, then oldest (ids sort by age).

    Not one whose last driver is still ending.
    """
    query = (
        select(JobRow)
        .where(JobRow.tenant == tenant, JobRow.state == "queued", ~_UNENDED, JobRow.id.not_in(skip))
        .order_by(JobRow.priority.desc(), JobRow.id)
        .limit(1)
    )
    return s.scalars(query).first()


def explain_waiting(s: Session, tenant: str, reason: str) -> None:
    """Give all queued jobs of a tenant the reason why they wait; writes nothing where it is there already."""
    s.execute(
        update(JobRow)
        .where(JobRow.tenant == tenant, JobRow.state == "queued", JobRow.reason != reason)
        .values(reason=reason)
        .execution_options(synchronize_session=False)
    )


def is_unexplained(s: Session, tenant: str, reason: str) -> bool:
    """Whether a queued job of the tenant has another reason than this."""
    return bool(
        s.scalar(select(exists().where(JobRow.tenant == tenant, JobRow.state == "queued", JobRow.reason != reason)))
    )


def is_anybody_unexplained(s: Session, reason: str) -> bool:
    """Whether a queued job has another reason than this."""
    return bool(s.scalar(select(exists().where(JobRow.state == "queued", JobRow.reason != reason))))


def jobs_to_hold(s: Session, reason: str, most: int) -> list[JobRow]:
    """Queued jobs that wait without this reason yet, locked, always in the same order."""
    query = select(JobRow).where(JobRow.state == "queued", JobRow.reason != reason).order_by(JobRow.id).limit(most)
    return list(s.scalars(query.with_for_update(key_share=True).execution_options(populate_existing=True)))


def waiting_with(s: Session, condition: str, most: int, *, lock: bool = True) -> list[JobRow]:
    """Queued and paused jobs with a condition, locked, always in the same order."""
    said = cast_to(JobRow.conditions, Text).contains(f'"{condition}"', autoescape=True)
    query = select(JobRow).where(JobRow.state.in_(["paused", "queued"]), said).order_by(JobRow.id).limit(most)
    if lock:
        query = query.with_for_update(key_share=True).execution_options(populate_existing=True)
    return list(s.scalars(query))


def lock_queue(s: Session, tenant: str) -> None:
    """Let one replica at a time count a tenant's running jobs and add one. SQLite has one writer anyway."""
    if s.get_bind().dialect.name == "postgresql":
        s.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": f"sapo-queue:{tenant}"})


def discarded_jobs(s: Session) -> list[JobRow]:
    """Jobs cancelled with `discard` that had no driver which could have been waited for, and whose files remain."""
    noted = exists().where(EventRow.job_id == JobRow.id, EventRow.kind == "discarded")
    return list(
        s.scalars(select(JobRow).where(JobRow.state == "cancelled", JobRow.discard.is_(True), ~noted, ~_UNENDED))
    )


def unended_attempt(s: Session, job_id: str, *, lock: bool = False) -> AttemptRow | None:
    """The attempt of a job that may have a driver; there is at most one."""
    query = (
        select(AttemptRow)
        .where(AttemptRow.job_id == job_id, AttemptRow.state != "ended")
        .order_by(AttemptRow.number.desc())
        .limit(1)
    )
    if lock:
        query = query.with_for_update().execution_options(populate_existing=True)
    return s.scalars(query).first()


def job_view(row: JobRow) -> JobView:
    """Copy of what decisions need."""
    return JobView(
        id=row.id,
        tenant=row.tenant,
        state=row.state,
        reason=row.reason,
        since=row.since,
        desired=row.desired_state,
        discard=row.discard,
        restarts=row.restarts,
        run_dir=Path(row.run_dir),
        held=any(condition["type"] == DISK_FULL for condition in row.conditions),
    )


def attempt_view(row: AttemptRow) -> AttemptView:
    """Copy of what decisions need."""
    return AttemptView(
        number=row.number,
        submission_id=row.submission_id,
        state=cast(AttemptState, row.state),
        created_at=row.created_at,
        launched_at=row.launched_at,
        last_heard=row.last_heard,
    )
