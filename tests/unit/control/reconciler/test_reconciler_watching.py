"""Drivers that die, fall silent, or never speak."""

from __future__ import annotations

import json
from typing import Any

import pytest
from reconciler_world import World


def die(world: World, id: str, message: str = "Segmentation fault") -> None:
    world.driver(id).become("FAILED", message)


def test_a_driver_that_dies_is_replaced_after_a_delay(world: World) -> None:
    id = world.running()
    die(world, id)
    world.tick()
    job = world.job(id)
    assert job.state == "recovering"
    assert job.reason == "attempt 1 ended without saying why (Ray says FAILED): Segmentation fault"
    assert len(world.cluster.of_job(id)) == 1
    world.tick(every_s=2.0)
    assert world.job(id).state == "starting"
    assert (world.job(id).attempt, world.job(id).restarts) == (2, 1)
    assert world.attempt(id).submission_id == f"sapo-{id}-2"


def test_the_fourth_death_fails_the_job_with_the_drivers_last_words(world: World) -> None:
    id = world.running()
    for attempt in range(1, 5):
        assert world.driver(id).request.attempt == attempt
        die(world, id, f"death number {attempt}")
        world.tick(2, every_s=61.0)
    job = world.job(id)
    assert (job.state, job.restarts, job.attempt) == ("failed", 3, 4)
    assert "replaced 3 times" in job.reason
    assert job.reason.endswith("death number 4")


def test_a_failure_that_the_driver_reports_itself_is_final(world: World) -> None:
    id = world.running()
    world.says(id, "failed", "data row 7 has no prompt")
    world.driver(id).become("FAILED")
    world.tick(3, every_s=10.0)
    assert (world.job(id).state, world.job(id).reason) == ("failed", "data row 7 has no prompt")
    assert len(world.cluster.of_job(id)) == 1
    assert world.attempt(id).state == "ended"


def test_an_interrupted_driver_is_replaced_only_when_it_is_gone(world: World) -> None:
    id = world.running()
    world.says(id, "interrupted", "SIGTERM")
    world.tick(2, every_s=5.0)
    assert world.job(id).state == "recovering"
    assert len(world.cluster.of_job(id)) == 1
    world.driver(id).become("FAILED")
    world.tick()
    assert [driver.request.attempt for driver in world.cluster.of_job(id)] == [1, 2]


def test_a_driver_that_reported_its_end_and_stays_is_stopped(world: World) -> None:
    id = world.running()
    world.says(id, "interrupted")
    world.tick(4, every_s=10.0)
    assert world.cluster.stops[f"sapo-{id}-1"] == 1
    world.tick()
    assert len(world.cluster.of_job(id)) == 2


def test_a_silent_driver_is_stopped_before_it_is_replaced(world: World) -> None:
    id = world.running()
    world.quiet_for(50.0)
    assert world.job(id).state == "running"
    world.cluster.obeys_stop = False
    world.quiet_for(30.0)
    job = world.job(id)
    assert (job.state, job.reason) == ("recovering", "nothing heard of attempt 1 for 60 s (Ray says RUNNING)")
    assert world.cluster.stops[f"sapo-{id}-1"] >= 1
    assert len(world.cluster.of_job(id)) == 1, "a new driver was started beside one that may still run"
    world.cluster.obeys_stop = True
    world.tick(2, every_s=2.0)
    assert len(world.cluster.of_job(id)) == 2


def test_an_empty_delivery_is_a_sign_of_life(world: World) -> None:
    id = world.running()
    for _ in range(10):
        world.quiet_for(20.0)
        world.report(id)
    assert world.job(id).state == "running"
    assert world.cluster.stops.total() == 0


def test_the_clock_of_silence_starts_afresh_with_the_control_plane(world: World) -> None:
    id = world.running()
    world.clock.ahead += 3600.0
    world.reconciler = world.new_reconciler()
    world.tick()
    world.quiet_for(50.0)
    assert world.job(id).state == "running"
    assert world.cluster.stops.total() == 0
    world.quiet_for(30.0)
    assert world.cluster.stops.total() == 1
    assert "recovering" in world.states(id)


def test_time_in_which_no_round_could_be_made_is_not_held_against_drivers(world: World) -> None:
    id = world.running()
    world.clock.ahead += 3600.0  # the store was gone, or the machine asleep
    world.tick()
    assert world.job(id).state == "running"
    world.report(id)
    world.quiet_for(50.0)
    assert world.job(id).state == "running"


def test_a_driver_that_never_reports_is_lost_after_the_start_deadline(world: World) -> None:
    id = world.submit()
    world.tick()
    world.quiet_for(290.0)
    assert world.job(id).state == "starting"
    world.quiet_for(20.0)
    assert world.job(id).reason.startswith("restart 1 of 3: attempt 1 has not reported within 300 s of its launch")
    assert world.cluster.stops[f"sapo-{id}-1"] == 1
    assert [driver.state for driver in world.cluster.of_job(id)] == ["STOPPED", "PENDING"]


def test_a_cluster_that_was_replaced_costs_a_restart_once_the_driver_is_silent(world: World) -> None:
    id = world.running()
    world.cluster.forget_everything()
    world.tick(2, every_s=5.0)
    assert world.job(id).state == "running", "its driver was heard seconds ago"
    world.tick(2, every_s=10.0)
    assert world.job(id).restarts == 1
    assert world.driver(id).request.attempt == 2


