from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import FakeRollouts, FakeVerifiers, job

from sapo_ray.driver.collector import Collector
from sapo_ray.driver.evaluation import accuracy, evaluate, read_evaluation, wilson
from sapo_ray.driver.journal import Journal
from sapo_ray.types import Grading, PolicyVersion, Prompt, Verdict

C, W, E = Verdict.CORRECT, Verdict.WRONG, Verdict.ERROR


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Reference: scipy.stats.binomtest(k, n).proportion_ci(method="wilson").
    [(0, 10, 0.0, 0.277533), (5, 10, 0.236593, 0.763407), (490, 512, 0.935800, 0.971455), (10, 10, 0.722467, 1.0)],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-6)


def test_errors_are_in_no_number_but_their_own_count() -> None:
    result = accuracy([[C], [E], [W], [C]])
    assert (result.mean, result.prompts, result.completions, result.errors) == (pytest.approx(2 / 3), 3, 3, 1)


def test_completions_of_one_prompt_are_not_independent_draws() -> None:
    """Ten prompts that are all right or all wrong, eight samples each: as uncertain as ten draws, not as eighty."""
    result = accuracy([[C] * 8] * 5 + [[W] * 8] * 5)
    assert result.mean == 0.5
    assert result.high - result.low == pytest.approx(2 * 1.959964 * (2.5 / 9 / 10) ** 0.5, rel=1e-6)


def test_nothing_gradable_is_no_accuracy_and_says_so() -> None:
    result = accuracy([[E], [E]])
    assert (result.prompts, result.errors, result.low, result.high) == (0, 2, 0.0, 1.0)


async def test_each_prompt_that_is_done_is_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", 1)
    collector = Collector(job(), FakeRollouts(version=PolicyVersion(1, 0)), FakeVerifiers(), journal)
    prompts = [Prompt(id=f"e:{i}:0", index=i, source="e", text="", token_ids=(1,), gold="0") for i in range(3)]
    told: list[tuple[str, int]] = []
    found = await evaluate(
        collector, prompts, job(), step=0, version="1.0", sampled=True, on_group=lambda kind, n: told.append((kind, n))
    )
    journal.close()
    assert told == [(kind, n) for kind in ("greedy", "sampled") for n in (1, 2, 3)]
    assert (found.greedy.prompts, found.sampled and found.sampled.prompts) == (3, 3)


class Failing(FakeVerifiers):
    """Every grading ends with the same reason and no verdict."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    async def grade(self, prompt: str, gold: str, payloads: list[Any]) -> list[Grading]:
        return [Grading(verdict=Verdict.ERROR, reward=None, reason=self.reason) for _ in payloads]


@pytest.mark.parametrize(
    ("reason", "completions", "errors", "unverifiable"),
    [
        ("crash", 0, 4, 0),  # the reward function raised: says nothing about the answer
        ("reward_type", 0, 4, 0),
        ("gold_unparseable", 0, 4, 0),
        ("died", 4, 0, 4),  # the completion ended the grading process
        ("timeout", 4, 0, 4),
        ("too_long", 4, 0, 4),
    ],
)
async def test_only_what_is_the_completions_own_doing_counts_as_wrong_and_is_counted(
    tmp_path: Path, reason: str, completions: int, errors: int, unverifiable: int
) -> None:
    journal = Journal(tmp_path / "journal.jsonl", 1)
    collector = Collector(job(), FakeRollouts(version=PolicyVersion(1, 0)), Failing(reason), journal)
    prompts = [Prompt(id=f"e:{i}:0", index=i, source="e", text="", token_ids=(1,), gold="0") for i in range(4)]
    found = await evaluate(collector, prompts, job(), step=0, version="1.0", sampled=False)
    journal.close()
    assert (found.greedy.completions, found.greedy.errors, found.greedy.unverifiable) == (
        completions,
        errors,
        unverifiable,
    )
    assert found.greedy.mean == 0.0
    assert read_evaluation(found.as_dict()) == found
