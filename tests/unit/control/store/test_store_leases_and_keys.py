"""Leases, API keys, idempotency keys and data sets."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from store_builders import new_job, started_job, together

from sapo_ray.control.store import (
    KeyInFlight,
    KeyReused,
    LeaseLost,
    Replay,
    Store,
    datasets,
    idempotency,
    jobs,
    keys,
    leases,
)


def test_a_lease_is_one_holders_until_it_runs_out(store: Store) -> None:
    job_id = started_job(store)
    with store.begin() as s:
        mine = leases.acquire(s, job_id, "a", 15, now=100)
        assert mine is not None
        assert (mine.generation, mine.until) == (1, 115)
        assert leases.acquire(s, job_id, "b", 15, now=114) is None
        prolonged = leases.acquire(s, job_id, "a", 15, now=114)
        assert prolonged is not None
        assert (prolonged.generation, prolonged.until) == (1, 129)
        theirs = leases.acquire(s, job_id, "b", 15, now=129)
        assert theirs is not None
        assert theirs.generation == 2
    with store.begin() as s:
        leases.check(s, theirs)
        with pytest.raises(LeaseLost, match="from a to b"):
            leases.check(s, mine)
    with store.begin() as s:
        leases.release(s, mine)
        assert leases.acquire(s, job_id, "a", 15, now=130) is None
        leases.release(s, theirs)
        assert leases.acquire(s, job_id, "a", 15, now=130) is not None


def test_a_holder_that_let_its_lease_run_out_has_a_new_generation(store: Store) -> None:
    job_id = started_job(store)
    with store.begin() as s:
        old = leases.acquire(s, job_id, "a", 15, now=100)
        new = leases.acquire(s, job_id, "a", 15, now=116)
        assert old is not None
        assert new is not None
        assert new.generation == 2
        with pytest.raises(LeaseLost):
            leases.check(s, old)


def test_a_lease_can_be_looked_at_in_a_session_for_reading(store: Store) -> None:
    job_id = started_job(store)
    with store.begin() as s:
        lease = leases.acquire(s, job_id, "a", 15, now=100)
    assert lease is not None
    with store.read() as s:
        leases.check(s, lease)


def test_of_eight_reconcilers_one_gets_the_lease(open_store: Callable[[], Store]) -> None:
    stores = [open_store() for _ in range(2)]
    job_id = started_job(stores[0])

    def take(index: int) -> bool:
        with stores[index % 2].begin() as s:
            return leases.acquire(s, job_id, f"holder {index}", 15, now=100) is not None

    assert sorted(together(8, take)) == [False] * 7 + [True]
    with stores[0].begin() as s:
        taken = [leases.acquire(s, job_id, f"holder {index}", 15, now=200) for index in range(2)]
    assert [lease.generation if lease else None for lease in taken] == [2, None]


def test_nobody_takes_a_job_over_between_a_check_and_the_commit(open_store: Callable[[], Store]) -> None:
    one, two = open_store(), open_store()
    job_id = started_job(one)
    with one.begin() as s:
        lease = leases.acquire(s, job_id, "a", 15, now=100)
    assert lease is not None

    def work(index: int) -> float:
        if index == 0:
            with one.begin() as s:
                leases.check(s, lease)
                time.sleep(0.6)
                committed = time.monotonic()
            return committed
        time.sleep(0.2)
        with two.begin() as s:
            assert leases.acquire(s, job_id, "b", 15, now=200) is not None
            return time.monotonic()

    committed, taken = together(2, work)
    assert committed < taken
    with pytest.raises(LeaseLost), one.begin() as s:
        leases.check(s, lease)


def test_a_key_is_found_by_its_secret_until_it_expires_or_is_revoked(store: Store) -> None:
    with store.begin() as s:
        row, secret = keys.create_key(s, "acme", "laptop", ["submit", "read"], expires_at=2e9)
        assert secret.startswith("sapo_")
        assert len(secret) == 48
        assert (row.prefix, row.scopes) == (secret[:12], ["read", "submit"])
        found = keys.find_key(s, secret, now=1e9)
        assert found is not None
        assert found.tenant == "acme"
        assert keys.find_key(s, secret, now=2e9) is None
        assert keys.find_key(s, secret + "x") is None
        assert keys.find_key(s, "\ud800\0") is None
        keys.revoke(s, row)
        assert keys.find_key(s, secret, now=1e9) is None
        assert [key.id for key in keys.list_keys(s, "acme")] == [row.id]
        assert keys.list_keys(s, "other") == []
        assert keys.get_key(s, "other", row.id) is None
        assert keys.get_key(s, "acme", row.id) is row


def test_the_operators_key_is_made_once_by_replicas_that_start_together(open_store: Callable[[], Store]) -> None:
    stores = [open_store() for _ in range(2)]

    def ensure(index: int) -> str:
        with stores[index % 2].begin() as s:
            return keys.ensure_key(s, "operator", "admin", ["admin"], "sapo_the-operators-own").id

    assert len(set(together(6, ensure))) == 1


def test_the_use_of_a_key_is_noted_at_most_once_a_minute(store: Store) -> None:
    with store.begin() as s:
        row, _ = keys.create_key(s, "acme", "laptop", ["read"])
        assert keys.stale_use(row, 1000.0)
        for now in (1000.0, 1059.0):
            keys.touch(s, row.id, now)
        s.refresh(row)
        assert row.last_used_at == 1000.0
        keys.touch(s, row.id, 1061.0)
        s.refresh(row)
        assert row.last_used_at == 1061.0


def test_a_request_sent_twice_is_answered_alike(store: Store) -> None:
    request = ("acme", "key-1", "POST", "/v1/jobs", "hash")
    with store.begin() as s:
        assert idempotency.claim(s, *request) is None
        idempotency.finish(s, "acme", "key-1", 201, {"id": "job-x"})
    with store.begin() as s:
        assert idempotency.claim(s, *request) == Replay(status=201, response={"id": "job-x"})
        with pytest.raises(KeyReused):
            idempotency.claim(s, "acme", "key-1", "POST", "/v1/jobs", "other body")
        assert idempotency.claim(s, "other", "key-1", "POST", "/v1/jobs", "hash") is None


def test_a_request_under_way_is_not_done_again_unless_it_has_died(store: Store) -> None:
    request = ("acme", "key-1", "POST", "/v1/jobs", "hash")
    with store.begin() as s:
        assert idempotency.claim(s, *request, now=1000) is None
    with store.begin() as s:
        with pytest.raises(KeyInFlight):
            idempotency.claim(s, *request, now=1599)
        assert idempotency.claim(s, *request, now=1600) is None
        idempotency.abandon(s, "acme", "key-1")
        assert idempotency.claim(s, *request, now=1601) is None


def test_answers_are_forgotten_after_a_day(store: Store) -> None:
    request = ("acme", "key-1", "POST", "/v1/jobs", "hash")
    with store.begin() as s:
        assert idempotency.claim(s, *request, now=0) is None
        idempotency.finish(s, "acme", "key-1", 201, {})
    with store.begin() as s:
        assert idempotency.sweep(s, now=86_400) == 0
        assert idempotency.claim(s, *request, now=86_399) is not None
        assert idempotency.claim(s, *request, now=86_400) is None
        idempotency.finish(s, "acme", "key-1", 201, {})
        assert idempotency.sweep(s, now=2 * 86_400 + 1, most=0) == 0
        assert idempotency.sweep(s, now=2 * 86_400 + 1) == 1


def test_a_job_submitted_by_six_threads_with_one_key_is_made_once(open_store: Callable[[], Store]) -> None:
    stores = [open_store() for _ in range(2)]

    def submit(index: int) -> str:
        with stores[index % 2].begin() as s:
            replay = idempotency.claim(s, "acme", "key-1", "POST", "/v1/jobs", "hash")
            if replay is not None:
                return str(replay.response["id"])
            job_id = new_job(s).id
            idempotency.finish(s, "acme", "key-1", 201, {"id": job_id})
            return job_id

    ids = set(together(6, submit))
    with stores[0].read() as s:
        assert {row.id for row in jobs.list_jobs(s, "acme")} == ids
    assert len(ids) == 1


def test_a_data_set_is_its_tenants_until_it_is_deleted(store: Store) -> None:
    with store.begin() as s:
        rows = [
            datasets.add(
                s,
                tenant="acme",
                name=f"sums {number}",
                format="jsonl",
                rows=3,
                bytes=2**40,
                sha256="0" * 64,
                columns=["question", "answer"],
                path=f"/data/{number}.jsonl",
            )
            for number in range(3)
        ]
        assert datasets.get(s, "acme", rows[0].id) is rows[0]
        assert datasets.get(s, "other", rows[0].id) is None
        assert [row.id for row in datasets.list_datasets(s, "acme", limit=2)] == [rows[2].id, rows[1].id]
        assert [row.id for row in datasets.list_datasets(s, "acme", after=rows[1].id)] == [rows[0].id]
        datasets.delete(s, rows[0])
        assert datasets.get(s, "acme", rows[0].id) is None
        assert datasets.get(s, "acme", rows[0].id, deleted=True) is rows[0]
        assert len(datasets.list_datasets(s, "acme")) == 2
        assert rows[1].bytes == 2**40
