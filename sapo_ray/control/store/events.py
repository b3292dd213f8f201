"""Events of jobs: what drivers deliver, exactly once, and what the control plane itself records.

Ids come from the job's own counter, raised in the transaction that inserts: the row lock this takes makes writers of
one job follow one another, so ids have no gaps and become visible in their order.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import set_committed_value

from sapo_ray.control.store.errors import BadBatch, SequenceGap, Superseded
from sapo_ray.control.store.projection import apply
from sapo_ray.control.store.tables import AttemptRow, EventRow, JobRow

MAX_KIND = 64
LATEST = 253_402_300_799.0
"""The end of the year 9999, after which no date can be written."""
FRAME = ("time", "attempt", "seq", "kind")
"""Fields of a driver's event that are columns here; the rest is its data."""
CHUNK = 500
MAX_ID = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestReply:
    """What a delivery came to."""

    next_seq: int
    """First sequence number not stored yet."""
    job: JobRow
    """The job, locked, as it is after the events."""


def append_control_event(s: Session, row: JobRow, kind: str, /, **data: Any) -> int:
    """Record what the control plane did or saw. Returns the event's id. `data` may itself have a field `kind`."""
    return _append(s, row, [{"time": time.time(), "source": "control", "kind": kind, "data": data}])


def ingest(
    s: Session, job_id: str, attempt: int, first_seq: int, events: Sequence[Mapping[str, Any]], now: float | None = None
) -> IngestReply:
    """Store what a driver delivers and bring the job up to it.

    Events stored before are skipped, so a delivery may be repeated. An empty delivery is a sign of life. Raises
    Superseded, SequenceGap, BadBatch; then nothing is stored.
    """
    now = time.time() if now is None else now
    query = select(JobRow).where(JobRow.id == job_id)
    job = s.scalar(query.with_for_update(key_share=True).execution_options(populate_existing=True))
    driver = None
    if job is not None and job.attempt == attempt:
        key = AttemptRow.job_id == job_id, AttemptRow.number == attempt
        driver = s.scalar(select(AttemptRow).where(*key).execution_options(populate_existing=True))
    if job is None or driver is None:
        raise Superseded(0 if job is None else job.attempt)
    _check_numbers(first_seq, events)
    if first_seq > driver.next_seq:
        raise SequenceGap(driver.next_seq)
    fresh = events[driver.next_seq - first_seq :]
    if fresh:
        _append(s, job, _project(job, attempt, driver.next_seq, fresh, now))
        driver.next_seq += len(fresh)
        job.updated_at = now
    job.last_heard = driver.last_heard = now
    return IngestReply(next_seq=driver.next_seq, job=job)


def list_events(
    s: Session, job_id: str, after: int, limit: int, *, kinds: Collection[str] | None = None
) -> list[EventRow]:
    """Events with an id above `after`, oldest first; of these kinds only, if any are given."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.id > min(after, MAX_ID))
    if kinds is not None:
        query = query.where(EventRow.kind.in_(sorted(kinds)))
    return list(s.scalars(query.order_by(EventRow.id).limit(limit)))


def newest_of_kind(s: Session, job_id: str, attempt: int, kind: str, limit: int) -> list[EventRow]:
    """An attempt's newest events of a kind, newest first."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.attempt == attempt, EventRow.kind == kind)
    return list(s.scalars(query.order_by(EventRow.id.desc()).limit(limit)))


def newest_events(s: Session, job_id: str, kinds: Collection[str], limit: int) -> list[EventRow]:
    """The newest events of these kinds, newest first."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.kind.in_(sorted(kinds)))
    return list(s.scalars(query.order_by(EventRow.id.desc()).limit(limit)))


def newest_ids(s: Session, job_ids: Iterable[str]) -> dict[str, int]:
    """Id of each job's newest event. Jobs that are gone are left out."""
    wanted = sorted(set(job_ids))
    newest: dict[str, int] = {}
    for start in range(0, len(wanted), CHUNK):
        query = select(JobRow.id, JobRow.next_event).where(JobRow.id.in_(wanted[start : start + CHUNK]))
        newest |= {id: following - 1 for id, following in s.execute(query)}
    return newest


def _check_numbers(first_seq: int, events: Sequence[Mapping[str, Any]]) -> None:
    for offset, event in enumerate(events):
        if event.get("seq", first_seq + offset) != first_seq + offset:
            raise BadBatch(
                f"events[{offset}].seq must be {first_seq + offset}, as first_seq is {first_seq}; got {event['seq']!r}"
            )


def _project(
    job: JobRow, attempt: int, first_seq: int, events: Sequence[Mapping[str, Any]], now: float
) -> list[dict[str, Any]]:
    """The events' rows, each followed by the change of state that it brought about, if it did."""
    rows: list[dict[str, Any]] = []
    for seq, event in enumerate(events, first_seq):
        at = _time(event.get("time"), now)
        rows.append(
            {
                "time": at,
                "attempt": attempt,
                "seq": seq,
                "source": "driver",
                "kind": _kind(event.get("kind")),
                "data": {key: value for key, value in event.items() if key not in FRAME},
            }
        )
        change = apply(job, event, at=min(at, now))
        if change is not None:
            rows.append({"time": now, "source": "control", "kind": "transition", "data": change._asdict()})
    return rows


def _append(s: Session, job: JobRow, rows: list[dict[str, Any]]) -> int:
    """Insert events under the job's next ids; returns the last one's. The session must be one for writing."""
    raised = update(JobRow).where(JobRow.id == job.id).values(next_event=JobRow.next_event + len(rows))
    following = s.execute(raised.returning(JobRow.next_event).execution_options(synchronize_session=False)).scalar_one()
    set_committed_value(job, "next_event", following)
    numbered = [
        {"attempt": None, "seq": None, **row, "job_id": job.id, "id": id}
        for id, row in enumerate(rows, following - len(rows))
    ]
    s.execute(insert(EventRow), numbered)
    return following - 1


def _kind(value: Any) -> str:
    return value[:MAX_KIND] if isinstance(value, str) and value else "unknown"


def _time(value: Any, now: float) -> float:
    usable = isinstance(value, int | float) and 0 <= value <= LATEST  # false for NaN; whole numbers may be any size
    return float(value) if usable else now
