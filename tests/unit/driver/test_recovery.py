"""A learner that is lost within an attempt: what is trained on, counted and journalled."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from fake_control import orders
from fakes import Bench, FakeLearner, FakeRollouts, FakeVerifiers, job

from sapo_ray.api.link import Orders
from sapo_ray.driver.journal import read_journal
from sapo_ray.driver.recovery import losses_before
from sapo_ray.driver.tracking import open_trackers
from sapo_ray.errors import DeadlineExceeded, NoRoom, Superseded, TrainingFailed, WorkerLost
from sapo_ray.types import PolicyVersion, Prompt


def bench(folder: Path, spec: Any, *dies: tuple[str, int], **parts: Any) -> Bench:
    folder.mkdir(parents=True, exist_ok=True)
    return Bench(folder, spec, learner=FakeLearner(dies=list(dies), seconds=0.002), **parts)


def surviving(records: Iterable[dict[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """Prompts consumed, in order of steps, and prompts dropped with their reason, by the ledger's last word."""
    consumed: dict[int, list[str]] = {}
    dropped: dict[str, tuple[int, str]] = {}
    for record in records:
        if record["kind"] == "rollback":
            consumed = {step: groups for step, groups in consumed.items() if step <= record["to_step"]}
            dropped = {group: at for group, at in dropped.items() if at[0] <= record["to_step"]}
        elif record["kind"] == "consumed":
            assert record["step"] not in consumed
            consumed[record["step"]] = list(record["groups"])
        elif record["kind"] == "dropped":
            dropped[record["group"]] = (record["step"], record["reason"])
    return [group for step in sorted(consumed) for group in consumed[step]], {g: r for g, (_, r) in dropped.items()}


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("loss", [("train", 1), ("train", 4), ("publish", 3), ("publish", 4), ("save", 4)])
async def test_after_a_loss_the_run_trains_on_what_one_without_a_loss_does(
    tmp_path: Path, staleness: int, loss: tuple[str, int]
) -> None:
    spec = job(steps=5, rollout__max_staleness=staleness, checkpoint={"every": 2, "min_free_gb": 0})
    whole = bench(tmp_path / "whole", spec)
    await whole.attempt()
    lossy = bench(tmp_path / "lossy", spec, loss, rollouts=FakeRollouts(jitter=random.Random(5)))
    outcome = await lossy.attempt()
    assert (outcome.ending, outcome.steps, lossy.learner.restarts) == (None, 5, 1)
    assert lossy.learner.trained == whole.learner.trained
    assert sorted(lossy.rows.rows) == [1, 2, 3, 4, 5]
    assert lossy.prompts.taken == whole.prompts.taken
    back = 0 if loss == ("train", 1) else 2
    (rollback,) = lossy.journal("rollback")
    assert (rollback["to_step"], rollback["checkpoint"]) == (back, "step-000002" if back else None)
    consumed, dropped = surviving(lossy.journal("rollback", "consumed", "dropped"))
    assert consumed == [f"t:{i}:0" for i in range(20)]
    assert dropped == {}


async def test_a_learner_that_does_not_save_in_time_is_restarted_as_one_that_died(tmp_path: Path) -> None:
    class Hangs(FakeLearner):
        async def save(self, folder: Path) -> None:
            try:
                await super().save(folder)
            except WorkerLost as error:
                raise DeadlineExceeded("learner save: rank [1] not done in time") from error

    lossy = Bench(tmp_path, job(steps=3), learner=Hangs(dies=[("save", 2)]))
    assert (await lossy.attempt()).steps == 3
    assert lossy.learner.restarts == 1


