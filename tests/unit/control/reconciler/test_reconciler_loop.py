"""The loop outlives errors, and one job's trouble is its own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from reconciler_world import LIMITS, World

from sapo_ray.control.launcher import LaunchStatus
from sapo_ray.control.store import IdempotencyRow, StoreUnavailable, idempotency, leases


def test_one_jobs_error_does_not_keep_the_others_waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = world.submit(), world.submit()
    healthy = world.cluster.status

    def status(submission_id: str) -> LaunchStatus:
        if bad in submission_id:
            raise ZeroDivisionError("a bug")
        return healthy(submission_id)

    monkeypatch.setattr(world.cluster, "status", status)
    world.tick()
    assert world.failures == ["bug"]
    assert len(world.cluster.of_job(good)) == 1
    assert not world.cluster.of_job(bad)
    monkeypatch.undo()
    world.tick()
    assert len(world.cluster.of_job(bad)) == 1


def test_the_loop_goes_on_after_the_store_was_gone(world: World) -> None:
    """The thread itself, with a store that fails at first."""
    id = world.submit()
    left = [3]

    class Flaky:
        def read(self) -> Any:
            if left[0] > 0:
                left[0] -= 1
                raise StoreUnavailable("gone")
            return world.store.read()

        def __getattr__(self, name: str) -> Any:
            return getattr(world.store, name)

    stop = threading.Event()
    thread = threading.Thread(target=world.new_reconciler(Flaky()).run, args=(stop,))
    thread.start()
    try:
        for _ in range(1000):
            if world.cluster.of_job(id):
                break
            stop.wait(0.01)
        assert world.cluster.of_job(id)
    finally:
        stop.set()
        thread.join(30.0)
    assert not thread.is_alive()
    assert world.failures.count("store") == 3


def test_a_reconciler_that_stops_lets_the_next_have_its_jobs_at_once(world: World) -> None:
    id = world.running()
    world.reconciler.release()
    with world.store.begin() as s:
        assert leases.acquire(s, id, "another", 15.0, world.clock()) is not None


def test_a_replica_leaves_alone_what_another_holds(world: World) -> None:
    id = world.running()
    world.driver(id).become("FAILED")
    other = world.new_reconciler()
    other.tick()
    assert world.job(id).state == "running"
    world.clock.ahead += LIMITS.lease_s + 1.0
    other.tick()
    assert world.job(id).state == "recovering"


def test_a_replica_that_lost_its_lease_writes_nothing(world: World) -> None:
    id = world.running()
    with world.store.begin() as s:
        taken = leases.acquire(s, id, "another", 15.0, world.clock() + 16.0)
    assert taken is not None
    world.driver(id).become("FAILED")
    world.tick()
    assert world.job(id).state == "running"
    assert world.attempt(id).state == "launched"


def test_idempotency_keys_older_than_a_day_are_swept(world: World) -> None:
    with world.store.begin() as s:
        idempotency.claim(s, "t", "old", "POST", "/v1/jobs", "h", world.clock() - 2 * 86_400)
        idempotency.claim(s, "t", "new", "POST", "/v1/jobs", "h", world.clock())
    world.tick()
    with world.store.read() as s:
        assert [row.key for row in s.query(IdempotencyRow)] == ["new"]


def test_an_idle_round_writes_nothing(world: World) -> None:
    ids = [world.running(), world.running()]
    world.submit()
    world.tick()
    before = [world.job(id).updated_at for id in ids]
    writes = []

    class Counting:
        def begin(self) -> Any:
            writes.append(1)
            return world.store.begin()

        def __getattr__(self, name: str) -> Any:
            return getattr(world.store, name)

    world.reconciler.release()
    replica = world.new_reconciler(Counting())
    replica.tick()
    writes.clear()
    for _ in range(5):
        replica.tick()
    assert not writes
    assert [world.job(id).updated_at for id in ids] == before
