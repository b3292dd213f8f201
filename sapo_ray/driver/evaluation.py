"""Held-out accuracy, always with its uncertainty."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import sqrt
from typing import Any

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.batch import UNVERIFIABLE
from sapo_ray.driver.collector import Collector, GradedCompletion, GradedGroup
from sapo_ray.types import Prompt, Verdict

Z95 = 1.959964


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Share of correct answers among those that could be graded, with a 95% interval."""

    mean: float
    low: float
    high: float
    prompts: int
    completions: int
    errors: int
    """Completions without a verdict; they are in no other number here."""
    unverifiable: int = 0
    """Completions counted as wrong because they could not be graded by their own doing: too slow, too long, or they
    ended the grading process."""

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One evaluation, wholly under one version of the policy."""

    step: int
    version: str
    greedy: Accuracy
    sampled: Accuracy | None
    by_source: dict[str, dict[str, Accuracy]]
    """`greedy` and `sampled` of each source by itself, where there are several."""
    settings: str = ""
    """Of `evaluation_settings`; empty in checkpoints of before there was such a thing."""

    def compares_with(self, settings: str) -> bool:
        """Whether an evaluation under `settings` measures the same."""
        return self.settings in ("", settings)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """`evaluation/greedy`, `_low`, `_high`, the same for sampled, `unverifiable`, and the means of each source."""
        named = {"greedy": self.greedy} | ({} if self.sampled is None else {"sampled": self.sampled})
        values: dict[str, float] = {}
        for kind, one in named.items():
            values |= {f"evaluation/{kind}": one.mean}
            values |= {f"evaluation/{kind}_low": one.low, f"evaluation/{kind}_high": one.high}
        values["evaluation/unverifiable"] = float(sum(one.unverifiable for one in named.values()))
        for source, kinds in self.by_source.items():
            values |= {f"evaluation/{source}/{kind}": one.mean for kind, one in kinds.items()}
        return values


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    p = correct / total
    centre = (p + Z95**2 / (2 * total)) / (1 + Z95**2 / total)
    half = Z95 / (1 + Z95**2 / total) * sqrt(p * (1 - p) / total + Z95**2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy(verdicts: list[list[Verdict]], unverifiable: int = 0) -> Accuracy:
    """Accuracy over prompts, each with the verdicts of its completions.

    One completion per prompt: Wilson's interval. Several: completions of one prompt are not independent, so the
    interval is that of the mean over prompts of each prompt's own accuracy (normal approximation; Wilson's over the
    prompts where all agree and a variance of 0 would say nothing).
    """
    decided = [[v for v in group if v is not Verdict.ERROR] for group in verdicts]
    rates = [sum(v is Verdict.CORRECT for v in group) / len(group) for group in decided if group]
    completions = sum(len(group) for group in decided)
    errors = sum(len(group) for group in verdicts) - completions
    n = len(rates)
    mean = sum(rates) / n if n else 0.0
    variance = sum((rate - mean) ** 2 for rate in rates) / (n - 1) if n > 1 else 0.0
    if completions == n or variance == 0:
        low, high = wilson(round(sum(rates)), n)
    else:
        half = Z95 * sqrt(variance / n)
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    return Accuracy(
        mean=mean, low=low, high=high, prompts=n, completions=completions, errors=errors, unverifiable=unverifiable
    )


async def evaluate(
    collector: Collector,
    prompts: list[Prompt],
    spec: JobSpec,
    *,
    step: int,
    version: str,
    sampled: bool,
    on_group: Callable[[str, int], None] = lambda kind, done: None,
) -> Evaluation:
    """Greedy accuracy on `prompts`, and sampled accuracy if asked for. Seeds are fixed, so evaluations compare.

    `on_group` is told `greedy` or `sampled` and the number of prompts done, after each prompt.
    """
    settings = spec.evaluation
    max_new_tokens = settings.max_new_tokens or spec.rollout.max_new_tokens

    async def measure(kind: str, samples: int, temperature: float) -> tuple[Accuracy, dict[str, Accuracy]]:
        done = 0

        async def one(prompt: Prompt) -> GradedGroup:
            nonlocal done
            group = await collector.collect(
                prompt,
                samples=samples,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                stream="evaluation/",
            )
            done += 1
            on_group(kind, done)
            return group

        groups = await asyncio.gather(*(one(prompt) for prompt in prompts))
        sources: dict[str, list[GradedGroup]] = {}
        for group in groups:
            sources.setdefault(group.prompt.source, []).append(group)
        return _accuracy_of(groups, samples), {name: _accuracy_of(own, samples) for name, own in sources.items()}

    overall, sources = {}, {}
    overall["greedy"], sources["greedy"] = await measure("greedy", 1, 0.0)
    if sampled and settings.samples:
        overall["sampled"], sources["sampled"] = await measure("sampled", settings.samples, settings.temperature)
    names = list(sources["greedy"])
    return Evaluation(
        step=step,
        version=version,
        greedy=overall["greedy"],
        sampled=overall.get("sampled"),
        by_source={name: {kind: rows[name] for kind, rows in sources.items()} for name in names}
        if len(names) > 1
        else {},
        settings=evaluation_settings(spec),
    )


def evaluation_settings(spec: JobSpec) -> str:
    """16 hex digits over what decides an accuracy beside the weights: sources, prompts, sampling."""
    decide = spec.evaluation.model_dump(mode="json", exclude={"every"})
    decide["max_new_tokens"] = spec.evaluation.max_new_tokens or spec.rollout.max_new_tokens
    return blake2b(json.dumps(decide, sort_keys=True).encode(), digest_size=8).hexdigest()


def read_evaluation(values: dict[str, Any]) -> Evaluation:
    """Back from `as_dict`."""
    return Evaluation(
        step=values["step"],
        version=values["version"],
        greedy=Accuracy(**values["greedy"]),
        sampled=None if values["sampled"] is None else Accuracy(**values["sampled"]),
        by_source={
            name: {kind: Accuracy(**one) for kind, one in kinds.items()} for name, kinds in values["by_source"].items()
        },
        settings=values.get("settings", ""),
    )


def _accuracy_of(groups: list[GradedGroup], samples: int) -> Accuracy:
    unverifiable = sum(_unverifiable(completion) for group in groups for completion in group.completions)
    return accuracy([_verdicts(group, samples) for group in groups], unverifiable)


def _unverifiable(completion: GradedCompletion) -> bool:
    """An answer that cannot be graded by its own doing was not a right one: leaving it out would flatter."""
    return completion.grading.reason in UNVERIFIABLE


def _verdicts(group: GradedGroup, samples: int) -> list[Verdict]:
    if group.failed is not None:
        return [Verdict.ERROR] * samples
    return [
        Verdict.WRONG if _unverifiable(completion) else completion.grading.verdict for completion in group.completions
    ]
