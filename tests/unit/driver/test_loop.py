"""The loop with fake pools: order, ages, drops, re-issues, bounds and resumption."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from fakes import Bench, FakeLearner, FakePrompts, FakeRollouts, FakeVerifiers, job

from sapo_ray.errors import CheckpointError, DeadlineExceeded, TrainingFailed, WorkerLost
from sapo_ray.types import Prompt


def groups_of(batch: list[tuple[str, int, float]]) -> list[str]:
    return list(dict.fromkeys(group for group, _, _ in batch))


async def test_batches_follow_the_order_of_issue_whatever_the_order_of_arrival(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job())
    await bench.attempt()
    assert [groups_of(batch) for batch in bench.learner.trained] == [
        ["t:0:0", "t:1:0", "t:2:0", "t:3:0"],
        ["t:4:0", "t:5:0", "t:6:0", "t:7:0"],
        ["t:8:0", "t:9:0", "t:10:0", "t:11:0"],
    ]


async def test_synchronous_training_is_on_policy_and_generates_nothing_while_the_learner_works(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job(), learner=FakeLearner(seconds=0.02))
    await bench.attempt()
    assert set(bench.learner.ages) == {0}
    assert bench.rollouts.overlap == 0


async def test_overlapped_training_generates_while_the_learner_works_within_the_bound(tmp_path: Path) -> None:
    spec = job(steps=6, rollout__max_staleness=2, checkpoint={"every": 0, "min_free_gb": 0})
    bench = Bench(tmp_path, spec, rollouts=FakeRollouts(slowness=0.05), learner=FakeLearner(seconds=0.05))
    await bench.attempt()
    assert max(bench.learner.ages) == 2
    assert bench.rollouts.overlap > 0
    assert bench.prompts.taken == 24, "no prompt is issued beyond what the steps need"


async def test_a_dead_worker_costs_only_what_it_had_not_delivered(tmp_path: Path) -> None:
    undisturbed = Bench(tmp_path / "a", job())
    disturbed = Bench(tmp_path / "b", job(), rollouts=FakeRollouts(die={"t:5:0": [2]}))
    for bench in (undisturbed, disturbed):
        bench.run_dir.mkdir()
        await bench.attempt()
    assert disturbed.learner.trained == undisturbed.learner.trained
    asked = [[s.index for s in r.samples] for r in disturbed.rollouts.requests if r.group_id == "t:5:0"]
    assert asked == [[0, 1, 2, 3], [2, 3]]


async def test_a_prompt_that_kills_three_workers_is_quarantined_and_replaced(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job(), rollouts=FakeRollouts(die={"t:1:0": [0, 1, 0]}))
    await bench.attempt()
    assert groups_of(bench.learner.trained[0]) == ["t:0:0", "t:2:0", "t:3:0", "t:4:0"]
    dropped = bench.journal("dropped")
    assert [(record["group"], record["reason"]) for record in dropped] == [("t:1:0", "quarantined")]


async def test_neighbours_of_a_killer_are_repeated_alone_and_none_of_them_is_lost(tmp_path: Path) -> None:
    """All four groups of a worker die together, twice; then only the killer dies again."""
    die = {"t:0:0": [1, 0], "t:1:0": [0, 0, 0], "t:2:0": [2, 1], "t:3:0": [0, 0]}
    bench = Bench(tmp_path, job(), rollouts=FakeRollouts(die=die))
    await bench.attempt()
    assert [record["group"] for record in bench.journal("dropped")] == ["t:1:0"]
    assert groups_of(bench.learner.trained[0]) == ["t:0:0", "t:2:0", "t:3:0", "t:4:0"]


async def test_no_more_groups_are_under_way_than_the_engines_have_room_for(tmp_path: Path) -> None:
    spec = job(rollout={**job().rollout.model_dump(), "max_num_seqs": 4, "prompts_per_step": 8})
    bench = Bench(tmp_path, spec)
    await bench.attempt()
    assert bench.rollouts.most_under_way == 2, "two groups of four: twice the four sequences of the one worker"


async def test_samples_of_a_skipped_update_are_dropped_once_and_not_consumed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job(steps=1), learner=FakeLearner(dropped=(("t:1:0", 2), ("t:1:0", 3))))
    await bench.attempt()
    assert bench.rows.rows[1]["drops/nonfinite"] == 2
    assert [(r["group"], r["i"], r["step"]) for r in bench.journal("dropped")] == [("t:1:0", 2, 1), ("t:1:0", 3, 1)]
    (consumed,) = bench.journal("consumed")
    assert [index for index, _ in consumed["groups"]["t:1:0"]] == [0, 1]


async def test_a_run_without_one_optimizer_update_is_a_failure(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job(), learner=FakeLearner(updates=0))
    with pytest.raises(TrainingFailed, match="no optimizer update was made"):
        await bench.attempt()


async def test_a_changed_job_is_refused_on_resume(tmp_path: Path) -> None:
    first = Bench(tmp_path, job(), learner=FakeLearner(fail_at=3))
    with pytest.raises(WorkerLost):
        await first.attempt(1)
    second = first.next_life(spec=job(seed=1))
    with pytest.raises(CheckpointError, match=r"the job in spec\.json is not the one that wrote step-000002"):
        await second.attempt(2)


async def test_a_stalled_prompt_is_given_up_after_two_deadlines_while_the_others_go_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job(rollout__group_deadline_s=0.1), rollouts=FakeRollouts(hang={"t:2:0"}))
    await bench.attempt()
    assert groups_of(bench.learner.trained[0]) == ["t:0:0", "t:1:0", "t:3:0", "t:4:0"]


async def test_errors_leave_the_statistics_and_too_many_drop_the_group(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job(), verifiers=FakeVerifiers(errors={"0": 2, "1": 3}))
    await bench.attempt()
    first = bench.learner.trained[0]
    assert groups_of(first) == ["t:0:0", "t:2:0", "t:3:0", "t:4:0"]
    assert [index for group, index, _ in first if group == "t:0:0"] == [2, 3]
    assert [(r["group"], r["reason"]) for r in bench.journal("dropped")] == [("t:1:0", "verifier_errors")]
    said = [(r["condition"], round(r["rate"], 3), r.get("cleared", False)) for r in bench.journal("condition")]
    assert said == [("VerifierErrors", 0.25, False), ("VerifierErrors", 0.0, True)]


async def test_dynamic_sampling_replaces_groups_without_signal_within_its_bound(tmp_path: Path) -> None:
    spec = job(steps=1, algorithm={"dynamic_sampling": True, "dynamic_sampling_limit": 3.0})
    bench = Bench(tmp_path, spec, verifiers=FakeVerifiers(equal=True))
    await bench.attempt()
    assert len(bench.journal("issued")) == 12, "3 x 4 groups and not one more"
    assert [r["reason"] for r in bench.journal("dropped")] == ["zero_signal"] * 8
    assert {advantage for _, _, advantage in bench.learner.trained[0]} == {0.0}


async def test_a_run_that_can_use_no_group_fails_and_says_why(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job(), verifiers=FakeVerifiers(errors={str(i): 4 for i in range(100)}))
    with pytest.raises(
        TrainingFailed, match=r"40 groups in a row could not be used: verifier_errors: 40; the last: timeout"
    ):
        await bench.attempt()


async def test_a_verifier_that_never_answers_is_a_named_deadline_not_a_hang(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job(deadlines={"batch_s": 0.2}), verifiers=FakeVerifiers(hang=True))
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.2 s for the next batch of graded groups at step 0; .*t:0:0"):
        await bench.attempt()


async def test_an_evaluation_has_a_bound_of_its_own(tmp_path: Path) -> None:
    held_out = Prompt(id="eval/t:0:0", index=0, source="t", text="", token_ids=(1,), gold="0")
    deadlines = {"batch_s": 60, "evaluation_s": 0.2}
    bench = Bench(tmp_path, job(deadlines=deadlines), verifiers=FakeVerifiers(hang=True), evaluation=[held_out])
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.2 s for the evaluation at step 0"):
        await bench.attempt()


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("dies_at", [1, 2, 4, 5])
async def test_a_resumed_run_trains_on_what_an_uninterrupted_one_does(
    tmp_path: Path, staleness: int, dies_at: int
) -> None:
    spec = job(steps=5, rollout__max_staleness=staleness, checkpoint={"every": 2, "min_free_gb": 0})
    whole = Bench(tmp_path / "whole", spec)
    whole.run_dir.mkdir()
    await whole.attempt()

    first = Bench(tmp_path / "cut", spec, learner=FakeLearner(fail_at=dies_at))
    first.run_dir.mkdir()
    with pytest.raises(WorkerLost):
        await first.attempt(1)
    second = first.next_life()
    await second.attempt(2)
    assert second.learner.trained == whole.learner.trained


async def test_every_prompt_is_consumed_exactly_once_along_the_surviving_lineage(tmp_path: Path) -> None:
    """Ten lives, each ended at a random step; then the ledger alone must account for every prompt."""
    chance = random.Random(7)
    first_life_ends_before_any_checkpoint = 2
    spec = job(steps=12, rollout__max_staleness=2, checkpoint={"every": 3, "min_free_gb": 0})
    bench = Bench(tmp_path, spec, verifiers=FakeVerifiers(errors={"5": 4, "17": 3}))
    for life in range(1, 11):
        bench = bench.next_life()
        bench.learner.fail_at = first_life_ends_before_any_checkpoint if life == 1 else chance.randint(1, 12)
        try:
            await bench.attempt(life)
        except WorkerLost:
            continue
        break
    else:
        bench = bench.next_life()
        await bench.attempt(11)

    surviving: dict[int, list[str]] = {}
    dropped: dict[str, int] = {}
    for record in bench.journal("rollback", "consumed", "dropped"):
        if record["kind"] == "rollback":
            surviving = {step: groups for step, groups in surviving.items() if step <= record["to_step"]}
            dropped = {group: step for group, step in dropped.items() if step <= record["to_step"]}
        elif record["kind"] == "consumed":
            assert record["step"] not in surviving
            surviving[record["step"]] = list(record["groups"])
        else:
            dropped[record["group"]] = record["step"]
    consumed = [group for step in sorted(surviving) for group in surviving[step]]
    assert len(consumed) == len(set(consumed)) == 48
    assert set(dropped) == {"t:5:0", "t:17:0"}
    assert sorted([*consumed, *dropped], key=lambda g: int(g.split(":")[1])) == [f"t:{i}:0" for i in range(50)]


async def test_complete_groups_of_the_checkpoint_are_kept_and_not_sampled_again(tmp_path: Path) -> None:
    spec = job(steps=4, rollout__max_staleness=1)
    first = Bench(tmp_path, spec, learner=FakeLearner(seconds=0.1, fail_at=2))
    with pytest.raises(WorkerLost):
        await first.attempt(1)
    second = first.next_life()
    await second.attempt(2)
    asked = {request.group_id for request in second.rollouts.requests}
    assert asked.isdisjoint({"t:4:0", "t:5:0", "t:6:0", "t:7:0"}), "generated while step 1 was trained, kept by its cut"


async def test_a_changed_data_set_is_refused_on_resume(tmp_path: Path) -> None:
    first = Bench(tmp_path, job(), learner=FakeLearner(fail_at=3))
    with pytest.raises(WorkerLost):
        await first.attempt(1)
    second = first.next_life()
    second.prompts = FakePrompts("data-2")
    with pytest.raises(
        CheckpointError, match=r"the training data changed since this run began: .* data-1, now it is data-2"
    ):
        await second.attempt(2)


async def test_a_superseded_driver_stops_before_it_writes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job(steps=50))

    async def takeover() -> None:
        while not bench.rows.rows:  # noqa: ASYNC110 - the driver has no event for it
            await asyncio.sleep(0.001)
        (tmp_path / "attempt").write_text("2")

    with pytest.raises(TrainingFailed, match=r"attempt 1 of .* was superseded"):
        await asyncio.gather(bench.attempt(1), takeover())
    assert len(bench.journal("consumed")) < 50


async def test_a_driver_superseded_while_its_learner_saves_does_not_move_the_pointer(tmp_path: Path) -> None:
    class SlowToSave(FakeLearner):
        async def save(self, folder: Path) -> None:
            await super().save(folder)
            if self.number == 2:
                (tmp_path / "attempt").write_text("2")

    bench = Bench(tmp_path, job(), learner=SlowToSave())
    with pytest.raises(TrainingFailed, match=r"attempt 1 of .* was superseded"):
        await bench.attempt(1)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000001"


@pytest.mark.parametrize(("changed", "compared"), [({"every": 7}, True), ({"limit": 5}, False)])
async def test_after_is_compared_only_with_a_before_of_the_same_evaluation(
    tmp_path: Path, changed: dict[str, int], compared: bool
) -> None:
    held_out = [Prompt(id="eval/t:0:0", index=0, source="t", text="", token_ids=(1,), gold="0")]
    first = Bench(tmp_path, job(), learner=FakeLearner(fail_at=3), evaluation=held_out)
    with pytest.raises(WorkerLost):
        await first.attempt(1)
    outcome = await first.next_life(spec=job(evaluation=changed)).attempt(2)
    assert outcome.after is not None
    assert (outcome.before is not None) == compared
    told = [r["condition"] for r in first.journal("condition")]
    assert told == ([] if compared else ["NotComparable"])