def test_a_job_is_left_alone_while_the_cluster_cannot_be_reached(world: World) -> None:
    id = world.running()
    world.cluster.available = False
    world.quiet_for(200.0)
    job = world.job(id)
    assert job.state == "running"
    assert [(one["type"], one["reason"]) for one in job.conditions] == [
        ("LauncherUnavailable", "the cluster cannot be reached")
    ]
    assert [event.data for event in world.events(id) if event.kind == "condition"] == [
        {"condition": "LauncherUnavailable", "reason": "the cluster cannot be reached"}
    ]
    world.cluster.available = True
    world.report(id)
    world.tick()
    assert world.job(id).conditions == []
    assert world.job(id).state == "running"
    assert world.cluster.stops.total() == 0


def journal(world: World, id: str, *events: dict[str, Any], torn: str = "") -> None:
    """What the driver made durable in its run directory."""
    ledger = {"time": 1.0, "attempt": 1, "kind": "issued", "prompt": "p"}
    lines = [json.dumps(line) + "\n" for line in (ledger, *events, ledger)]
    (world.runs / id / "journal.jsonl").write_text("".join(lines) + torn)


def said(seq: int, kind: str, attempt: int = 1, **fields: Any) -> dict[str, Any]:
    return {"time": 1000.0 + seq, "attempt": attempt, "seq": seq, "kind": kind, **fields}


def test_what_a_driver_could_not_deliver_is_taken_from_its_journal(world: World) -> None:
    id = world.running()
    journal(
        world,
        id,
        said(1, "transition", state="running"),
        said(2, "step", step=10, steps=10, metrics={"reward/mean": 0.5}),
        said(3, "transition", state="succeeded", reason="all steps taken"),
        torn='{"time": 5, "attempt": 1, "seq": 4, "ki',
    )
    world.driver(id).become("SUCCEEDED")
    world.tick()
    job = world.job(id)
    assert (job.state, job.step, job.summary["reward"]) == ("succeeded", 10, 0.5)
    assert [(event.seq, event.kind) for event in world.events(id) if event.attempt == 1] == [
        (1, "transition"),
        (2, "step"),
        (3, "transition"),
    ]
    assert job.attempt == 1
    assert world.attempt(id).state == "ended"


def test_events_of_another_attempt_are_not_taken_from_the_journal(world: World) -> None:
    id = world.running()
    die(world, id)
    world.tick(2, every_s=2.0)
    world.driver(id).become("RUNNING")
    journal(
        world,
        id,
        said(1, "transition", state="running"),
        said(2, "transition", state="interrupted"),
        said(1, "transition", attempt=2, state="running"),
    )
    world.driver(id).become("FAILED")
    world.tick()
    assert [event.seq for event in world.events(id) if event.attempt == 1] == [1]
    assert [event.seq for event in world.events(id) if event.attempt == 2] == [1]


def test_a_damaged_journal_gives_what_comes_before_the_damage(world: World) -> None:
    id = world.running()
    journal(world, id, said(2, "phase", name="train"), said(4, "phase", name="later"))
    die(world, id)
    world.tick()
    assert [event.seq for event in world.events(id) if event.attempt == 1] == [1, 2]
    assert world.job(id).state == "recovering"


@pytest.mark.parametrize(
    "line",
    [b'{"time":1,"attempt":1,"seq":3,"kind":"x","r":"\xff"}\n', b'{"seq":' + b"[" * 100_000 + b"\n"],
    ids=["no UTF-8", "nested without end"],
)
def test_a_line_that_cannot_be_read_is_where_a_journal_ends(world: World, line: bytes) -> None:
    id = world.running()
    journal(world, id, said(2, "phase", name="train"))
    with (world.runs / id / "journal.jsonl").open("ab") as file:
        file.write(line)
    die(world, id)
    world.tick()
    assert [event.seq for event in world.events(id) if event.attempt == 1] == [1, 2]
    assert world.job(id).state == "recovering"


def test_a_journal_and_a_log_that_cannot_be_kept_do_not_keep_a_job_from_being_settled(world: World) -> None:
    id = world.running()
    (world.runs / id / "journal.jsonl").mkdir()
    (world.runs / id / "logs").write_text("a file where the folder should be")
    world.driver(id).printed = "boom\n"
    die(world, id)
    world.tick()
    assert world.job(id).state == "recovering"
    assert world.attempt(id).state == "ended"
    [condition] = world.job(id).conditions
    assert (condition["type"], condition["reason"]) == (
        "RemainsLost",
        "the rest of the journal of attempt 1 could not be kept (IsADirectoryError)",
    )


def test_what_a_driver_printed_is_kept_with_the_run(world: World) -> None:
    id = world.running()
    world.driver(id).printed = "Grüße\nboom\n"
    die(world, id)
    world.tick()
    world.cluster.forget_everything()
    assert (world.runs / id / "logs" / "driver-1.log").read_text() == "Grüße\nboom\n"


def test_a_driver_that_exits_well_without_a_word_is_replaced(world: World) -> None:
    id = world.running()
    world.driver(id).become("SUCCEEDED")
    world.tick(2, every_s=2.0)
    assert world.job(id).restarts == 1


def test_a_resumed_job_gets_its_driver_free_of_budget(world: World) -> None:
    id = world.running()
    world.ask(id, "pause")
    world.says(id, "paused")
    world.driver(id).become("SUCCEEDED")
    world.tick()
    world.resume(id)
    world.tick()
    assert (world.job(id).attempt, world.job(id).restarts) == (2, 0)
