"""What a diagnosis says of jobs as the reconciler leaves them: in the queue, without a cluster, between two drivers."""

from __future__ import annotations

from reconciler_world import World

from sapo_ray.api.diagnosis import Diagnosis
from sapo_ray.control.routes.diagnosis import known_of
from sapo_ray.diagnosis import diagnose


def named(world: World, id: str) -> Diagnosis:
    with world.store.read() as session:
        return diagnose(known_of(session, world.job(id), world.clock()))


def test_a_job_over_its_tenants_limit_waits_for_the_queue(world: World) -> None:
    *_, third = world.submit(), world.submit(), world.submit()
    world.tick()
    found = named(world, third)
    assert (found.verdict, found.component) == ("waiting", "queue")
    assert "2 of at most 2 jobs of this tenant are running" in found.summary


def test_a_job_without_a_cluster_waits_for_it(world: World) -> None:
    job = world.submit()
    world.cluster.available = False
    world.tick(3)
    found = named(world, job)
    assert (found.verdict, found.component) == ("waiting", "cluster")


def test_a_driver_that_fell_silent_is_named_while_another_is_on_its_way(world: World) -> None:
    job = world.running()
    world.driver(job).become("FAILED", "Job entrypoint command failed with exit code -9")
    world.tick(2)
    found = named(world, job)
    assert (found.verdict, found.component) == ("waiting", "driver")
    assert found.cause is not None
    assert "exit code -9" in found.cause.text


def test_a_driver_that_the_cluster_never_starts_is_the_clusters(world: World) -> None:
    job = world.submit()
    world.tick()
    assert named(world, job).verdict == "healthy"
    world.clock.ahead += 90
    found = named(world, job)
    assert (found.verdict, found.component) == ("stalled", "cluster")
