"""Brings a database's tables to this version's, once, although several replicas may try at the same time."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, create_engine, event, text
from sqlalchemy.pool import NullPool

from sapo_ray.control.store.connections import connect_sqlite, postgres_arguments, sqlite_path
from sapo_ray.control.store.errors import SchemaTooNew

WAIT_S = 60
"""How long a replica waits for another that is migrating."""
STATEMENT_S = 600
"""Longest single statement of a migration."""
LOCK = 0x5A90_7261
"""Of PostgreSQL's advisory locks, ours."""


def config() -> Config:
    """Alembic's, without a file: the scripts lie in this package."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    made.set_main_option("path_separator", "os")
    return made


def migrate(url: URL) -> None:
    """All in one transaction, under a lock: either the old tables or the new ones. Raises SchemaTooNew."""
    if url.get_backend_name() == "postgresql":
        _migrate_postgres(url)
    else:
        _migrate_sqlite(url)


def upgrade(connection: Connection) -> None:
    """To the newest version, in the connection's transaction."""
    made = config()
    known = {script.revision for script in ScriptDirectory.from_config(made).walk_revisions()}
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in known:
        raise SchemaTooNew(
            f"the database is at version {current}, which this sapo-ray does not know; run the newer one that made it"
        )
    made.attributes["connection"] = connection
    command.upgrade(made, "head")


def _migrate_postgres(url: URL) -> None:
    engine = create_engine(url, connect_args=postgres_arguments(url, STATEMENT_S), poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text(f"SET LOCAL lock_timeout = '{WAIT_S}s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        connection.execute(text("SET LOCAL lock_timeout = '5s'"))
        upgrade(connection)


def _migrate_sqlite(url: URL) -> None:
    path = sqlite_path(url)
    engine = create_engine(url, creator=lambda: connect_sqlite(path, WAIT_S, create=True), poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    with engine.begin() as connection:
        upgrade(connection)
    with engine.connect() as connection, closing(connection.connection.cursor()) as cursor:
        _write_ahead(cursor)


def _write_ahead(cursor: Any) -> None:
    """Outside of any transaction; it stays with the file. SQLite does not wait here for others: it fails at once."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.05)
