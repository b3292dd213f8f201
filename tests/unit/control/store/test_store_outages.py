"""A database that is gone, busy, full or read-only: StoreUnavailable within bounds, and well again by itself."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from postgres_server import NoServer, PostgresServer
from sqlalchemy import exc, text
from store_builders import new_job, started_job, step, together

from sapo_ray.control.store import Store, StoreUnavailable, events, jobs


def submit(store: Store) -> str:
    with store.begin() as s:
        return new_job(s).id


def submit_without_end(store: Store, accepted: list[str]) -> None:
    """Ends with an error, or the test has shown nothing."""
    for _ in range(10_000):
        accepted.append(submit(store))  # noqa: PERF401 - what was accepted before the error counts


def count(store: Store) -> int:
    with store.read() as s:
        return len(jobs.list_jobs(s, "acme"))


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server that a test may stop."""
    try:
        server = PostgresServer()
    except NoServer as error:
        pytest.skip(f"no PostgreSQL: {error}")
    try:
        server.start()
        yield server
    finally:
        server.remove()


def test_postgres_that_goes_and_comes_back_loses_nothing_that_was_accepted(own_postgres: PostgresServer) -> None:
    store = Store(own_postgres.url("postgres"))
    store.migrate()
    job_id = started_job(store)
    with store.begin() as s:
        events.ingest(s, job_id, 1, 1, [step(1)])
    own_postgres.stop()
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            submit(store)
        with pytest.raises(StoreUnavailable):
            store.ping()
    own_postgres.start()
    store.ping()
    with store.begin() as s:
        assert events.ingest(s, job_id, 1, 1, [step(1), step(2)]).next_seq == 3
    assert count(store) == 1
    store.close()


def test_connections_that_are_all_cut_in_the_middle_of_transactions_are_replaced(own_postgres: PostgresServer) -> None:
    store = Store(own_postgres.url("postgres"))
    store.migrate()
    inside, cut = threading.Barrier(5, timeout=60), threading.Event()

    def work(index: int) -> object:
        with store.begin() as s:
            new_job(s)
            inside.wait()
            cut.wait(timeout=60)
            new_job(s)
        return None

    def cut_all() -> None:
        inside.wait()
        own_postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        cut.set()

    cutter = threading.Thread(target=cut_all)
    cutter.start()
    outcomes = together(4, work)
    cutter.join()
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 4
    assert count(store) == 0
    submit(store)
    assert count(store) == 1
    store.close()


def test_a_lock_that_another_holds_is_waited_for_five_seconds(open_store: Callable[[], Store]) -> None:
    one, two = open_store(), open_store()
    job_id = started_job(one)
    with one.begin() as s:
        jobs.get_job(s, None, job_id, lock=True)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable), two.begin() as other:
            jobs.get_job(other, None, job_id, lock=True)
        assert 4 < time.monotonic() - began < 15
    with two.begin() as other:
        assert jobs.get_job(other, None, job_id, lock=True) is not None


def test_readers_do_not_wait_for_a_writer(open_store: Callable[[], Store]) -> None:
    one, two = open_store(), open_store()
    job_id = started_job(one)
    with one.begin() as s:
        row = jobs.get_job(s, None, job_id, lock=True)
        assert row is not None
        row.name = "renamed"
        s.flush()
        with two.read() as other:
            before = jobs.get_job(other, None, job_id)
    assert before is not None
    assert before.name == "sums"


def test_a_request_that_finds_no_free_connection_is_answered_in_bounded_time(store_url: str) -> None:
    store = Store(store_url, pool_size=1)
    with store.read() as s:
        jobs.list_jobs(s, None)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="no database connection was free within 5 s"):
            store.ping()
        assert time.monotonic() - began < 15
    store.ping()
    store.close()


def test_our_own_mistakes_are_not_taken_for_an_outage(store: Store) -> None:
    with pytest.raises(exc.SQLAlchemyError), store.begin() as s:
        s.execute(text("SELEC 1"))
    with pytest.raises(exc.IntegrityError), store.begin() as s:
        s.execute(text("INSERT INTO leases VALUES ('job-of-nobody', 'a', 1, 1)"))
    store.ping()


def test_a_statement_that_takes_too_long_is_given_up(postgres: PostgresServer, migrated_postgres: str) -> None:
    store = Store(postgres.url(migrated_postgres))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="statement timeout"), store.begin() as s:
        s.execute(text("SELECT pg_sleep(60)"))
    assert time.monotonic() - began < 30
    store.ping()
    store.close()


def test_a_host_that_accepts_and_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = Store(f"postgresql://sapo@127.0.0.1:{silent.getsockname()[1]}/jobs")
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.ping()
        assert time.monotonic() - began < 15


def test_a_postgres_that_became_read_only_is_unavailable_for_writes(
    postgres: PostgresServer, migrated_postgres: str
) -> None:
    store = Store(postgres.url(migrated_postgres) + "&options=-c%20default_transaction_read_only%3Don")
    with pytest.raises(StoreUnavailable, match="read-only"):
        submit(store)
    assert count(store) == 0
    store.close()


@pytest.mark.parametrize(
    "state",
    ["53100", "53300", "57P01", "57P03", "58030", "40P01", "55P03", "08006"],
    ids=["disk full", "too many connections", "shutdown", "starting up", "I/O", "deadlock", "lock", "connection"],
)
def test_what_postgres_says_when_it_cannot_go_on_is_an_outage(
    postgres: PostgresServer, migrated_postgres: str, state: str
) -> None:
    store = Store(postgres.url(migrated_postgres))
    with pytest.raises(StoreUnavailable), store.begin() as s:
        s.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'as it would' USING ERRCODE = '{state}'; END $$"))
    store.ping()
    store.close()


def test_writing_in_a_session_for_reading_is_a_mistake_and_writes_nothing(store: Store) -> None:
    job_id = started_job(store)

    def write() -> None:
        with store.read() as s:
            row = jobs.get_job(s, None, job_id)
            assert row is not None
            events.append_control_event(s, row, "note")

    with pytest.raises(exc.SQLAlchemyError):
        write()
    with store.read() as s:
        assert events.newest_ids(s, [job_id]) == {job_id: 2}
    submit(store)


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
    folder = tmp_path / "small"
    folder.mkdir()
    if os.getuid() != 0:
        pytest.skip("only root can mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, timeout=30, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        shutil.copy(migrated_sqlite, folder / "jobs.db")
        store = Store(f"sqlite:///{folder / 'jobs.db'}")
        accepted: list[str] = []
        with pytest.raises(StoreUnavailable):
            submit_without_end(store, accepted)
        with store.read() as s:
            assert all(jobs.get_job(s, "acme", job_id) is not None for job_id in accepted)
        store.close()
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True, timeout=30, check=True)


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
    done = subprocess.run(["python", "-c", code, f"sqlite:///{sqlite_file}"], timeout=120, check=False)
    assert done.returncode == -9
    store = Store(f"sqlite:///{sqlite_file}")
    assert count(store) == 1
    store.close()
    with closing(sqlite3.connect(sqlite_file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
