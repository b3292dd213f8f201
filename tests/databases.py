"""Databases with all tables: a file, and a database of one real PostgreSQL server, both made once and then copied."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_server import PostgresServer, running

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server for the session. Skips where there is none."""
    with running() as server:
        yield server


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with all tables, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    _migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres: PostgresServer) -> str:
    """A database with all tables, to be copied."""
    postgres.execute("CREATE DATABASE migrated")
    _migrate(postgres.url("migrated"))
    return "migrated"


def _migrate(url: str) -> None:
    from sapo_ray.control.store import Store

    store = Store(url)
    store.migrate()
    store.close()


@pytest.fixture
def empty_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables (SQLite: not even a file)."""
    if backend == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    name = f"empty_{next(_numbers)}"
    server.execute(f"CREATE DATABASE {name}")
    return server.url(name)


@pytest.fixture
def store_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with all tables and nothing in them (SQLite: tmp_path / "control.db"). `backend` says which kind."""
    if backend == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_sqlite"), tmp_path / "control.db")
        return f"sqlite:///{tmp_path / 'control.db'}"
    template = request.getfixturevalue("migrated_postgres")
    server: PostgresServer = request.getfixturevalue("postgres")
    name = f"jobs_{next(_numbers)}"
    server.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    return server.url(name)
