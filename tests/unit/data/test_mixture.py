"""Which source comes next, and which of its rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_ray.data.mixture import epoch_order, next_source


def _takes(weights: list[float], takes: int) -> list[int]:
    taken = [0] * len(weights)
    for _ in range(takes):
        taken[next_source(weights, taken)] += 1
    return taken


def test_weights_1_2_5_give_1250_2500_6250_of_10000_takes() -> None:
    assert _takes([1, 2, 5], 10_000) == [1250, 2500, 6250]


def test_weights_are_relative() -> None:
    assert _takes([0.3, 0.1], 10_000) == [7500, 2500]


def test_equal_weights_alternate() -> None:
    taken = [0, 0]
    order = []
    for _ in range(6):
        order.append(next_source([1, 1], taken))
        taken[order[-1]] += 1
    assert order == [0, 1, 0, 1, 0, 1]


@settings(max_examples=30)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 400))
def test_no_source_is_ever_more_than_its_number_of_rivals_off_its_share(weights: list[float], takes: int) -> None:
    shares = np.asarray(weights) / sum(weights) * takes
    assert np.abs(np.asarray(_takes(weights, takes)) - shares).max() <= max(1, len(weights) - 1)


def test_an_epoch_holds_every_row_once() -> None:
    assert sorted(epoch_order(0, "a", 0, 1000).tolist()) == list(range(1000))


@pytest.mark.parametrize("other", [(1, "a", 0), (0, "b", 0), (0, "a", 1)])
def test_the_order_is_another_for_another_seed_source_or_epoch(other: tuple[int, str, int]) -> None:
    agreeing = (epoch_order(0, "a", 0, 1000) == epoch_order(*other, 1000)).sum()
    assert agreeing < 10  # one on average by chance


def test_the_order_is_the_same_for_ever() -> None:
    assert epoch_order(7, "gsm8k", 3, 8).tolist() == [6, 1, 7, 3, 4, 2, 5, 0]
