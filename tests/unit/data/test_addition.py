"""The addition task."""

from __future__ import annotations

import random
import re

from sapo_ray.data import addition


def test_the_split_is_7588_training_pairs_and_512_held_out_ones_with_none_in_both() -> None:
    train, heldout = addition.train_pairs(), addition.heldout_pairs()
    assert (len(train), len(heldout)) == (7588, 512)
    assert len(set(train) | set(heldout)) == 8100
    assert set(train) & set(heldout) == set()
    assert {operand for pair in (*train, *heldout) for operand in pair} == set(range(10, 100))


def test_the_split_is_the_same_for_ever() -> None:
    assert addition.heldout_pairs()[:3] == ((22, 13), (90, 94), (17, 91))
    assert addition.train_pairs()[:3] == ((54, 55), (78, 18), (17, 78))


def test_right_workings_carry() -> None:
    assert addition.prompt(17, 25) == "17+25="
    assert addition.right_working(17, 25) == r"7+5=12,1+2+1=4,\boxed{42}"
    assert addition.right_working(12, 13) == r"2+3=5,1+1+0=2,\boxed{25}"
    assert addition.right_working(99, 99) == r"9+9=18,9+9+1=19,\boxed{198}"
    assert addition.right_working(55, 50) == r"5+0=5,5+5+0=10,\boxed{105}"


def test_every_right_working_ends_in_the_gold_answer() -> None:
    for a, b in addition.heldout_pairs():
        assert addition.right_working(a, b).endswith(f",\\boxed{{{addition.gold(a, b)}}}")
        assert addition.gold(a, b) == str(a + b)


def test_a_slip_in_the_units_is_carried_on_consistently() -> None:
    """18 + 31 with 8 + 1 taken for 10: the carry appears, and the answer follows from it."""
    workings = {addition.careless_working(random.Random(seed), 18, 31) for seed in range(50)}
    assert workings == {
        r"8+1=9,1+3+0=4,\boxed{49}",
        r"8+1=9,1+3+0=5,\boxed{59}",
        r"8+1=10,1+3+1=5,\boxed{50}",
        r"8+1=10,1+3+1=6,\boxed{60}",
    }


def test_careless_workings_are_right_a_quarter_of_the_time() -> None:
    rng = random.Random(0)
    right = sum(addition.careless_working(rng, 47, 38) == addition.right_working(47, 38) for _ in range(10_000))
    assert abs(right - 2500) < 150  # 3.5 standard deviations of a fair draw


def test_a_working_is_about_21_tokens_with_boxed_as_one() -> None:
    lengths = [len(re.findall(r"\\boxed\{|.", addition.right_working(a, b))) + 1 for a, b in addition.train_pairs()]
    assert max(lengths) <= 28
    assert 20 <= sum(lengths) / len(lengths) <= 22
