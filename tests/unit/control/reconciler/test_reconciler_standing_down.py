"""What becomes of jobs when the service ends together with its own cluster."""

from __future__ import annotations

from reconciler_world import World

from sapo_ray.control.reconciler.standing_down import stand_down


def test_jobs_whose_drivers_were_stopped_with_the_service_go_on_free_of_budget(world: World) -> None:
    running, pausing, cancelling = world.running(tenant="a"), world.running(tenant="b"), world.running(tenant="c")
    world.ask(pausing, "pause")
    world.ask(cancelling, "cancel")
    world.says(running, "interrupted", "SIGTERM")
    world.reconciler.release()
    assert stand_down(world.store, world.cluster, "ending", 5.0, clock=world.clock) == []
    assert [world.job(id).state for id in (running, pausing, cancelling)] == ["queued", "paused", "cancelled"]
    world.reconciler = world.new_reconciler()
    world.cluster.forget_everything()
    world.tick()
    assert (world.job(running).state, world.job(running).attempt, world.job(running).restarts) == ("starting", 2, 0)


def test_a_driver_that_cannot_be_stopped_is_named_after_a_bounded_wait(world: World) -> None:
    id = world.running()
    world.reconciler.release()
    world.cluster.obeys_stop = False
    assert stand_down(world.store, world.cluster, "ending", 0.5, clock=world.clock) == [id]
    assert world.job(id).state == "running"


def test_a_cluster_that_cannot_be_reached_is_not_waited_for(world: World) -> None:
    id = world.running()
    world.reconciler.release()
    world.cluster.available = False
    assert stand_down(world.store, world.cluster, "ending", 60.0, clock=world.clock) == [id]
