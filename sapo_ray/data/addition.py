"""The quickstart task: add two two-digit numbers and show the working.

    prompt    17+25=
    working   7+5=12,1+2+1=4,\\boxed{42}

Units first, then tens plus the carry (written even where it is 0). All 8,100 pairs of operands 10..99 are split once
and for all: 512 are held out and take part in neither warm start nor training.
"""

from __future__ import annotations

import random
from functools import cache

OPERANDS = range(10, 100)
HELD_OUT = 512
SPLIT_SEED = 1234
SLIP = 0.5
"""Probability that a careless worker gets one column sum one too high."""

Pair = tuple[int, int]


@cache
def _split() -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS]
    random.Random(SPLIT_SEED).shuffle(pairs)
    return tuple(pairs[HELD_OUT:]), tuple(pairs[:HELD_OUT])


def train_pairs() -> tuple[Pair, ...]:
    """The 7,588 pairs to train on."""
    return _split()[0]


def heldout_pairs() -> tuple[Pair, ...]:
    """The 512 pairs to evaluate on."""
    return _split()[1]


def prompt(a: int, b: int) -> str:
    """What the model is asked, e.g. `17+25=`; six characters for every pair."""
    return f"{a}+{b}="


def gold(a: int, b: int) -> str:
    """The reference answer, e.g. `42`."""
    return str(a + b)


def right_working(a: int, b: int) -> str:
    """The correct working, e.g. `7+5=12,1+2+1=4,\\boxed{42}`."""
    return _working(a, b, 0, 0)


def careless_working(rng: random.Random, a: int, b: int) -> str:
    """A working in which each column sum is one too high with probability 0.5; the rest follows from it consistently.

    Right a quarter of the time. Learnt from such demonstrations, a model knows the form but not the sums.
    """
    return _working(a, b, int(rng.random() < SLIP), int(rng.random() < SLIP))


def _working(a: int, b: int, units_slip: int, tens_slip: int) -> str:
    units = a % 10 + b % 10 + units_slip
    carry, digit = divmod(units, 10)
    tens = a // 10 + b // 10 + carry + tens_slip
    return f"{a % 10}+{b % 10}={units},{a // 10}+{b // 10}+{carry}={tens},\\boxed{{{tens}{digit}}}"
