"""Tables of the control plane. Times are Unix seconds. The migrations beside this file build the same; a test says so.

JSON columns of a job notice changes of their own items (`row.labels["a"] = "b"`), not of what lies deeper.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import Any

from sqlalchemy import BigInteger, Float, ForeignKey, Index, Integer, MetaData, Text, UniqueConstraint
from sqlalchemy.ext.mutable import MutableDict, MutableList
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sapo_ray.control.store.columns import CleanJson, CleanText

ALPHABET = "234567abcdefghijklmnopqrstuvwxyz"
"""Base 32 in ASCII's order, so that ids sort as their times do."""
TIME_CHARS, RANDOM_CHARS = 11, 9
"""55 bits of microseconds (until the year 3111) and 45 random bits."""


class Base(DeclarativeBase):
    """All tables, with names for their constraints that migrations can refer to."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def new_id(prefix: str, now: float | None = None) -> str:
    """`prefix` and 20 characters that sort by time. `now` in Unix seconds."""
    microseconds = time.time_ns() // 1000 if now is None else int(now * 1e6)
    number = (microseconds << 5 * RANDOM_CHARS) | secrets.randbits(5 * RANDOM_CHARS)
    total = TIME_CHARS + RANDOM_CHARS
    return prefix + "".join(ALPHABET[number >> 5 * place & 31] for place in reversed(range(total)))


def is_id(prefix: str, text: str) -> bool:
    """Whether `new_id(prefix)` could have made it. Anything else need not be looked up."""
    rest = text.removeprefix(prefix)
    return text.startswith(prefix) and len(rest) == TIME_CHARS + RANDOM_CHARS and set(rest) <= set(ALPHABET)


def sha256(secret: str) -> str:
    """What is kept of a secret: it has 256 random bits, so a plain hash is enough."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


class JobRow(Base):
    """A job: desired (`spec`, `desired_state`, `scale_*`) and observed (the rest)."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(CleanText)
    priority: Mapped[int] = mapped_column(Integer)
    labels: Mapped[dict[str, str]] = mapped_column(MutableDict.as_mutable(CleanJson))
    spec: Mapped[dict[str, Any]] = mapped_column(CleanJson)
    state: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(CleanText)
    since: Mapped[float] = mapped_column(Float(53))
    generation: Mapped[int] = mapped_column(Integer, default=1)
    """Counts changes that users made; the ETag."""
    desired_state: Mapped[str] = mapped_column(Text, default="run")
    discard: Mapped[bool] = mapped_column(default=False)
    scale_min: Mapped[int] = mapped_column(Integer)
    scale_max: Mapped[int] = mapped_column(Integer)
    scale_target: Mapped[int] = mapped_column(Integer)
    checkpoint_request: Mapped[int] = mapped_column(Integer, default=0)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    run_dir: Mapped[str] = mapped_column(CleanText)
    step: Mapped[int] = mapped_column(Integer, default=0)
    steps: Mapped[int] = mapped_column(Integer)
    conditions: Mapped[list[dict[str, Any]]] = mapped_column(MutableList.as_mutable(CleanJson), default=list)
    summary: Mapped[dict[str, Any]] = mapped_column(MutableDict.as_mutable(CleanJson), default=dict)
    result: Mapped[dict[str, Any] | None] = mapped_column(CleanJson)
    next_event: Mapped[int] = mapped_column(BigInteger, default=1)
    """Id of the next event; raised only by `events`, in the transaction that inserts."""
    restarts: Mapped[int] = mapped_column(Integer, default=0)
    last_heard: Mapped[float | None] = mapped_column(Float(53))
    created_at: Mapped[float] = mapped_column(Float(53))
    updated_at: Mapped[float] = mapped_column(Float(53))
    started_at: Mapped[float | None] = mapped_column(Float(53))
    finished_at: Mapped[float | None] = mapped_column(Float(53))

    __table_args__ = (
        Index(None, "tenant", "id"),
        Index(None, "tenant", "state", "id"),
        Index(None, "state", "priority", "created_at"),
        Index(None, "tenant", "state", "priority", "id"),
    )


class AttemptRow(Base):
    """One driver of a job."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    token_hash: Mapped[str] = mapped_column(Text, unique=True)
    submission_id: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text, default="launching")
    """launching, launched, ended."""
    next_seq: Mapped[int] = mapped_column(BigInteger, default=1)
    """First of the driver's events that is not stored yet."""
    created_at: Mapped[float] = mapped_column(Float(53))
    launched_at: Mapped[float | None] = mapped_column(Float(53))
    last_heard: Mapped[float | None] = mapped_column(Float(53))
    ended_at: Mapped[float | None] = mapped_column(Float(53))
    reason: Mapped[str | None] = mapped_column(CleanText)


class EventRow(Base):
    """Something that happened to a job; `id` is contiguous from 1 within the job."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    time: Mapped[float] = mapped_column(Float(53))
    attempt: Mapped[int | None] = mapped_column(Integer)
    seq: Mapped[int | None] = mapped_column(BigInteger)
    source: Mapped[str] = mapped_column(Text)
    """driver, control."""
    kind: Mapped[str] = mapped_column(CleanText)
    data: Mapped[dict[str, Any]] = mapped_column(CleanJson)

    __table_args__ = (UniqueConstraint("job_id", "attempt", "seq"), Index(None, "job_id", "kind", "id"))


class LeaseRow(Base):
    """Which replica's reconciler looks after a job."""

    __tablename__ = "leases"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    holder: Mapped[str] = mapped_column(Text)
    until: Mapped[float] = mapped_column(Float(53))
    generation: Mapped[int] = mapped_column(BigInteger)


class KeyRow(Base):
    """A key of the API; the secret itself is not kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text, index=True)
    name: Mapped[str] = mapped_column(CleanText)
    prefix: Mapped[str] = mapped_column(CleanText)
    """First characters of the secret, so that people recognise it."""
    hash: Mapped[str] = mapped_column(Text, unique=True)
    scopes: Mapped[list[str]] = mapped_column(CleanJson)
    created_at: Mapped[float] = mapped_column(Float(53))
    expires_at: Mapped[float | None] = mapped_column(Float(53))
    revoked_at: Mapped[float | None] = mapped_column(Float(53))
    last_used_at: Mapped[float | None] = mapped_column(Float(53))


class IdempotencyRow(Base):
    """A request that came with an idempotency key, and its answer."""

    __tablename__ = "idempotency"

    tenant: Mapped[str] = mapped_column(Text, primary_key=True)
    key: Mapped[str] = mapped_column(CleanText, primary_key=True)
    method: Mapped[str] = mapped_column(Text)
    path: Mapped[str] = mapped_column(CleanText)
    body_hash: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text)
    """in_flight, done."""
    status: Mapped[int | None] = mapped_column(Integer)
    response: Mapped[Any] = mapped_column(CleanJson, nullable=True)
    created_at: Mapped[float] = mapped_column(Float(53), index=True)


class DatasetRow(Base):
    """An uploaded data set; the file lies at `path`."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(CleanText)
    format: Mapped[str] = mapped_column(Text)
    """jsonl, parquet."""
    rows: Mapped[int] = mapped_column(BigInteger)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(Text)
    columns: Mapped[list[str]] = mapped_column(CleanJson)
    path: Mapped[str] = mapped_column(CleanText)
    created_at: Mapped[float] = mapped_column(Float(53))
    deleted_at: Mapped[float | None] = mapped_column(Float(53))

    __table_args__ = (Index(None, "tenant", "id"),)
