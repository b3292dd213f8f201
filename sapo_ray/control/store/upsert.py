"""`INSERT ... ON CONFLICT DO NOTHING`, which both databases know but SQLAlchemy spells once for each."""

from __future__ import annotations

from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from sapo_ray.control.store.tables import Base


def insert_if_absent(s: Session, table: type[Base], values: dict[str, Any]) -> bool:
    """Whether the row was inserted; False: one with the same key is there already.

    On PostgreSQL this waits for another transaction that is inserting the same key.
    """
    insert = postgresql.insert if s.get_bind().dialect.name == "postgresql" else sqlite.insert
    absent = insert(table).values(values).on_conflict_do_nothing()
    return s.execute(absent.returning(*table.__table__.primary_key)).first() is not None
