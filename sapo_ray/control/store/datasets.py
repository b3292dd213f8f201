"""Uploaded data sets: what is known of them. The files are another's business."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from sapo_ray.control.store.errors import BadCursor
from sapo_ray.control.store.tables import DatasetRow, is_id, new_id

PREFIX = "ds-"
MAX_PAGE = 1000


def new_dataset_id() -> str:
    """For a file that must have its place before it is known here."""
    return new_id(PREFIX)


def add(
    s: Session,
    *,
    tenant: str,
    name: str,
    format: str,
    rows: int,
    bytes: int,
    sha256: str,
    columns: Sequence[str],
    path: str | Path,
    id: str | None = None,
) -> DatasetRow:
    """A data set whose file lies complete at `path`."""
    row = DatasetRow(
        id=new_dataset_id() if id is None else id,
        tenant=tenant,
        name=name,
        format=format,
        rows=rows,
        bytes=bytes,
        sha256=sha256,
        columns=list(columns),
        path=str(path),
        created_at=time.time(),
    )
    s.add(row)
    s.flush()
    return row


def get(s: Session, tenant: str | None, id: str, *, deleted: bool = False, lock: bool = False) -> DatasetRow | None:
    """The data set, if it is the tenant's (None: anybody's) and, unless asked for, not deleted.

    `lock` waits for those who `hold` it.
    """
    known = is_id(PREFIX, id)
    row = s.get(DatasetRow, id, populate_existing=True, with_for_update=lock or None) if known else None
    if row is None or (row.deleted_at is not None and not deleted):
        return None
    return row if tenant in (None, row.tenant) else None


def hold(s: Session, tenant: str, ids: Collection[str]) -> set[str]:
    """Which of these the tenant has; none of those can be deleted before this transaction ends."""
    if not ids:
        return set()
    mine = DatasetRow.tenant == tenant, DatasetRow.deleted_at.is_(None), DatasetRow.id.in_(sorted(ids))
    return set(s.scalars(select(DatasetRow.id).where(*mine).order_by(DatasetRow.id).with_for_update(read=True)))


def list_datasets(s: Session, tenant: str | None, *, after: str | None = None, limit: int = 100) -> list[DatasetRow]:
    """Newest first, those that follow `after`, the id of a page's last one. Raises BadCursor."""
    query = select(DatasetRow).where(DatasetRow.deleted_at.is_(None)).order_by(DatasetRow.id.desc())
    if tenant is not None:
        query = query.where(DatasetRow.tenant == tenant)
    if after is not None:
        if not is_id(PREFIX, after):
            raise BadCursor("after must be the `next` of a page of data sets")
        query = query.where(DatasetRow.id < after)
    return list(s.scalars(query.limit(min(limit, MAX_PAGE))))


def delete(s: Session, row: DatasetRow) -> None:
    """Mark as deleted: jobs that used it still say what they used."""
    if row.deleted_at is None:
        row.deleted_at = time.time()
        s.flush()
