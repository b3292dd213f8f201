"""Who leaves the queue when, and what those who wait are told."""

from __future__ import annotations

from reconciler_world import World

from sapo_ray.control.reconciler.admission import why_waiting
from sapo_ray.control.store import jobs


def test_the_job_with_the_highest_priority_goes_first_then_the_oldest(world: World) -> None:
    low, old, young, urgent = (world.submit(priority=priority) for priority in (10, 50, 50, 90))
    world.tick()
    assert {id: world.job(id).state for id in (urgent, old, young, low)} == {
        urgent: "starting",
        old: "starting",
        young: "queued",
        low: "queued",
    }


def test_a_job_over_the_tenants_limit_waits_and_is_told_why_and_its_position(world: World) -> None:
    first, second, third = world.submit(), world.submit(), world.submit()
    world.tick()
    waiting = world.job(third)
    assert (waiting.state, waiting.reason) == ("queued", "2 of at most 2 jobs of this tenant are running")
    with world.store.read() as s:
        assert jobs.queue_position(s, waiting) == 1
    world.driver(first).become("RUNNING")
    world.says(first, "succeeded")
    world.driver(first).become("SUCCEEDED")
    world.tick()
    assert world.job(third).state == "starting"
    assert world.job(second).state == "starting"


def test_one_tenants_crowd_does_not_keep_another_waiting(world: World) -> None:
    crowd = [world.submit(tenant="many") for _ in range(5)]
    other = world.submit(tenant="one", priority=0)
    world.tick()
    assert world.job(other).state == "starting"
    assert [world.job(id).state for id in crowd].count("queued") == 3


def test_paused_jobs_hold_no_place(world: World) -> None:
    first, second = world.running(), world.running()
    third = world.submit()
    world.tick()
    assert world.job(third).state == "queued"
    world.ask(first, "pause")
    world.tick()
    assert world.job(third).state == "queued", "a driver that is pausing still runs"
    world.says(first, "paused")
    world.driver(first).become("SUCCEEDED")
    world.tick()
    assert [world.job(id).state for id in (first, second, third)] == ["paused", "running", "starting"]


def test_the_wait_in_the_queue_is_handed_to_metrics_once(world: World) -> None:
    world.submit(tenant="a")
    world.clock.ahead += 7.0
    world.tick(3)
    [(tenant, waited)] = world.waits
    assert tenant == "a"
    assert 7.0 <= waited < 10.0


def test_nobody_leaves_the_queue_while_the_cluster_is_away(world: World) -> None:
    id = world.submit()
    world.cluster.available = False
    world.tick()
    assert world.job(id).state == "queued"
    assert world.job(id).reason == "the cluster cannot be reached"
    world.cluster.available = True
    world.tick()
    assert world.job(id).state == "starting"


def test_jobs_that_wait_for_the_cluster_say_so_once_and_are_told_once_that_it_is_back(world: World) -> None:
    first, *_, waits = [world.submit() for _ in range(3)]
    world.cluster.available = False
    world.tick(3)
    for id in (first, waits):
        [condition] = world.job(id).conditions
        assert (condition["type"], condition["reason"]) == ("LauncherUnavailable", "the cluster cannot be reached")
    world.cluster.available = True
    world.tick(3)
    assert [world.job(id).state for id in (first, waits)] == ["starting", "queued"]
    for id in (first, waits):
        assert world.job(id).conditions == []
        assert [event.data for event in world.events(id) if event.kind == "condition"] == [
            {"condition": "LauncherUnavailable", "reason": "the cluster cannot be reached"},
            {"condition": "LauncherUnavailable", "cleared": True},
        ]
    assert world.job(waits).reason == "2 of at most 2 jobs of this tenant are running"


def test_a_job_that_was_paused_while_the_cluster_was_away_is_told_too(world: World) -> None:
    id = world.submit()
    world.cluster.available = False
    world.tick()
    world.ask(id, "pause")
    world.cluster.available = True
    world.tick()
    assert (world.job(id).state, world.job(id).conditions) == ("paused", [])


def test_reasons_of_waiting_jobs_are_written_only_when_they_change(world: World) -> None:
    for _ in range(3):
        id = world.submit()
    world.tick()
    before = world.job(id)
    world.tick(3)
    after = world.job(id)
    assert (before.updated_at, before.next_event) == (after.updated_at, after.next_event)


def test_a_limit_is_exact() -> None:
    assert why_waiting(1, 2) is None
    assert why_waiting(2, 2) == "2 of at most 2 jobs of this tenant are running"
    assert why_waiting(3, 2) == "3 of at most 2 jobs of this tenant are running"
