"""The database behind the store: how it is reached, how long it may take, and what it means when it does not answer.

SQLite (a file, write-ahead log) or PostgreSQL, by URL. Every wait is bounded:

| | SQLite | PostgreSQL |
|---|---|---|
| connect | - | 5 s |
| a lock | 5 s for the other writers of this process, 5 s for those of others (`BEGIN IMMEDIATE`) | 5 s |
| a statement | - | 10 s |
| a transaction in which nothing happens | - | 30 s |
| a free connection of the pool | 5 s | 5 s |
| a dead peer | - | 15 s (TCP keepalives and user timeout) |

Whatever says that the database cannot answer now becomes `StoreUnavailable`. Nothing need be restarted afterwards: dead
connections are noticed when they are next wanted, and replaced.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, make_url, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from sapo_ray.control.store.connections import BUSY_S, STATEMENT_S, connect_sqlite, postgres_arguments, sqlite_path
from sapo_ray.control.store.errors import StoreUnavailable
from sapo_ray.control.store.migrate import migrate
from sapo_ray.errors import ConfigError

POOL_S = 5

WRITE = "sapo_write"
"""Execution option of connections that are about to write."""
READ_ONLY = "sapo_read_only"
"""In the `info` of sessions for reading."""
UNDEFINED_TABLE_STATE = "42P01"
READ_ONLY_STATES = ("25006", "0A000")
"""A write where only reading is possible (a standby); a standby also refuses to begin a transaction for writing."""


class Store:
    """Sessions on one database. Safe to share between threads; a session is not.

    `begin()` and `read()` raise StoreUnavailable, from whatever inside them needed the database.
    """

    def __init__(self, url: str, *, pool_size: int = 20) -> None:
        self._url = _checked(url)
        self._pool_size = pool_size
        self._engine = self._make_engine()
        self._writes = self._engine.execution_options(**{WRITE: True})
        self._reads = self._engine.execution_options(postgresql_readonly=True)
        self._turn = threading.Lock() if self.dialect == "sqlite" else None

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._url.get_backend_name()

    def migrate(self) -> None:
        """Bring the tables to this version's. Replicas may do so at once; raises SchemaTooNew, StoreUnavailable."""
        with _translated(writes=True):
            migrate(self._url)

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """A session in one write transaction: committed at the end, rolled back on any exception."""
        with (
            self._my_turn(),
            _translated(writes=True),
            Session(self._writes, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading, in which nothing can be written. Rows stay usable after it."""
        session = Session(self._reads, expire_on_commit=False, autoflush=False, info={READ_ONLY: True})
        with _translated(writes=False), session:
            yield session
            changed = [*session.new, *session.deleted, *(row for row in session.dirty if session.is_modified(row))]
            assert not changed, f"changed in a session for reading: {changed}"

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        """SQLite has one writer; others ask again after longer and longer pauses, and some for seconds come too late.

        Those of this process stand in line instead; between processes it stays as it is.
        """
        if self._turn is None:
            yield
            return
        if not self._turn.acquire(timeout=BUSY_S):
            raise StoreUnavailable(f"the database cannot answer: others were writing for {BUSY_S} s")
        try:
            yield
        finally:
            self._turn.release()

    def ping(self) -> None:
        """Raises StoreUnavailable unless the database answers and its tables are there."""
        with self.read() as session:
            session.execute(text("SELECT 1 FROM jobs LIMIT 1"))

    def close(self) -> None:
        """Close all connections that are not in use."""
        self._engine.dispose()

    def _make_engine(self) -> Engine:
        if self.dialect == "postgresql":
            return create_engine(
                self._url,
                connect_args=postgres_arguments(self._url, STATEMENT_S),
                pool_pre_ping=True,
                pool_size=self._pool_size,
                max_overflow=0,
                pool_timeout=POOL_S,
                pool_recycle=1800,
            )
        path = sqlite_path(self._url)
        engine = create_engine(
            self._url,
            creator=lambda: connect_sqlite(path, BUSY_S),
            pool_size=self._pool_size,
            max_overflow=0,
            pool_timeout=POOL_S,
        )
        event.listen(engine, "begin", _begin_sqlite)
        event.listen(engine, "checkout", _still_the_same_file(path))
        return engine


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later could not wait for the lock: it would fail at once.
    writes = bool(connection.get_execution_options().get(WRITE))
    connection.exec_driver_sql(f"PRAGMA query_only = {'OFF' if writes else 'ON'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _still_the_same_file(path: Path) -> Callable[[Any, ConnectionPoolEntry, PoolProxiedConnection], None]:
    """A pooled connection holds the file it opened; one deleted or restored meanwhile is another file."""

    def check(connection: Any, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        try:
            status = os.stat(path)
        except OSError as error:
            raise exc.DisconnectionError(f"{path}: {error.strerror}") from error
        identity = (status.st_dev, status.st_ino)
        if entry.info.setdefault("file", identity) != identity:
            raise exc.DisconnectionError(f"{path} was replaced")

    return check


def _checked(url: str) -> URL:
    """The URL with its driver; refuses what the store was not made for."""
    try:
        parsed = make_url(url)
    except exc.ArgumentError as error:
        raise ConfigError("database_url is not a database URL; e.g. sqlite:////var/lib/sapo-ray/jobs.db") from error
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        if not parsed.database or parsed.database == ":memory:" or parsed.query:
            raise ConfigError(
                "database_url must name a plain file for SQLite, e.g. sqlite:////var/lib/sapo-ray/jobs.db"
            )
        return parsed
    raise ConfigError(f"database_url must be sqlite:///FILE or postgresql://..., got {parsed.drivername}://")


def reads_only(session: Session) -> bool:
    """Whether it is a session of `Store.read()`: those take no locks."""
    return bool(session.info.get(READ_ONLY))


@contextmanager
def _translated(*, writes: bool) -> Iterator[None]:
    try:
        yield
    except exc.SQLAlchemyError as error:
        reason = why_unavailable(error, writes=writes)
        if reason is None:
            raise
        raise StoreUnavailable(reason) from error


def why_unavailable(error: exc.SQLAlchemyError, *, writes: bool) -> str | None:
    """What keeps the database from answering, or None if the error is about something else (our own mistake).

    `writes`: whether it came up in a transaction for writing; to write in one for reading is a mistake.
    """
    if isinstance(error, exc.TimeoutError):
        return f"no database connection was free within {POOL_S} s"
    if isinstance(error, exc.DisconnectionError):
        return str(error)
    if not isinstance(error, exc.DBAPIError) or error.orig is None:
        return None
    first_line = (str(error.orig).splitlines() or [type(error.orig).__name__])[0]
    if _is_unavailable(error, error.orig, writes):
        return f"the database cannot answer: {first_line}"
    return None


def _is_unavailable(error: exc.DBAPIError, cause: BaseException, writes: bool) -> bool:
    if error.connection_invalidated:
        return True
    if isinstance(cause, sqlite3.Error):
        # SQLITE_ERROR is bad SQL, except where the tables are not there (yet).
        code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if code == sqlite3.SQLITE_READONLY and not writes:
            return False
        damaged = code & 0xFF in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
        operational = isinstance(cause, sqlite3.OperationalError) and code != sqlite3.SQLITE_ERROR
        return damaged or operational or "no such table" in str(cause)
    state = getattr(cause, "sqlstate", None)
    if state in READ_ONLY_STATES:
        return writes
    return isinstance(error, exc.OperationalError | exc.InterfaceError) or state == UNDEFINED_TABLE_STATE
