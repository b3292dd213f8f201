"""Keys of the API. Only their hashes are kept: a secret is shown once, when it is made."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from sapo_ray.control.store.tables import KeyRow, is_id, new_id, sha256
from sapo_ray.control.store.upsert import insert_if_absent

PREFIX = "key-"
SCOPES = frozenset({"read", "submit", "admin"})
SHOWN = 12
"""Characters of a secret that are kept for people: `sapo_` and 7 of 43."""
USED_EVERY_S = 60
"""`last_used_at` is written no more often than this."""


def create_key(
    s: Session,
    tenant: str,
    name: str,
    scopes: Collection[str],
    secret: str | None = None,
    expires_at: float | None = None,
) -> tuple[KeyRow, str]:
    """A new key and its secret: `sapo_` and 43 characters, unless the operator gives one."""
    secret = "sapo_" + secrets.token_urlsafe(32) if secret is None else secret
    row = KeyRow(**_values(tenant, name, scopes, secret, expires_at))
    s.add(row)
    s.flush()
    return row, secret


def ensure_key(s: Session, tenant: str, name: str, scopes: Collection[str], secret: str) -> KeyRow:
    """The key with this secret, made if there is none. Replicas may do so at once. A revoked key stays revoked."""
    insert_if_absent(s, KeyRow, _values(tenant, name, scopes, secret, None))
    return s.scalars(select(KeyRow).where(KeyRow.hash == sha256(secret))).one()


def find_key(s: Session, secret: str, now: float | None = None) -> KeyRow | None:
    """The key with this secret, unless it is revoked or expired."""
    row = s.scalar(select(KeyRow).where(KeyRow.hash == sha256(secret)))
    now = time.time() if now is None else now
    if row is None or row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now):
        return None
    return row


def stale_use(row: KeyRow, now: float) -> bool:
    """Whether `touch` would write anything: worth knowing before a write transaction is begun for it."""
    return row.last_used_at is None or row.last_used_at < now - USED_EVERY_S


def touch(s: Session, id: str, now: float) -> None:
    """Note that a key was used."""
    old = or_(KeyRow.last_used_at.is_(None), KeyRow.last_used_at < now - USED_EVERY_S)
    noted = update(KeyRow).where(KeyRow.id == id, old).values(last_used_at=now)
    s.execute(noted.execution_options(synchronize_session=False))


def get_key(s: Session, tenant: str | None, id: str) -> KeyRow | None:
    """The key, if it is the tenant's (None: anybody's)."""
    row = s.get(KeyRow, id) if is_id(PREFIX, id) else None
    return row if row is not None and tenant in (None, row.tenant) else None


def revoke(s: Session, row: KeyRow) -> None:
    """End a key for good. A second time changes nothing."""
    if row.revoked_at is None:
        row.revoked_at = time.time()
        s.flush()


def list_keys(s: Session, tenant: str | None) -> list[KeyRow]:
    """The tenant's keys (None: everybody's), oldest first, revoked ones included."""
    query = select(KeyRow).order_by(KeyRow.id)
    return list(s.scalars(query if tenant is None else query.where(KeyRow.tenant == tenant)))


def _values(
    tenant: str, name: str, scopes: Collection[str], secret: str, expires_at: float | None
) -> dict[str, object]:
    assert set(scopes) <= SCOPES, f"scopes must be of {sorted(SCOPES)}, got {sorted(scopes)}"
    now = time.time()
    return {
        "id": new_id(PREFIX, now),
        "tenant": tenant,
        "name": name,
        "prefix": secret[:SHOWN],
        "hash": sha256(secret),
        "scopes": sorted(scopes),
        "created_at": now,
        "expires_at": expires_at,
    }
