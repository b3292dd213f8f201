"""Pausing and cancelling: by the driver if it obeys in time, else by the reconciler."""

from __future__ import annotations

import pytest
from reconciler_world import World


def heartbeats(world: World, id: str, seconds: float) -> None:
    """The driver lives and reports, but does not do what it is asked."""
    while seconds > 0:
        world.tick(every_s=10.0)
        world.report(id)
        seconds -= 10.0


def test_a_driver_that_obeys_a_pause_is_given_time_to_exit(world: World) -> None:
    id = world.running()
    world.ask(id, "pause")
    world.tick()
    assert world.job(id).state == "pausing"
    world.says(id, "paused", "checkpoint at step 3")
    world.tick(2, every_s=10.0)
    assert (world.job(id).state, world.attempt(id).state) == ("paused", "launched")
    world.driver(id).become("SUCCEEDED")
    world.tick()
    assert (world.job(id).state, world.job(id).reason) == ("paused", "checkpoint at step 3")
    assert world.attempt(id).state == "ended"
    assert world.cluster.stops.total() == 0


def test_a_driver_that_does_not_obey_a_pause_is_stopped_and_the_job_paused(world: World) -> None:
    id = world.running()
    world.ask(id, "pause")
    heartbeats(world, id, 890.0)
    assert world.cluster.stops.total() == 0
    heartbeats(world, id, 20.0)
    assert world.cluster.stops.total() == 1
    world.tick()
    assert world.job(id).state == "paused"
    assert world.job(id).restarts == 0


def test_a_driver_that_holds_for_a_full_disk_is_not_stopped_for_a_pause_that_needs_room(world: World) -> None:
    id = world.running()

    def disk_full(**more: bool) -> None:
        world.report(id, {"time": world.clock(), "kind": "condition", "condition": "DiskFull", "reason": "x", **more})

    disk_full()
    world.ask(id, "pause")
    heartbeats(world, id, 3600.0)
    assert world.cluster.stops.total() == 0
    disk_full(cleared=True)
    heartbeats(world, id, 890.0)
    assert world.cluster.stops.total() == 0, "its time began when there was room"
    heartbeats(world, id, 20.0)
    assert world.cluster.stops.total() == 1


@pytest.mark.parametrize(("discard", "grace"), [(False, 600.0), (True, 60.0)])
def test_a_driver_that_does_not_obey_a_cancel_is_stopped(world: World, discard: bool, grace: float) -> None:
    id = world.running()
    world.ask(id, "cancel", discard=discard)
    heartbeats(world, id, grace - 10.0)
    assert world.cluster.stops.total() == 0
    heartbeats(world, id, 20.0)
    assert world.cluster.stops.total() == 1
    world.tick()
    assert world.job(id).state == "cancelled"
    assert world.attempt(id).state == "ended"


def test_a_driver_that_dies_while_it_should_pause_leaves_the_job_paused(world: World) -> None:
    id = world.running()
    world.ask(id, "pause")
    world.driver(id).become("FAILED", "boom")
    world.tick()
    assert (world.job(id).state, world.job(id).restarts) == ("paused", 0)


def test_a_silent_driver_is_stopped_long_before_its_time_to_obey_is_up(world: World) -> None:
    id = world.running()
    world.ask(id, "cancel")
    world.quiet_for(80.0)
    assert world.job(id).state == "cancelled"


def test_a_cancelled_job_keeps_its_checkpoints_unless_they_are_discarded(world: World) -> None:
    kept, dropped = world.running(), world.running()
    for id in (kept, dropped):
        for name in ("checkpoints/step-1", "export", "logs"):
            (world.runs / id / name).mkdir(parents=True)
    world.ask(kept, "cancel")
    world.ask(dropped, "cancel", discard=True)
    for id in (kept, dropped):
        world.says(id, "cancelled")
        world.tick()
        assert (world.runs / id / "checkpoints").exists(), "the driver has not exited yet"
        world.driver(id).become("SUCCEEDED")
    world.tick()
    assert sorted(path.name for path in (world.runs / kept).iterdir()) == ["checkpoints", "export", "logs"]
    assert sorted(path.name for path in (world.runs / dropped).iterdir()) == ["logs"]
    assert [event.data for event in world.events(dropped) if event.kind == "discarded"] == [
        {"what": ["checkpoints", "export"]}
    ]


def test_a_paused_job_that_is_cancelled_with_discard_loses_its_files_too(world: World) -> None:
    id = world.running()
    world.ask(id, "pause")
    world.says(id, "paused")
    world.driver(id).become("SUCCEEDED")
    world.tick()
    (world.runs / id / "checkpoints").mkdir()
    world.ask(id, "cancel", discard=True)
    world.tick(4, every_s=10.0)
    assert world.job(id).state == "cancelled"
    assert not (world.runs / id / "checkpoints").exists()
    world.tick(8, every_s=10.0)
    assert len([event for event in world.events(id) if event.kind == "discarded"]) == 1


def test_a_job_resumed_before_its_old_driver_has_exited_waits_for_it(world: World) -> None:
    id = world.running()
    world.ask(id, "pause")
    world.says(id, "paused")
    world.resume(id)
    world.tick(2, every_s=5.0)
    assert world.job(id).state == "queued"
    assert len(world.cluster.of_job(id)) == 1
    world.driver(id).become("SUCCEEDED")
    world.tick(2)
    assert world.job(id).state == "starting"
    assert len(world.cluster.of_job(id)) == 2


def test_a_driver_that_stays_after_its_job_is_over_is_stopped(world: World) -> None:
    id = world.running()
    world.says(id, "succeeded")
    world.tick(2, every_s=10.0)
    assert world.cluster.stops.total() == 0
    world.tick(2, every_s=10.0)
    assert world.cluster.stops.total() == 1
    world.tick()
    assert world.attempt(id).state == "ended"
    assert world.job(id).state == "succeeded"


def test_a_pause_withdrawn_while_the_driver_obeyed_it_queues_the_job_again(world: World) -> None:
    id = world.running()
    world.ask(id, "pause")
    world.says(id, "paused")
    with world.store.begin() as s:
        from sapo_ray.control.store import jobs

        row = jobs.get_job(s, None, id, lock=True)
        assert row is not None
        row.desired_state = "run"
    world.driver(id).become("SUCCEEDED")
    world.tick(2)
    assert world.job(id).state == "starting"


def test_a_job_paused_while_it_recovers_does_not_start_again(world: World) -> None:
    id = world.running()
    world.driver(id).become("FAILED")
    world.tick()
    assert world.job(id).state == "recovering"
    world.ask(id, "pause")
    world.tick(every_s=5.0)
    assert world.job(id).state == "paused"
    assert len(world.cluster.of_job(id)) == 1
