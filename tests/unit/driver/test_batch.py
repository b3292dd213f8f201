"""What is said of a batch, by numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import job

from sapo_ray.algorithms.settings import resolve
from sapo_ray.driver.batch import batch_metrics, make_batch, stale_by_length
from sapo_ray.driver.collector import GradedCompletion, GradedGroup
from sapo_ray.types import CompletionMeta, Grading, PolicyVersion, Prompt, Verdict, VersionSpan


def group(source: str, row: int, rewards: list[float | None], tokens: int = 4) -> GradedGroup:
    """None is a completion without a verdict; from 0.5 on an answer is correct."""
    completions = []
    for i, reward in enumerate(rewards):
        verdict = Verdict.ERROR if reward is None else Verdict.CORRECT if reward >= 0.5 else Verdict.WRONG
        parts = {} if reward is None else {"answer": reward}
        meta = CompletionMeta(
            group_id=f"{source}:{row}:0",
            sample_index=i,
            prompt_tokens=3,
            tokens=tokens if i == 0 else 1,
            finish_reason="stop",
            spans=(VersionSpan(version=PolicyVersion(1, 0), start=0, end=1),),
            worker="w0",
            seconds=0.1,
        )
        grading = Grading(verdict=verdict, reward=reward, parts=parts)
        completions.append(GradedCompletion(meta=meta, payload=None, grading=grading))
    prompt = Prompt(id=f"{source}:{row}:0", index=row, source=source, text="", token_ids=(1,), gold="")
    return GradedGroup(prompt=prompt, completions=tuple(completions), reissues=0)


def metrics(*groups: GradedGroup) -> dict[str, Any]:
    spec = job()
    batch = make_batch(list(groups), spec, resolve(spec.algorithm, 16, 1.0))
    return batch_metrics(batch, list(groups), spec, 0)


def test_accuracy_is_told_of_each_source_where_there_are_several() -> None:
    told = metrics(group("a", 0, [1, 0, 0, None]), group("b", 0, [1, 1]), group("a", 1, [0, 0, 0]))
    assert {name: value for name, value in told.items() if name.startswith("reward/accuracy")} == {
        "reward/accuracy": 3 / 8,
        "reward/accuracy/a": 1 / 6,
        "reward/accuracy/b": 1.0,
    }
    assert "reward/accuracy/a" not in metrics(group("a", 0, [1, 0]))


def test_rewards_of_any_size_give_finite_metrics() -> None:
    told = metrics(group("a", 0, [1e200, 0.0]))
    assert (told["reward/mean"], told["reward/std"], told["reward/part_answer"]) == (5e199, 5e199, 5e199)


@pytest.mark.parametrize(("tokens", "quarter"), [(1, 1), (4, 1), (5, 2), (8, 2), (12, 3), (13, 4), (16, 4)])
def test_a_stale_group_is_counted_in_the_quarter_of_its_longest_completion(tokens: int, quarter: int) -> None:
    counted = stale_by_length([group("a", 0, [1, 0], tokens)], 16)
    assert counted == {f"drops/stale_length_q{q}": float(q == quarter) for q in (1, 2, 3, 4)}
