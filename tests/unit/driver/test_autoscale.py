"""The autoscale policy on simulated loads: where it comes to rest, and that it does."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest

from sapo_ray.driver.autoscale import Autoscaler, StepLoad

STEPS = 600


@dataclass(frozen=True, kw_only=True)
class Load:
    """Seconds of a step: generation is `floor` (one long completion) and `work` shared by the workers."""

    work: float
    training: float
    floor: float = 0.0
    noise: float = 0.0

    def step(self, workers: int, *, overlapped: bool, rng: random.Random) -> StepLoad:
        def noisy(seconds: float) -> float:
            return seconds * rng.lognormvariate(0.0, self.noise) if self.noise else seconds

        generation, training = noisy(self.floor + self.work / workers), noisy(self.training)
        if not overlapped:
            return StepLoad(seconds=generation + training, waited=generation, busy=generation, ready_batches=0.0)
        seconds = max(generation, training)
        return StepLoad(
            seconds=seconds,
            waited=seconds - training,
            busy=generation,
            ready_batches=1.0 if generation <= training else 0.5,
        )


def simulate(
    loads: Callable[[int], Load],
    *,
    overlapped: bool,
    first: int,
    most: int = 64,
    wait: float | None = None,
    seed: int = 0,
) -> list[int]:
    """Number of workers at each step."""
    rng = random.Random(seed)
    policy = Autoscaler(overlapped=overlapped, wait=wait or (0.1 if overlapped else 0.4), steps=5)
    workers, history = first, []
    for step in range(STEPS):
        history.append(workers)
        policy.observe(loads(step).step(workers, overlapped=overlapped, rng=rng))
        if (decision := policy.decide(workers, 1, most)) is not None:
            assert decision.workers != workers
            assert 1 <= decision.workers <= most
            assert decision.reason
            workers = decision.workers
            policy.changed()
    return history


def turns(history: list[int]) -> int:
    """Changes of direction."""
    moves = [b - a for a, b in pairwise(history) if a != b]
    return sum(a * b < 0 for a, b in pairwise(moves))


@pytest.mark.parametrize("first", [1, 2, 40])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_overlapped_training_comes_to_rest_where_generation_keeps_up_with_the_learner(
    first: int, seed: int, noise: float
) -> None:
    """80 s of work against 10 s of training: eight workers are just enough."""
    history = simulate(lambda _: Load(work=80, training=10, noise=noise), overlapped=True, first=first, seed=seed)
    assert 8 <= history[-1] <= (10 if noise == 0 else 13)
    assert turns(history) <= (0 if noise == 0 else 3)
    settled = next(i for i, n in enumerate(history) if 7 <= n <= 13)
    assert settled <= 60, "steps"


@pytest.mark.parametrize("first", [1, 2, 40])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_synchronous_training_comes_to_rest_where_the_learner_waits_for_the_share_that_is_wanted(
    first: int, seed: int, noise: float
) -> None:
    """With 12 workers generation takes 6.7 s of 16.7: 40%. The band is 20% to 60%: 32 to 6 workers."""
    history = simulate(lambda _: Load(work=80, training=10, noise=noise), overlapped=False, first=first, seed=seed)
    assert 5 <= history[-1] <= 34
    assert turns(history) <= (0 if noise == 0 else 3)
    assert len(set(history[100:])) <= 3, "at rest"


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_load_that_training_bounds_is_left_with_few_workers(overlapped: bool, seed: int) -> None:
    history = simulate(lambda _: Load(work=5, training=60, noise=0.2), overlapped=overlapped, first=16, seed=seed)
    assert history[-1] == 1
    assert turns(history) == 0


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_load_that_generation_bounds_gets_all_workers_that_it_may_have(overlapped: bool) -> None:
    history = simulate(lambda _: Load(work=2000, training=5, noise=0.2), overlapped=overlapped, first=1, most=16)
    assert history[-1] == 16
    assert turns(history) == 0


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_workers_that_do_not_help_are_given_back_and_not_asked_for_again_and_again(overlapped: bool, seed: int) -> None:
    """One completion of 60 s in every group bounds the step, whatever the number of workers."""
    load = Load(work=4, training=10, floor=60, noise=0.1)
    history = simulate(lambda _: load, overlapped=overlapped, first=2, seed=seed)
    assert sum(history[100:]) / len(history[100:]) < 8
    assert turns(history) <= 2 * STEPS / 100


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_load_that_changes_is_followed_both_ways(overlapped: bool) -> None:
    """Completions grow fourfold after a third of the run, and shrink again after two thirds."""

    def loads(step: int) -> Load:
        return Load(work=160 if STEPS / 3 <= step < 2 * STEPS / 3 else 20, training=10, noise=0.1)

    history = simulate(loads, overlapped=overlapped, first=2)
    light, heavy, again = history[STEPS // 3 - 1], history[2 * STEPS // 3 - 1], history[-1]
    assert light <= 4
    assert heavy >= 10
    assert again < heavy / 2 if overlapped else again < heavy
    assert turns(history) <= 4


def test_a_decision_says_why_and_needs_several_steps_of_one_number_of_workers() -> None:
    policy = Autoscaler(overlapped=True, wait=0.1, steps=3)
    waiting = StepLoad(seconds=10.0, waited=5.0, busy=10.0, ready_batches=0.0)
    for _ in range(2):
        policy.observe(waiting)
        assert policy.decide(4, 1, 16) is None
    policy.changed()
    for _ in range(2):
        policy.observe(waiting)
        assert policy.decide(4, 1, 16) is None
    policy.observe(waiting)
    decision = policy.decide(4, 1, 16)
    assert decision is not None
    assert decision.workers == 8, "half of the step was waited for; one tenth is wanted: 4 x 0.9 / 0.5, at most twice"
    assert decision.reason == "the learner waited for completions for 50% of a step, 10% is wanted"


def test_bounds_hold_even_against_what_was_measured() -> None:
    for share, most in ((9.9, 4), (9.9, 5)):
        policy = Autoscaler(overlapped=True, wait=0.1, steps=1)
        policy.observe(StepLoad(seconds=10.0, waited=share, busy=10.0, ready_batches=0.0))
        decision = policy.decide(4, 2, most)
        assert (decision.workers if decision else 4) == most
    policy = Autoscaler(overlapped=True, wait=0.1, steps=1)
    policy.observe(StepLoad(seconds=10.0, waited=0.0, busy=0.1, ready_batches=1.0))
    decision = policy.decide(4, 3, 8)
    assert decision is not None
    assert decision.workers == 3
