"""Jobs: making, finding, listing, and the changes of state that the control plane itself makes.

A row that is to be changed is fetched with `lock=True` and simply mutated; the session writes it. Changes that users
make end with `bump(row)`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from sapo_ray.api.jobs import LIVE, TERMINAL
from sapo_ray.control.store.errors import BadCursor, DriverExiting, IllegalTransition
from sapo_ray.control.store.events import append_control_event
from sapo_ray.control.store.projection import enter
from sapo_ray.control.store.tables import AttemptRow, JobRow, LeaseRow, is_id, new_id

PREFIX = "job-"
MAX_PAGE = 1000


def create_job(
    s: Session,
    *,
    tenant: str,
    name: str,
    spec: dict[str, Any],
    steps: int,
    priority: int,
    labels: dict[str, str],
    scale: tuple[int, int, int],
    runs_root: Path,
) -> JobRow:
    """A queued job with its first event. `scale` is (min, max, target); its run directory is `runs_root / id`."""
    now = time.time()
    id = new_id(PREFIX, now)
    row = JobRow(
        id=id,
        tenant=tenant,
        name=name,
        priority=priority,
        labels=labels,
        spec=spec,
        state="queued",
        reason="submitted",
        since=now,
        scale_min=scale[0],
        scale_max=scale[1],
        scale_target=scale[2],
        run_dir=str(runs_root / id),
        steps=steps,
        created_at=now,
        updated_at=now,
    )
    s.add(row)
    s.flush()
    append_control_event(s, row, "transition", state="queued", previous=None, reason="submitted")
    return row


def get_job(s: Session, tenant: str | None, id: str, lock: bool = False) -> JobRow | None:
    """The job, if it is the tenant's (None: anybody's). `lock` holds others off until the transaction ends."""
    if not is_id(PREFIX, id):
        return None
    query = select(JobRow).where(JobRow.id == id)
    if lock:
        # Not FOR UPDATE: rows that merely refer to the job (events, a lease) may be written meanwhile.
        query = query.with_for_update(key_share=True).execution_options(populate_existing=True)
    row = s.scalar(query)
    return row if row is not None and tenant in (None, row.tenant) else None


def list_jobs(
    s: Session,
    tenant: str | None,
    *,
    state: str | Collection[str] | None = None,
    label: tuple[str, str | None] | None = None,
    after: str | None = None,
    limit: int = 100,
) -> list[JobRow]:
    """Newest first, those that follow `after`: the id of a page's last job, which may have been deleted since.

    Ids sort by the time of creation, so one index range is read however deep the page. Raises BadCursor.
    """
    query = select(JobRow).order_by(JobRow.id.desc()).limit(min(limit, MAX_PAGE))
    if tenant is not None:
        query = query.where(JobRow.tenant == tenant)
    if state is not None:
        query = query.where(JobRow.state.in_([state] if isinstance(state, str) else list(state)))
    if label is not None:
        if not _may_be_label(label[0]) or (label[1] is not None and "\0" in label[1]):
            return []
        found = JobRow.labels[label[0]].as_string()
        query = query.where(found.is_not(None) if label[1] is None else found == label[1])
    if after is not None:
        if not is_id(PREFIX, after):
            raise BadCursor("after must be the `next` of a page of jobs")
        query = query.where(JobRow.id < after)
    return list(s.scalars(query))


def _may_be_label(key: str) -> bool:
    """Whether a job can have such a label. Others would need quoting in a JSON path."""
    return key.isascii() and all(c.isalnum() or c in "._/-" for c in key)


def bump(row: JobRow) -> None:
    """A user has changed the job: its ETag changes."""
    row.generation += 1
    row.updated_at = time.time()


def set_state(s: Session, row: JobRow, state: str, reason: str, *, allowed: Collection[str]) -> None:
    """Bring a locked job into a state and record it as a `transition`. Raises IllegalTransition.

    Does not touch `desired_state`, nor the generation.
    """
    if row.state not in allowed:
        raise IllegalTransition(row.state, state, allowed)
    now = time.time()
    change = enter(row, state, reason, now)
    row.updated_at = now
    append_control_event(s, row, "transition", **change._asdict())


def ids_in_states(s: Session, states: Iterable[str]) -> list[str]:
    """Jobs in these states, in the order in which they would be launched: by priority, then by age."""
    query = select(JobRow.id).where(JobRow.state.in_(sorted(states)))
    return list(s.scalars(query.order_by(JobRow.priority.desc(), JobRow.id)))


def active_ids(s: Session) -> list[str]:
    """All jobs that have not ended, in the order of `ids_in_states`."""
    return ids_in_states(s, LIVE | {"queued", "paused"})


def queue_position(s: Session, row: JobRow) -> int:
    """Place among the tenant's queued jobs, from 1."""
    ahead = select(func.count()).where(
        JobRow.tenant == row.tenant,
        JobRow.state == "queued",
        JobRow.priority >= row.priority,  # said twice: this bounds what is read of the index
        or_(JobRow.priority > row.priority, JobRow.id < row.id),
    )
    return (s.scalar(ahead) or 0) + 1


def queue_positions(s: Session, rows: Sequence[JobRow]) -> dict[str, int]:
    """`queue_position` of every queued job among `rows`, in one query."""
    tenants = {row.tenant for row in rows if row.state == "queued"}
    if not tenants:
        return {}
    place = func.row_number().over(partition_by=JobRow.tenant, order_by=(JobRow.priority.desc(), JobRow.id))
    queued = select(JobRow.id, place.label("place")).where(JobRow.tenant.in_(tenants), JobRow.state == "queued")
    queue = queued.subquery()
    shown = select(queue.c.id, queue.c.place).where(queue.c.id.in_([row.id for row in rows]))
    return {row.id: row.place for row in s.execute(shown)}


def count_live(s: Session, tenant: str) -> int:
    """The tenant's jobs that may have a driver."""
    query = select(func.count()).where(JobRow.tenant == tenant, JobRow.state.in_(sorted(LIVE)))
    return s.scalar(query) or 0


def delete_job(s: Session, row: JobRow) -> None:
    """Forget an ended job with its attempts and events (its files are another's business).

    Raises DriverExiting while a driver may still run: without its attempt nobody would end it.
    """
    if row.state not in TERMINAL:
        raise IllegalTransition(row.state, "deleted", TERMINAL)
    alive = select(AttemptRow.number).where(AttemptRow.job_id == row.id, AttemptRow.state != "ended").limit(1)
    if s.scalar(alive) is not None:
        raise DriverExiting(row.state)
    lease = s.get(LeaseRow, row.id)
    if lease is not None:
        s.delete(lease)
    s.delete(row)
    s.flush()
