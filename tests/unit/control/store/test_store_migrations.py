"""Migrations: the same tables as the models', made once, refused where they are newer than the code."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from store_builders import new_job, together

from sapo_ray.control.store import SchemaTooNew, Store, StoreUnavailable, jobs
from sapo_ray.control.store.migrate import config
from sapo_ray.control.store.tables import Base
from sapo_ray.errors import ConfigError


def test_models_and_migrations_make_the_same_tables(store: Store) -> None:
    with store.begin() as s:
        context = MigrationContext.configure(s.connection(), opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_there_is_one_newest_version() -> None:
    assert len(ScriptDirectory.from_config(config()).get_heads()) == 1


def test_migrating_again_changes_nothing(empty_url: str) -> None:
    store = Store(empty_url)
    store.migrate()
    with store.begin() as s:
        job_id = new_job(s).id
    store.migrate()
    with store.read() as s:
        assert jobs.get_job(s, "acme", job_id) is not None
    store.close()


def test_six_replicas_that_start_at_once_migrate_once(empty_url: str) -> None:
    def migrate(index: int) -> None:
        store = Store(empty_url)
        store.migrate()
        store.ping()
        store.close()

    assert together(6, migrate) == [None] * 6


def _migrate_in_a_process(url: str) -> None:
    Store(url).migrate()


def test_processes_that_start_at_once_migrate_once(empty_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_migrate_in_a_process, args=(empty_url,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    store = Store(empty_url)
    store.ping()
    store.close()


def test_a_database_of_a_newer_version_is_refused(store: Store) -> None:
    with store.begin() as s:
        s.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaTooNew, match="version 9999"):
        store.migrate()


def test_a_migration_that_fails_leaves_nothing_behind(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("killed in the middle")

    store = Store(empty_url)
    with monkeypatch.context() as patched:
        patched.setattr("alembic.runtime.migration.HeadMaintainer.update_to_step", fail)
        with pytest.raises(RuntimeError):
            store.migrate()
    with pytest.raises(StoreUnavailable, match=r"no such table|does not exist"):
        store.ping()
    store.migrate()
    store.ping()
    store.close()


def test_a_store_that_was_never_migrated_is_unavailable(empty_url: str) -> None:
    with pytest.raises(StoreUnavailable):
        Store(empty_url).ping()


def test_sqlite_is_migrated_to_a_write_ahead_log(tmp_path: Path) -> None:
    Store(f"sqlite:///{tmp_path / 'jobs.db'}").migrate()
    with create_engine(f"sqlite:///{tmp_path / 'jobs.db'}").connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"


@pytest.mark.parametrize(
    "url", ["mysql://h/db", "sqlite://", "sqlite:///:memory:", "sqlite:///a.db?mode=ro", "jobs.db"]
)
def test_a_database_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="database_url"):
        Store(url)
