"""`INSERT ... ON CONFLICT DO NOTHING`, which both databases know but SQLAlchemy spells once for each."""

from __future__ import annotations

from typing import Any

from sqlalchemy import CursorResult
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from sapo_ray.control.store.tables import Base


def insert_if_absent(s: Session, table: type[Base], values: dict[str, Any]) -> bool:
    """Whether the row was inserted; False: one with the same key is there already.

    On PostgreSQL this waits for another transaction that is inserting the same key.
    """
    insert = postgresql.insert if s.get_bind().dialect.name == "postgresql" else sqlite.insert
    result = s.execute(insert(table).values(values).on_conflict_do_nothing())
    assert isinstance(result, CursorResult)
    return result.rowcount == 1
