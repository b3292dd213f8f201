"""A database that is gone, busy or read-only: StoreUnavailable within bounds, and well again by itself."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from postgres_server import PostgresServer, running
from sqlalchemy import exc, text
from store_builders import count, new_job, started_job, step, submit, together

from sapo_ray.control.store import Store, StoreUnavailable, connections, engine, events, jobs


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server that a test may stop."""
    with running() as server:
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait for the database is of one second."""
    for module, name in ((connections, "BUSY_S"), (engine, "BUSY_S"), (engine, "POOL_S"), (engine, "STATEMENT_S")):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(connections, "CONNECT_S", 2)  # libpq knows no shorter one


def test_the_waits_for_a_database_are_those_that_its_page_promises() -> None:
    assert (connections.BUSY_S, engine.BUSY_S, engine.POOL_S, connections.CONNECT_S) == (5, 5, 5, 5)
    assert (connections.STATEMENT_S, engine.STATEMENT_S) == (10, 10)


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


@pytest.mark.usefixtures("impatient")
def test_a_lock_that_another_holds_is_waited_for_as_long_as_is_promised(open_store: Callable[[], Store]) -> None:
    one, two = open_store(), open_store()
    job_id = started_job(one)
    with one.begin() as s:
        jobs.get_job(s, None, job_id, lock=True)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable), two.begin() as other:
            jobs.get_job(other, None, job_id, lock=True)
        assert 0.8 < time.monotonic() - began < 15
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


@pytest.mark.usefixtures("impatient")
def test_a_request_that_finds_no_free_connection_is_answered_in_bounded_time(store_url: str) -> None:
    store = Store(store_url, pool_size=1)
    with store.read() as s:
        jobs.list_jobs(s, None)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="no database connection was free within 1 s"):
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


@pytest.mark.usefixtures("impatient")
def test_a_statement_that_takes_too_long_is_given_up(postgres: PostgresServer, migrated_postgres: str) -> None:
    store = Store(postgres.url(migrated_postgres))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="statement timeout"), store.begin() as s:
        s.execute(text("SELECT pg_sleep(60)"))
    assert time.monotonic() - began < 30
    store.ping()
    store.close()


@pytest.mark.usefixtures("impatient")
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
