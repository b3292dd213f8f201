"""How either database is connected to, for requests and for migrations."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL

BUSY_S = 5
"""Longest wait for a lock."""
CONNECT_S = 5
STATEMENT_S = 10
IDLE_S = 30
"""A transaction in which nothing happens for so long is ended by PostgreSQL."""


def postgres_arguments(url: URL, statement_s: int) -> dict[str, Any]:
    """What bounds each wait on PostgreSQL. `options` in the URL come first, so these win."""
    bounds = {
        "statement_timeout": statement_s,
        "lock_timeout": BUSY_S,
        "idle_in_transaction_session_timeout": IDLE_S,
    }
    options = [str(url.query.get("options", "")), *(f"-c {name}={value * 1000}" for name, value in bounds.items())]
    return {
        "connect_timeout": CONNECT_S,
        "options": " ".join(options).strip(),
        "keepalives_idle": 5,
        "keepalives_interval": 3,
        "keepalives_count": 3,
        "tcp_user_timeout": 15_000,
    }


def sqlite_path(url: URL) -> Path:
    """The database's file."""
    assert url.database is not None
    return Path(url.database).absolute()


def connect_sqlite(path: Path, busy_s: float, *, create: bool = False) -> sqlite3.Connection:
    """A connection on which transactions begin only where we say so.

    Only migrating creates the file: one that was there and is gone must not come back empty.
    """
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode={'rwc' if create else 'rw'}",
        uri=True,
        timeout=busy_s,
        check_same_thread=False,
        isolation_level=None,
    )
    connection.execute("PRAGMA foreign_keys = ON")
    # With NORMAL a power cut may take back what was answered with 201; writes are few, so each is made durable.
    connection.execute("PRAGMA synchronous = FULL")
    return connection