async def test_versions_of_an_abandoned_lineage_are_never_those_of_the_new_one(tmp_path: Path) -> None:
    spec = job(steps=6, rollout__max_staleness=2, checkpoint={"every": 2, "min_free_gb": 0})
    lossy = bench(tmp_path, spec, ("train", 4), ("publish", 6))
    outcome = await lossy.attempt()
    published = [record["version"] for record in lossy.journal("published")]
    assert published == ["1.0", "1.1", "1.2", "1.3", "1.2.1", "1.3.1", "1.4.1", "1.5.1", "1.4.2", "1.5.2", "1.6.2"]
    assert str(outcome.published.manifest.version) == "1.6.2"
    lines = lossy.journal("rollback", "graded", "issued", "published")
    back = [i for i, line in enumerate(lines) if line["kind"] == "rollback"]
    newest = lines[back[-1] :]
    assert newest[1]["version"] == "1.4.2", "taken over by all before anything is issued"
    spans = {span[0] for line in newest if line["kind"] == "graded" for c in line["completions"] for span in c["spans"]}
    assert spans <= {"1.4.2", "1.5.2", "1.6.2"}


def test_a_lineage_is_told_apart_in_a_version_and_in_its_text() -> None:
    assert [str(PolicyVersion(1, 3)), str(PolicyVersion(1, 3, 2))] == ["1.3", "1.3.2"]
    assert [PolicyVersion.parse(text) for text in ("1.3", "1.3.2")] == [PolicyVersion(1, 3), PolicyVersion(1, 3, 2)]
    assert PolicyVersion(1, 3) != PolicyVersion(1, 3, 1)


async def test_groups_under_way_are_dropped_and_those_of_the_checkpoint_are_not_sampled_again(tmp_path: Path) -> None:
    class SavesWithAll(FakeLearner):
        """Saves once everything that is outstanding is graded."""

        async def save(self, folder: Path) -> None:
            while lossy.rollouts.under_way:  # noqa: ASYNC110 - the fake has no event for it
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            await super().save(folder)

    spec = job(steps=4, rollout__max_staleness=1, checkpoint={"every": 1, "min_free_gb": 0})
    lossy = Bench(tmp_path, spec, learner=SavesWithAll(dies=[("train", 3)]))
    await lossy.attempt()
    held = json.loads((tmp_path / "checkpoints" / "step-000003" / "driver.json").read_text())
    assert [one["complete"] for one in held["outstanding"]] == [True] * 4
    asked = [request.group_id for request in lossy.rollouts.requests]
    assert sorted(asked) == sorted(set(asked)), "each prompt was sampled once: all that was under way was in the cut"
    assert lossy.journal("dropped") == []


async def test_what_is_given_up_is_counted_once_in_the_row_of_the_next_step(tmp_path: Path) -> None:
    spec = job(steps=4, rollout__max_staleness=1, checkpoint={"every": 0, "min_free_gb": 0})
    lossy = bench(tmp_path, spec, ("train", 2))
    await lossy.attempt()
    dropped = lossy.journal("dropped")
    assert [(record["group"], record["reason"], record["step"]) for record in dropped] == [
        (f"t:{i}:0", "rolled_back", 2) for i in range(4, 12)
    ]
    assert [lossy.rows.rows[step]["drops/rolled_back"] for step in (1, 2, 3, 4)] == [8, 0, 0, 0]


async def test_a_loss_is_a_condition_until_a_new_learner_goes_on(tmp_path: Path) -> None:
    lossy = bench(tmp_path, job(), ("train", 3))
    await lossy.attempt()
    told = [record for record in lossy.journal("condition") if record["condition"] == "LearnerLost"]
    assert [(one["reason"], one.get("restart"), one.get("cleared")) for one in told] == [
        ("learner train: rank 0 died", 1, None),
        ("a new learner goes on from step 2", None, True),
    ]


async def test_a_learner_that_is_lost_while_it_comes_back_is_restarted_again_within_the_budget(tmp_path: Path) -> None:
    lossy = bench(tmp_path, job(steps=4), ("train", 3), ("restart", 1), ("load", 2))
    outcome = await lossy.attempt()
    assert (outcome.steps, lossy.learner.restarts) == (4, 3)


