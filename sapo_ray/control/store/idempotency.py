"""Idempotency keys: a request that is sent twice is done once, and answered twice.

Best used in one transaction: `claim`, the work, `finish`. Then a crash leaves neither work nor claim, and a second
request waits for the first one's commit and replays its answer. Where the work cannot be in the transaction, `claim` is
committed by itself; the key is then in flight until `finish` or `abandon`, or for TAKE_OVER_S after a crash.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CursorResult, delete, exists, select, tuple_, update
from sqlalchemy.orm import Session

from sapo_ray.control.store.errors import KeyInFlight, KeyReused
from sapo_ray.control.store.tables import IdempotencyRow
from sapo_ray.control.store.upsert import insert_if_absent

KEPT_S = 24 * 3600.0
TAKE_OVER_S = 600.0
"""A request that was claimed so long ago without an answer has died; the key may be claimed again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """The answer that the first request with the key was given."""

    status: int
    response: Any


def claim(
    s: Session, tenant: str, key: str, method: str, path: str, body_hash: str, now: float | None = None
) -> Replay | None:
    """None: the key is this request's now. Raises KeyInFlight, KeyReused."""
    now = time.time() if now is None else now
    values = {
        "tenant": tenant,
        "key": key,
        "method": method,
        "path": path,
        "body_hash": body_hash,
        "state": "in_flight",
        "created_at": now,
    }
    if insert_if_absent(s, IdempotencyRow, values):
        return None
    row = _locked(s, tenant, key)
    if row is None:  # abandoned between the two statements: the client may simply try again
        raise KeyInFlight(f"the first request with idempotency key {key!r} has just ended without an answer")
    age = now - row.created_at
    if age >= KEPT_S or (row.state == "in_flight" and age >= TAKE_OVER_S):
        for name, value in values.items():
            setattr(row, name, value)
        row.status = row.response = None
        s.flush()
        return None
    if (row.method, row.path, row.body_hash) != (method, path, body_hash):
        raise KeyReused(f"idempotency key {key!r} was first used for another request ({row.method} {row.path})")
    if row.state == "in_flight":
        raise KeyInFlight(f"the first request with idempotency key {key!r} has not been answered yet")
    assert row.status is not None
    return Replay(status=row.status, response=row.response)


def finish(s: Session, tenant: str, key: str, status: int, response: Any) -> None:
    """Keep the answer for whoever asks again. `response` is JSON."""
    claimed = update(IdempotencyRow).where(IdempotencyRow.tenant == tenant, IdempotencyRow.key == key)
    done = claimed.values(state="done", status=status, response=response)
    result = s.execute(done.execution_options(synchronize_session="evaluate"))
    assert isinstance(result, CursorResult)
    assert result.rowcount == 1, f"idempotency key {key!r} was not claimed"


def abandon(s: Session, tenant: str, key: str) -> None:
    """The request came to nothing: it may be sent again under the same key."""
    s.execute(
        delete(IdempotencyRow)
        .where(IdempotencyRow.tenant == tenant, IdempotencyRow.key == key, IdempotencyRow.state == "in_flight")
        .execution_options(synchronize_session="fetch")
    )


def any_old(s: Session, now: float) -> bool:
    """Whether `sweep` would find something."""
    return bool(s.scalar(select(exists().where(IdempotencyRow.created_at < now - KEPT_S))))


def sweep(s: Session, now: float, most: int = 5000) -> int:
    """Forget keys that are older than a day, at most so many. Returns how many."""
    key = tuple_(IdempotencyRow.tenant, IdempotencyRow.key)
    found = select(IdempotencyRow.tenant, IdempotencyRow.key).where(IdempotencyRow.created_at < now - KEPT_S)
    old = delete(IdempotencyRow).where(key.in_(found.limit(most)))
    result = s.execute(old.execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    return result.rowcount


def _locked(s: Session, tenant: str, key: str) -> IdempotencyRow | None:
    query = select(IdempotencyRow).where(IdempotencyRow.tenant == tenant, IdempotencyRow.key == key)
    return s.scalar(query.with_for_update().execution_options(populate_existing=True))
