"""A SQLite file that is full, read-only, gone, replaced or damaged: StoreUnavailable, and well again by itself."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from small_disk import small_disk
from sqlalchemy import text
from store_builders import count, submit, submit_without_end

from sapo_ray.control.store import Store, StoreUnavailable, jobs


@pytest.fixture
def sqlite_file(tmp_path: Path, migrated_sqlite: Path) -> Path:
    """A migrated SQLite database."""
    shutil.copy(migrated_sqlite, tmp_path / "jobs.db")
    return tmp_path / "jobs.db"


def test_sqlite_whose_disk_is_full_is_unavailable_until_there_is_room(sqlite_file: Path) -> None:
    store = Store(f"sqlite:///{sqlite_file}")
    submit(store)
    with store.begin() as s:
        s.execute(text("PRAGMA max_page_count = 1"))  # no less than there are: not one more page
    with pytest.raises(StoreUnavailable, match="full"):
        submit_without_end(store, [])
    before = count(store)
    with pytest.raises(StoreUnavailable, match="full"):
        submit_without_end(store, [])
    assert count(store) == before
    with store.begin() as s:
        s.execute(text("PRAGMA max_page_count = 1000000"))
    submit(store)
    store.close()


def test_sqlite_on_a_full_file_system_is_unavailable_and_keeps_what_was_accepted(
    tmp_path: Path, migrated_sqlite: Path
) -> None:
    with small_disk(tmp_path / "small", 1) as folder:
        shutil.copy(migrated_sqlite, folder / "jobs.db")
        store = Store(f"sqlite:///{folder / 'jobs.db'}")
        accepted: list[str] = []
        with pytest.raises(StoreUnavailable):
            submit_without_end(store, accepted)
        with store.read() as s:
            assert all(jobs.get_job(s, "acme", job_id) is not None for job_id in accepted)
        store.close()


def test_a_read_only_sqlite_file_is_unavailable_for_writes(sqlite_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write where the file's mode forbids it, so the connection itself is made read-only.
    plain = sqlite3.connect

    def read_only(name: str, **arguments: object) -> sqlite3.Connection:
        return plain(name.replace("mode=rw", "mode=ro"), **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("sapo_ray.control.store.connections.sqlite3.connect", read_only)
    store = Store(f"sqlite:///{sqlite_file}")
    with pytest.raises(StoreUnavailable, match="readonly"):
        submit(store)
    store.close()


def test_a_sqlite_file_that_vanishes_does_not_come_back_empty(sqlite_file: Path) -> None:
    store = Store(f"sqlite:///{sqlite_file}")
    job_id = submit(store)
    store.close()
    aside = sqlite_file.with_suffix(".aside")
    sqlite_file.rename(aside)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            store.ping()
    assert not sqlite_file.exists()
    aside.rename(sqlite_file)
    with store.read() as s:
        assert jobs.get_job(s, "acme", job_id) is not None


def test_a_sqlite_file_that_is_replaced_is_the_one_that_is_read(sqlite_file: Path, migrated_sqlite: Path) -> None:
    store = Store(f"sqlite:///{sqlite_file}")
    submit(store)
    assert count(store) == 1
    for leftover in sqlite_file.parent.glob("jobs.db*"):
        leftover.unlink()
    with pytest.raises(StoreUnavailable):
        store.ping()
    shutil.copy(migrated_sqlite, sqlite_file)
    assert count(store) == 0
    store.close()


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "jobs.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        Store(f"sqlite:///{tmp_path / 'jobs.db'}").ping()


def test_what_was_committed_survives_a_killed_process(sqlite_file: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from sapo_ray.control.store import Store, jobs\n"
        "store = Store(sys.argv[1])\n"
        "def make(s): return jobs.create_job(s, tenant='acme', name='n', spec={}, steps=1, priority=1, labels={},"
        " scale=(1, 1, 1), runs_root=Path('/r'))\n"
        "with store.begin() as s: make(s)\n"
        "with store.begin() as s: make(s); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, f"sqlite:///{sqlite_file}"], timeout=120, check=False)
    assert done.returncode == -9
    store = Store(f"sqlite:///{sqlite_file}")
    assert count(store) == 1
    store.close()
    with closing(sqlite3.connect(sqlite_file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