async def test_the_fourth_loss_fails_the_job_with_the_cause_and_the_way_on(tmp_path: Path) -> None:
    lossy = bench(tmp_path, job(steps=8), *[("train", step) for step in (2, 3, 4, 5)])
    with pytest.raises(
        TrainingFailed, match=r"lost 4 times, and is restarted 3 times .*rank 0 died; .*sapo-ray resume"
    ):
        await lossy.attempt()
    assert lossy.learner.restarts == 3


def journal_of(path: Path, *events: tuple[int, str, dict[str, Any]]) -> Path:
    lines = [{"time": 0.0, "attempt": a, "seq": i, "kind": kind, **rest} for i, (a, kind, rest) in enumerate(events)]
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return path


LOST = ("condition", {"condition": "LearnerLost", "reason": "r"})
CLEARED = ("condition", {"condition": "LearnerLost", "cleared": True})


async def test_a_learner_whose_node_does_not_come_back_leaves_the_run_to_another_attempt(tmp_path: Path) -> None:
    lossy = bench(tmp_path, job(), ("train", 2))

    async def no_room() -> None:
        raise NoRoom("no room for learner.ranks: 2")

    lossy.learner.restart = no_room  # type: ignore[method-assign]
    with pytest.raises(WorkerLost, match="cannot be started again: no room"):
        await lossy.attempt(1)
    second = lossy.next_life()
    await second.attempt(2)
    assert sorted(second.rows.rows) == [2, 3]


def test_restarts_are_counted_over_attempts_until_somebody_asked_for_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = [(1, *LOST), (1, *CLEARED), (1, *LOST), (1, "transition", {"state": "interrupted"})]
    assert losses_before(journal_of(path, *first, (2, *LOST)), 2) == 2
    assert losses_before(journal_of(path, *first, (2, *LOST)), 3) == 3
    paused = [(2, *LOST), (2, "transition", {"state": "paused"})]
    assert losses_before(journal_of(path, *first, *paused, (3, *LOST)), 4) == 1


async def test_a_restart_counts_the_losses_of_earlier_attempts(tmp_path: Path) -> None:
    first = bench(tmp_path, job(), *[("train", 1)] * 3)
    first.learner.fail_at = 3
    with pytest.raises(WorkerLost):
        await first.attempt(1)
    assert first.learner.restarts == 3
    second = first.next_life()
    second.learner.dies = [("train", 3)]
    with pytest.raises(TrainingFailed, match="lost 4 times"):
        await second.attempt(2)


async def test_seconds_of_earlier_attempts_outlive_a_learner_that_is_lost_while_it_loads(tmp_path: Path) -> None:
    first = bench(tmp_path, job(steps=4))
    first.learner.seconds, first.learner.fail_at = 0.5, 3
    with pytest.raises(WorkerLost):
        await first.attempt(1)
    second = first.next_life()
    second.learner.dies = [("load", 2)]
    outcome = await second.attempt(2)
    assert second.learner.restarts == 1
    assert 1.0 <= outcome.seconds["training"] < 2.0, "two slow steps, and two that take no time; none is counted twice"


async def test_samples_of_an_abandoned_lineage_are_told_apart_by_their_version(tmp_path: Path) -> None:
    lossy = bench(tmp_path, job(steps=2, checkpoint={"every": 0, "min_free_gb": 0}), ("train", 2))
    await lossy.attempt()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["version"] for row in rows)) == ["1.1", "1.1.1", "1.2.1"]
    assert {row["step"] for row in rows if row["version"] in ("1.1", "1.1.1")} == {1}


async def test_accuracy_before_training_is_measured_once(tmp_path: Path) -> None:
    held_out = [Prompt(id="eval/t:0:0", index=0, source="t", text="", token_ids=(1,), gold="0")]
    spec = job(checkpoint={"every": 0, "min_free_gb": 0})
    lossy = bench(tmp_path, spec, ("train", 2), evaluation=held_out)
    await lossy.attempt()
    assert [record["step"] for record in lossy.journal("evaluation")] == [0, 3]
    assert "evaluation/greedy" in lossy.rows.rows[1], "in the row of the first step, which was taken again"


