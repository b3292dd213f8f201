"""Attempts: one driver each, with a token for its own job only. The token itself is not kept."""

from __future__ import annotations

import secrets
import time

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from sapo_ray.control.store.tables import AttemptRow, JobRow, sha256


def hash_token(token: str) -> str:
    """What an attempt's `token_hash` is of its token."""
    return sha256(token)


def begin_attempt(s: Session, row: JobRow) -> tuple[AttemptRow, str]:
    """The next attempt of a locked job, and its token. What is left of earlier ones is superseded from now on.

    Leaves the job's state alone.
    """
    now = time.time()
    earlier = update(AttemptRow).where(AttemptRow.job_id == row.id, AttemptRow.state != "ended")
    s.execute(earlier.values(state="ended", ended_at=now, reason="superseded"))
    row.attempt += 1
    row.last_heard = None
    row.updated_at = now
    token = _new_token()
    attempt = AttemptRow(
        job_id=row.id,
        number=row.attempt,
        token_hash=hash_token(token),
        submission_id=f"sapo-{row.id}-{row.attempt}",
        state="launching",
        next_seq=1,
        created_at=now,
    )
    s.add(attempt)
    s.flush()
    return attempt, token


def renew_token(s: Session, attempt: AttemptRow) -> str:
    """A new token for an attempt whose token was lost before its driver had it; the old one is void."""
    token = _new_token()
    attempt.token_hash = hash_token(token)
    s.flush()
    return token


def get_attempt(s: Session, job_id: str, number: int) -> AttemptRow | None:
    """One attempt of a job."""
    return s.get(AttemptRow, (job_id, number), populate_existing=True)


def list_attempts(s: Session, job_id: str) -> list[AttemptRow]:
    """All attempts of a job, oldest first."""
    return list(s.scalars(select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.number)))


def mark_launched(s: Session, attempt: AttemptRow) -> None:
    """The launcher has taken it."""
    if attempt.state == "launching":
        attempt.state = "launched"
        attempt.launched_at = time.time()
        s.flush()


def end_attempt(s: Session, attempt: AttemptRow, reason: str) -> None:
    """Its driver is gone, or never came. Its last events may still arrive until the next attempt begins."""
    if attempt.state != "ended":
        attempt.state = "ended"
        attempt.ended_at = time.time()
        attempt.reason = reason
        s.flush()


def by_token(s: Session, token: str) -> AttemptRow | None:
    """The attempt that this token was made for, superseded or not."""
    return s.scalar(select(AttemptRow).where(AttemptRow.token_hash == hash_token(token)))


def _new_token() -> str:
    return "sapo_job_" + secrets.token_urlsafe(32)
