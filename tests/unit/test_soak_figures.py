"""What the soak makes of a journal, on journals small enough to be reckoned by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
try:
    import soak
finally:
    del sys.path[0]

Row = dict[str, Any]


def worker(time: float, what: str, name: str) -> Row:
    return {"time": time, "attempt": 1, "what": what, "worker": name}


EVENTS = [
    worker(0.0, "worker_ready", "rollout-0"),
    worker(0.0, "worker_ready", "rollout-1"),
    worker(1.0, "worker_ready", "rollout-2"),
    worker(10.5, "worker_lost", "rollout-1"),
    worker(12.0, "worker_ready", "rollout-0.1"),
    worker(30.0, "worker_ready", "rollout-1.1"),
]


def step(time: float, seconds: float, tokens: int) -> Row:
    return {"time": time, "attempt": 1, "metrics": {"seconds/step": seconds, "rollout/tokens": float(tokens)}}


def test_full_capacity_is_reached_when_the_dead_worker_s_own_replacement_is_ready() -> None:
    assert soak.capacities([(10.0, "rollout-1"), (29.0, "rollout-2")], EVENTS) == [20.0]


def test_a_loss_is_known_when_the_journal_has_it_and_kills_of_others_have_none() -> None:
    assert soak.notices([(10.0, "rollout", "rollout-1"), (10.0, "grader", "rollout-1")], EVENTS) == [0.5]


def test_only_steps_during_which_nothing_was_killed_and_nobody_came_or_went_are_counted() -> None:
    events = EVENTS[:4]
    steps = [
        step(3.0, 1.0, 90),
        step(6.0, 2.0, 150),  # something was killed in it
        step(10.8, 1.0, 50),  # a worker was lost in it
        step(12.0, 1.0, 60),
        step(13.0, 1.0, 40),
    ]
    assert soak.throughput(steps, events, [(5.0, "grader", "verifier-0/7")]) == {
        3: {"tokens": 90.0, "seconds": 1.0, "steps": 1},
        2: {"tokens": 100.0, "seconds": 2.0, "steps": 2},
    }


def test_memory_is_that_of_the_longest_attempt_without_its_first_minute() -> None:
    short = [(1, float(second), 10**9) for second in range(0, 100, 10)]
    noise = (0.0, 1e6, -1e6, 0.0)
    long = [(2, 1000.0 + 15 * at, int(500e6 + 15e6 * at / 240 * 10 + noise[at % 4])) for at in range(84)]
    slope, error, resident, minutes = soak.memory_slope(short + long)
    assert slope == pytest.approx(150.0, rel=0.1)
    assert 0 < error < 10
    assert resident == pytest.approx(552, abs=2)
    assert minutes == pytest.approx(19.75)
