"""How a step's samples are divided."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ConfigError
from sapo_ray.learner.batching import StepPlan, plan_step
from sapo_ray.types import PolicyVersion, TrainSample, VersionSpan


def job(*, ranks: int = 1, mini_batches: int = 1, epochs: int = 1, budget: int = 64, seed: int = 0) -> JobSpec:
    return JobSpec.model_validate(
        {
            "steps": 10,
            "seed": seed,
            "model": {"path": "m"},
            "data": {"train": [{"path": "d"}], "max_prompt_tokens": 16},
            "rollout": {"max_new_tokens": 16, "prompts_per_step": 64},
            "learner": {
                "ranks": ranks,
                "mini_batches": mini_batches,
                "epochs": epochs,
                "tokens_per_micro_batch": budget,
            },
        }
    )


def sample(group: str, index: int, *, prompt: int = 4, tokens: int = 8, masked: bool = False) -> TrainSample:
    return TrainSample(
        group_id=group,
        sample_index=index,
        prompt_tokens=prompt,
        tokens=tokens,
        reward=1.0,
        advantage=0.5,
        truncated=False,
        masked=masked,
        spans=(VersionSpan(version=PolicyVersion(1, 3), start=0, end=tokens),),
        payload=None,
    )


def rows_of(plan: StepPlan, rank: int) -> list[list[list[tuple[str, int]]]]:
    """ids by mini-batch and micro-batch"""
    return [[[row.id for row in micro] for micro in mini] for mini in plan.ranks[rank].mini_batches]


def everything(plan: StepPlan) -> list[tuple[str, int]]:
    return [row.id for rank in plan.ranks for mini in rank.mini_batches for micro in mini for row in micro]


@st.composite
def batches(draw: st.DrawFn) -> list[TrainSample]:
    groups = draw(st.integers(1, 6))
    return [
        sample(f"g{g}", i, prompt=draw(st.integers(1, 16)), tokens=draw(st.integers(1, 16)))
        for g in range(groups)
        for i in range(draw(st.integers(1, 5)))
    ]


@settings(max_examples=60)
@given(batches(), st.integers(1, 4), st.integers(1, 5), st.integers(32, 200), st.randoms())
def test_every_sample_sits_in_exactly_one_place_however_the_step_is_divided(
    samples: list[TrainSample], ranks: int, mini_batches: int, budget: int, chance: random.Random
) -> None:
    spec = job(ranks=ranks, mini_batches=mini_batches, budget=budget)
    plan = plan_step(samples, spec, 7)
    wanted = sorted((s.group_id, s.sample_index) for s in samples)
    assert sorted(everything(plan)) == wanted
    assert sorted(id for members in plan.members for id in members) == wanted
    for number, members in enumerate(plan.members):
        on_ranks = [row.id for rank in plan.ranks for micro in rank.mini_batches[number] for row in micro]
        assert sorted(on_ranks) == sorted(members)
    for rank in plan.ranks:
        seated = [(samples[i].group_id, samples[i].sample_index) for i in rank.samples]
        rows = [row for mini in rank.mini_batches for micro in mini for row in micro]
        assert [seated[row.slot] for row in rows] == [row.id for row in rows]
        for mini in rank.mini_batches:
            assert all(len(micro) * max((r.length for r in micro), default=0) <= budget for micro in mini)
    counts = {tuple(len(mini) for mini in rank.mini_batches) for rank in plan.ranks}
    assert len(counts) == 1, "every micro-batch is a collective: all ranks need the same number"
    # Arrival order is irrelevant.
    again = samples.copy()
    chance.shuffle(again)
    other = plan_step(again, spec, 7)
    assert [rows_of(other, rank) for rank in range(ranks)] == [rows_of(plan, rank) for rank in range(ranks)]


def test_groups_are_never_divided_between_mini_batches() -> None:
    samples = [sample(f"g{g}", i) for g in range(8) for i in range(4)]
    plan = plan_step(samples, job(mini_batches=4), 0)
    assert [len(members) for members in plan.members] == [8, 8, 8, 8]
    groups = [{id[0] for id in members} for members in plan.members]
    assert all(len(part) == 2 for part in groups)
    assert len(set.union(*groups)) == 8


def test_with_dropped_groups_sizes_differ_by_one_group_and_no_mini_batch_is_empty() -> None:
    five = [sample(f"g{g}", i) for g in range(5) for i in range(2)]
    assert [len(members) for members in plan_step(five, job(mini_batches=4), 0).members] == [4, 2, 2, 2]
    two = [sample(f"g{g}", i) for g in range(2) for i in range(2)]
    plan = plan_step(two, job(mini_batches=4), 0)
    assert [len(members) for members in plan.members] == [2, 2]
    assert plan.updates == (0, 1)


def test_epochs_visit_the_same_mini_batches_in_new_orders() -> None:
    samples = [sample(f"g{g}", 0) for g in range(8)]
    plan = plan_step(samples, job(mini_batches=8, epochs=4), 3)
    epochs = [plan.updates[start : start + 8] for start in range(0, 32, 8)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 4
    assert len(set(epochs)) == 4


def test_steps_and_seeds_shuffle_groups_differently() -> None:
    samples = [sample(f"g{g}", 0) for g in range(16)]

    def membership(seed: int, step: int) -> Sequence[object]:
        return plan_step(samples, job(mini_batches=4, seed=seed), step).members

    assert membership(0, 0) == membership(0, 0)
    assert len({tuple(membership(seed, step)) for seed in range(3) for step in range(3)}) == 9


def test_ranks_share_tokens_evenly() -> None:
    samples = [sample("g", i, prompt=1, tokens=n) for i, n in enumerate([15, 9, 7, 5, 3, 3])]
    plan = plan_step(samples, job(ranks=2), 0)
    loads = [sum(row.length for mini in rank.mini_batches for micro in mini for row in micro) for rank in plan.ranks]
    assert sum(loads) == 48
    assert abs(loads[0] - loads[1]) <= 4, "no more than the shortest sample"


def test_a_rank_with_less_work_gets_padding_micro_batches() -> None:
    plan = plan_step([sample("g", i) for i in range(3)], job(ranks=2, budget=32), 0)
    shapes = [[len(micro) for micro in rank.mini_batches[0]] for rank in plan.ranks]
    assert shapes == [[2], [1]]
    alone = plan_step([sample("g", 0)], job(ranks=2, budget=32), 0)
    assert [[len(micro) for micro in rank.mini_batches[0]] for rank in alone.ranks] == [[1], [0]]


def test_rows_are_packed_by_padded_size_not_by_their_tokens() -> None:
    lengths = [20, 20, 4, 4, 4]
    samples = [sample("g", i, prompt=4, tokens=n - 4 or 1) for i, n in enumerate(lengths)]
    plan = plan_step(samples, job(budget=40), 0)
    widths = [[row.length for row in micro] for micro in plan.ranks[0].mini_batches[0]]
    assert widths == [[20, 20], [5, 5, 5]]


def test_loss_weights_count_every_completion_of_the_mini_batch_masked_ones_too() -> None:
    samples = [sample("a", 0, tokens=2), sample("a", 1, tokens=4, masked=True), sample("b", 0, tokens=5)]
    plan = plan_step(samples, job(ranks=2), 0)
    weights = {
        row.id: row.weight for rank in plan.ranks for mini in rank.mini_batches for micro in mini for row in micro
    }
    assert weights == {("a", 0): 1 / (2 * 3), ("a", 1): 0.0, ("b", 0): 1 / (5 * 3)}


def test_the_age_of_tokens_counts_publishes_since_they_were_sampled() -> None:
    plan = plan_step([sample("a", 0, tokens=5)], job(), 0, version=5)
    assert plan.ranks[0].mini_batches[0][0][0].ages == ((0, 5, 2),)


def test_a_sample_over_the_budget_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"learner.tokens_per_micro_batch must be >= 50.*got 32"):
        plan_step([sample("g", 0, prompt=25, tokens=25)], job(budget=32), 0)


def test_a_step_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        plan_step([], job(), 0)
