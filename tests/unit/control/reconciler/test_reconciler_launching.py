"""From a queued job to a driver: once, whatever dies in between."""

from __future__ import annotations

import stat
from typing import Any

import pytest
from mortal import Crash, Mortal, MortalCluster, MortalStore
from reconciler_world import World

from sapo_ray.control import launch
from sapo_ray.control.problems import Refused
from sapo_ray.control.reconciler import acting, admission
from sapo_ray.control.reconciler.tokens import read_token, token_file


def test_a_queued_job_is_launched_with_its_token_in_a_file_for_the_owner_alone(world: World) -> None:
    id = world.submit()
    world.tick()
    driver = world.driver(id)
    path = token_file(world.runs / id, 1)
    assert driver.request.token_file == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert driver.token not in repr(driver.request)
    assert world.attempt(id).state == "launched"
    world.says(id, "running")
    assert world.job(id).state == "running"


def die_at_every_effect(world: World, prepare: Any, finished: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the same story once for each effect of the reconciler, which dies right after it. Returns how many there are.

    A new reconciler takes over each time, after the old one's lease has run out.
    """
    for n in range(1, 100):
        id = prepare()
        mortal = Mortal(n)
        with monkeypatch.context() as patched:
            for module in (acting, admission):
                patched.setattr(module, "write_token", mortal.after(module.write_token))
            died = False
            try:
                replica = world.new_reconciler(MortalStore(world.store, mortal), MortalCluster(world.cluster, mortal))
                replica.tick()
                world.clock.ahead += 2.0  # for what waits before it is tried again
                replica.tick()
            except Crash:
                died = True
        world.clock.ahead += 16.0
        world.reconciler = world.new_reconciler()
        world.tick(2)
        finished(id)
        if not died:
            return n - 1
    raise AssertionError("the reconciler never came to an end")


def test_a_launch_survives_death_after_any_effect_and_happens_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finished(id: str) -> None:
        [driver] = world.cluster.of_job(id)
        assert driver.request.attempt == 1
        world.says(id, "running")  # its token is accepted
        assert world.job(id).state == "running"
        assert world.attempt(id).state == "launched"
        world.says(id, "succeeded")
        driver.become("SUCCEEDED")
        world.tick()
        assert world.attempt(id).state == "ended"

    assert die_at_every_effect(world, world.submit, finished, monkeypatch) >= 6


def test_a_replacement_survives_death_after_any_effect_and_costs_one_restart(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare() -> str:
        id = world.running()
        world.driver(id).become("FAILED", "boom")
        world.clock.ahead += 5.0
        world.reconciler.release()
        return id

    def finished(id: str) -> None:
        world.tick(2, every_s=2.0)
        first, second = world.cluster.of_job(id)
        assert (first.request.attempt, second.request.attempt) == (1, 2)
        assert world.job(id).restarts == 1
        assert world.states(id).count("recovering") == 1
        world.says(id, "succeeded")
        second.become("SUCCEEDED")
        world.tick()

    assert die_at_every_effect(world, prepare, finished, monkeypatch) >= 6


def test_a_cancelling_survives_death_after_any_effect_and_deletes_what_was_discarded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare() -> str:
        id = world.running()
        for name in ("checkpoints", "export", "logs"):
            (world.runs / id / name).mkdir(parents=True)
        world.ask(id, "cancel", discard=True)
        world.driver(id).become("FAILED", "boom")
        world.reconciler.release()
        return id

    def finished(id: str) -> None:
        assert world.job(id).state == "cancelled"
        assert world.attempt(id).state == "ended"
        assert sorted(path.name for path in (world.runs / id).iterdir()) == ["logs"]
        assert len(world.cluster.of_job(id)) == 1

    assert die_at_every_effect(world, prepare, finished, monkeypatch) >= 4


def test_a_lost_token_is_replaced_before_the_launch(world: World) -> None:
    id = world.submit()
    world.admit_and_die()
    old = read_token(world.runs / id, 1)
    token_file(world.runs / id, 1).unlink()
    world.clock.ahead += 16.0
    world.tick()
    assert world.driver(id).token not in ("", old)
    world.says(id, "running")
    assert world.job(id).state == "running"
    assert world.job(id).attempt == 1


def test_a_damaged_token_is_replaced_before_the_launch(world: World) -> None:
    id = world.submit()
    world.admit_and_die()
    token_file(world.runs / id, 1).write_text("sapo_job_nonsense")
    world.clock.ahead += 16.0
    world.tick()
    world.says(id, "running")
    assert world.job(id).state == "running"


def test_a_launch_that_the_cluster_refuses_fails_the_job_in_words_of_our_own(world: World) -> None:
    world.cluster.refuses = "Ray at http://operator:hunter2@ray.internal refused it"
    id = world.submit()
    world.tick()
    assert (world.job(id).state, world.job(id).reason) == (
        "failed",
        "the cluster refused to start the driver; the service's log says why",
    )
    assert world.attempt(id).state == "ended"
    assert "hunter2" not in repr([event.data for event in world.events(id)])


def test_a_run_directory_that_cannot_be_written_is_a_condition_until_it_can(world: World) -> None:
    world.runs.write_text("a file where the folder should be")
    id = world.submit()
    world.tick(2)
    [condition] = world.job(id).conditions
    assert condition["type"] == "RunDirUnavailable"
    assert str(world.runs) not in condition["reason"], "the operator's paths are not the tenant's business"
    assert world.job(id).state == "starting"
    assert not world.cluster.of_job(id)
    world.runs.unlink()
    world.tick()
    assert world.job(id).conditions == []
    assert len(world.cluster.of_job(id)) == 1


def test_a_job_cancelled_before_its_launch_never_gets_a_driver(world: World) -> None:
    id = world.submit()
    world.admit_and_die()
    world.ask(id, "cancel")
    world.clock.ahead += 16.0
    world.tick()
    assert world.job(id).state == "cancelled"
    assert not world.cluster.of_job(id)
    assert not token_file(world.runs / id, 1).exists()


def refuse(world: World, id: str) -> str:
    """What the link does where a job may not be launched any more."""
    with world.store.begin() as s:
        return launch.give_up(s, id, world.attempt(id).number, Refused(403, "not_allowed", "the secret is gone"))


def test_a_job_that_may_not_be_launched_has_failed_once_and_nothing_is_left_of_its_attempt(world: World) -> None:
    id = world.submit()
    world.tick()
    reason = refuse(world, id)
    assert reason == "it was not launched: the secret is gone"
    world.driver(id).become("FAILED", "superseded")
    world.tick(3, every_s=60.0)
    assert (world.job(id).state, world.job(id).reason) == ("failed", reason)
    assert (world.attempt(id).number, world.attempt(id).state) == (1, "ended")
    assert not list(world.runs.rglob(".token*"))


def test_a_job_that_was_paused_instead_goes_on_by_a_new_attempt_when_it_is_resumed(world: World) -> None:
    id = world.running()
    world.report(id, {"time": world.clock(), "kind": "step", "step": 3, "steps": 10, "metrics": {}})
    world.driver(id).become("FAILED", "its machine died")
    world.tick(4, every_s=5.0)
    assert (world.job(id).state, world.attempt(id).number) == ("starting", 2)
    refuse(world, id)
    world.resume(id)  # at once, before its driver is gone
    world.tick(2)
    assert world.job(id).state == "queued"
    world.driver(id).become("FAILED", "superseded")
    world.tick(3, every_s=5.0)
    assert (world.job(id).state, world.attempt(id).number) == ("starting", 3)
    assert world.job(id).restarts == 1