async def test_a_driver_that_is_superseded_while_its_learner_restarts_takes_no_rows_back(tmp_path: Path) -> None:
    lossy = bench(tmp_path, job(steps=6), ("train", 3))
    restart = lossy.learner.restart

    async def superseded() -> None:
        (tmp_path / "attempt").write_text("2")
        lossy.rows.rows |= {3: {}, 4: {}}  # of the other attempt
        await restart()

    lossy.learner.restart = superseded  # type: ignore[method-assign]
    with pytest.raises(Superseded):
        await lossy.attempt()
    assert sorted(lossy.rows.rows) == [1, 2, 3, 4]
    assert lossy.journal("rollback") == []


@pytest.mark.parametrize("state", ["pause", "cancel"])
async def test_an_order_that_comes_while_the_learner_is_restarted_is_obeyed(tmp_path: Path, state: str) -> None:
    lossy = bench(tmp_path, job(steps=6), ("train", 3))
    restart = lossy.learner.restart

    async def ordered() -> None:
        lossy.orders.receive(Orders(**orders(state=state)))
        await restart()

    lossy.learner.restart = ordered  # type: ignore[method-assign]
    outcome = await lossy.attempt()
    assert (outcome.ending, outcome.steps) == (("paused", 3) if state == "pause" else ("cancelled", 2))


async def test_random_losses_leave_an_exact_ledger(tmp_path: Path) -> None:
    """Losses at random verbs, over attempts that somebody resumes; every prompt is accounted for at the end."""
    chance = random.Random(11)
    spec = job(steps=14, rollout__max_staleness=2, checkpoint={"every": 3, "min_free_gb": 0})
    whole = bench(tmp_path / "whole", spec, verifiers=FakeVerifiers(errors={"5": 4, "17": 3}))
    await whole.attempt()
    verbs = ["train", "publish", "save", "load"]
    dies = [(chance.choice(verbs), chance.randint(1, 14)) for _ in range(40)]
    lossy = bench(tmp_path / "lossy", spec, verifiers=FakeVerifiers(errors={"5": 4, "17": 3}))
    for attempt in range(1, 60):
        lossy = lossy.next_life()
        lossy.learner.dies = dies
        try:
            await lossy.attempt(attempt)
        except TrainingFailed:
            *_, newest = (line["seq"] for line in read_journal(lossy.run_dir / "journal.jsonl") if "seq" in line)
            end = {"time": 0, "attempt": attempt, "seq": newest + 1, "kind": "transition", "state": "failed"}
            with (lossy.run_dir / "journal.jsonl").open("a") as file:
                file.write(json.dumps(end | {"reason": "lost too often"}, separators=(",", ":")) + "\n")
            continue
        break
    assert lossy.learner.trained == whole.learner.trained
    records = lossy.journal("rollback", "consumed", "dropped")
    assert len([record for record in records if record["kind"] == "rollback"]) > 5
    assert surviving(records) == surviving(whole.journal("consumed", "dropped"))


async def test_what_was_outstanding_comes_back_though_less_is_allowed_by_now(tmp_path: Path) -> None:
    spec = job(steps=8, rollout__max_staleness=2, checkpoint={"every": 3, "min_free_gb": 0}, guard={"max_age": 0.1})
    lossy = bench(tmp_path, spec, ("train", 6))
    outcome = await lossy.attempt()
    assert (outcome.steps, lossy.rows.rows[5]["rollout/ahead"]) == (8, 1), "throttled when the learner was lost"
    consumed, _ = surviving(lossy.journal("rollback", "consumed", "dropped"))
    assert consumed == [f"t:{i}:0" for i in range(32)]


def test_metrics_and_tensorboard_go_back_with_the_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(job(), tmp_path, 0, print)
    for step in (1, 2, 3):
        for tracker in trackers:
            tracker.log(step, {"loss": float(step)})
    for tracker in trackers:
        tracker.rewind(1)
        tracker.log(2, {"loss": 20.0})
        tracker.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 20.0}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
