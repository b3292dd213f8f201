"""Leases: which replica's reconciler looks after a job.

The generation grows whenever a lease goes from hand to hand or was let run out. A writing transaction of the reconciler
calls `check` first: the lease's row is then locked until the commit, so nobody can take the job over in between. That
holds whatever the replicas' clocks say; wrong clocks only make leases change hands sooner or later.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import case, or_, select, update
from sqlalchemy.orm import Session

from sapo_ray.control.store.engine import reads_only
from sapo_ray.control.store.errors import LeaseLost
from sapo_ray.control.store.tables import LeaseRow
from sapo_ray.control.store.upsert import insert_if_absent


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """The right to act on a job."""

    job_id: str
    holder: str
    generation: int
    until: float


def acquire(s: Session, job_id: str, holder: str, seconds: float, now: float) -> Lease | None:
    """Take a free or expired lease, or prolong one's own (its generation stays). None: another holds it.

    `holder` must be unique to one reconciler of one process.
    """
    until = now + seconds
    mine = (LeaseRow.holder == holder) & (LeaseRow.until > now)
    taken = (
        update(LeaseRow)
        .where(LeaseRow.job_id == job_id, or_(LeaseRow.until <= now, LeaseRow.holder == holder))
        .values(holder=holder, until=until, generation=LeaseRow.generation + case((mine, 0), else_=1))
        .returning(LeaseRow.generation)
        .execution_options(synchronize_session=False)
    )
    generation = s.execute(taken).scalar_one_or_none()
    if generation is None:
        first = {"job_id": job_id, "holder": holder, "until": until, "generation": 1}
        if not insert_if_absent(s, LeaseRow, first):
            return None
        generation = 1
    return Lease(job_id=job_id, holder=holder, generation=generation, until=until)


def check(s: Session, lease: Lease) -> None:
    """Raises LeaseLost unless the lease is still this one, and keeps it so until the transaction ends.

    In a session for reading it cannot be kept: there, this is a look.
    """
    query = select(LeaseRow).where(LeaseRow.job_id == lease.job_id)
    if not reads_only(s):
        query = query.with_for_update(read=True)
    row = s.scalar(query.execution_options(populate_existing=True))
    if row is None or (row.holder, row.generation) != (lease.holder, lease.generation):
        raise LeaseLost(f"the lease of {lease.job_id} went from {lease.holder} to {row.holder if row else 'nobody'}")


def release(s: Session, lease: Lease) -> None:
    """Let another take the job at once. Nothing happens if the lease was lost before."""
    given_back = update(LeaseRow).where(
        LeaseRow.job_id == lease.job_id,
        LeaseRow.holder == lease.holder,
        LeaseRow.generation == lease.generation,
    )
    s.execute(given_back.values(until=0.0).execution_options(synchronize_session=False))
