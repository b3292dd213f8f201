"""Advantages, length penalty and loss weights, by numbers worked out by hand."""

from __future__ import annotations

import math
import statistics
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.algorithms.advantages import (
    AdvantageKind,
    Aggregation,
    advantages,
    has_signal,
    loss_weights,
    mean_and_std,
    overlong_penalty,
)
from sapo_ray.errors import TrainingFailed

KINDS = get_args(AdvantageKind)
# Mean 0.25, squared deviations .5625 + 3 x .0625 = 0.75, unbiased std sqrt(0.75 / 3) = 0.5.
ONE_OF_FOUR = [1.0, 0.0, 0.0, 0.0]


def test_group_std_divides_by_the_unbiased_deviation() -> None:
    got = advantages("group_std", [ONE_OF_FOUR])[0]
    assert got == pytest.approx([0.75 / 0.500001, *[-0.25 / 0.500001] * 3], rel=1e-14)


def test_group_mean_only_takes_the_mean_away() -> None:
    assert advantages("group_mean", [ONE_OF_FOUR])[0] == [0.75, -0.25, -0.25, -0.25]


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    assert advantages("rloo", [[3.0, 0.0, 1.0, 2.0]])[0] == pytest.approx([3 - 1, 0 - 2, 1 - 5 / 3, 2 - 4 / 3])


def test_batch_std_scales_all_groups_alike() -> None:
    # All six rewards: mean 0.5, six deviations of 0.5, unbiased std sqrt(1.5 / 5) = 0.5477226.
    got = advantages("batch_std", [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    scale = 0.5 / (math.sqrt(0.3) + 1e-6)
    assert got == [pytest.approx([scale, -scale]), [0.0, 0.0], [0.0, 0.0]]


@given(st.sampled_from(KINDS), st.floats(-1e6, 1e6), st.integers(1, 9))
def test_equal_rewards_give_exactly_0(kind: AdvantageKind, reward: float, size: int) -> None:
    assert advantages(kind, [[reward] * size, [0.0, 1.0]])[0] == [0.0] * size


def test_equal_rewards_whose_mean_rounds_away_from_them_give_exactly_0() -> None:
    rewards = [0.1] * 3
    assert sum(rewards) / 3 != 0.1
    for kind in KINDS:
        assert advantages(kind, [rewards]) == [[0.0, 0.0, 0.0]]
    assert not has_signal(rewards)


def test_a_group_of_one_carries_no_signal() -> None:
    for kind in KINDS:
        assert advantages(kind, [[1.0], [1.0, 0.0]])[0] == [0.0]
    assert not has_signal([1.0])
    assert not has_signal([])


@given(st.sampled_from(KINDS), st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=2, max_size=16))
def test_advantages_of_a_group_sum_to_0_and_keep_the_order_of_rewards(
    kind: AdvantageKind, rewards: list[float]
) -> None:
    got = advantages(kind, [rewards])[0]
    assert math.fsum(got) == pytest.approx(0, abs=1e-9)
    for reward, advantage in zip(rewards, got, strict=True):
        for other, other_advantage in zip(rewards, got, strict=True):
            assert (reward > other) == (advantage > other_advantage)


@pytest.mark.parametrize("size", [1e99, 1e160, 1e200, 1.7e308])
def test_huge_rewards_give_the_advantages_of_the_same_rewards_made_small(size: float) -> None:
    """(R - mean) / std does not depend on the unit of R; at these sizes the 1e-6 beside the std is nothing."""
    unit = [[0.75 * 2, -0.25 * 2, -0.25 * 2, -0.25 * 2]]
    for kind in ("group_std", "batch_std"):
        assert advantages(kind, [[size, 0.0, 0.0, 0.0]]) == [pytest.approx(unit[0], rel=1e-12)]
        got = advantages(kind, [[size, -size]])[0]
        assert got == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], rel=1e-12)


@pytest.mark.parametrize("kind", ["group_mean", "rloo"])
def test_advantages_beyond_float32_are_an_error_that_names_the_way_out(kind: AdvantageKind) -> None:
    assert advantages(kind, [[1e6, 0.0]])[0][0] == {"group_mean": 5e5, "rloo": 1e6}[kind]
    for size in (1e50, 1e200, 1.7e308):
        with pytest.raises(TrainingFailed, match=rf"advantages beyond float32 with algorithm.advantage: {kind}; bound"):
            advantages(kind, [[size, -size]])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_mean_and_std_are_those_of_statistics(values: list[float]) -> None:
    mean, std = mean_and_std(values)
    assert mean == pytest.approx(statistics.fmean(values), rel=1e-12, abs=1e-9)
    assert std == pytest.approx(statistics.pstdev(values), rel=1e-6, abs=1e-6)


def test_mean_and_std_of_huge_values_are_finite() -> None:
    assert mean_and_std([1.7e308, 1.7e308, -1.7e308, -1.7e308]) == (0.0, 1.7e308)
    assert mean_and_std([1e200, 0.0]) == (5e199, 5e199)


def test_an_unknown_advantage_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="got 'gae'"):
        advantages("gae", [[0.0, 1.0]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (130, -1.0)]
)
def test_the_overlong_penalty_falls_linearly_over_the_buffer(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, max_new_tokens=100, buffer=20) == pytest.approx(penalty)


def test_no_buffer_means_no_penalty() -> None:
    assert overlong_penalty(100, max_new_tokens=100, buffer=0) == 0.0


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("sequence_mean", [1 / 8, 1 / 40, 0.0, 1 / 4]), ("token_mean", [1 / 20, 1 / 20, 0.0, 1 / 20])],
)
def test_masked_completions_weigh_0_and_stay_in_the_denominator(
    aggregation: Aggregation, expected: list[float]
) -> None:
    got = loss_weights(aggregation, [2, 10, 7, 1], [False, False, True, False], max_new_tokens=50)
    assert got == pytest.approx(expected)


def test_constant_aggregation_knows_no_length() -> None:
    got = loss_weights("constant", [2, 10, 7, 1], [False, False, True, False], max_new_tokens=50)
    assert got == pytest.approx([1 / 200, 1 / 200, 0.0, 1 / 200])


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20))
def test_means_weigh_all_tokens_together_1(tokens: list[int]) -> None:
    kinds: tuple[Aggregation, ...] = ("sequence_mean", "token_mean")
    for kind in kinds:
        weights = loss_weights(kind, tokens, [False] * len(tokens), max_new_tokens=500)
        assert math.fsum(w * n for w, n in zip(weights, tokens, strict=True)) == pytest.approx(1)
