"""From graded groups to a training batch: which groups count, and what each completion's advantage is.

Pure functions of graded groups, so that a resumed run decides as the first one did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sapo_ray.algorithms.advantages import advantages, has_signal, mean_and_std, overlong_penalty
from sapo_ray.algorithms.settings import Objective
from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.collector import GradedCompletion, GradedGroup
from sapo_ray.types import DropReason, PolicyVersion, TrainSample, Verdict

UNVERIFIABLE = ("timeout", "too_long", "died")
"""Reasons that are the completion's own doing: errors in the metrics even where `verifier.unverifiable: wrong` gave
them a reward, and wrong answers in an evaluation. A reward function that raises (`crash`) is not among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The groups of one step and their samples."""

    groups: tuple[GradedGroup, ...]
    samples: tuple[TrainSample, ...]

    def advantages_by_group(self, without: set[tuple[str, int]]) -> dict[str, list[tuple[int, float]]]:
        """(sample index, advantage) per group, for the ledger; `without` samples that were dropped after all."""
        rows: dict[str, list[tuple[int, float]]] = {group.prompt.id: [] for group in self.groups}
        for sample in self.samples:
            if (sample.group_id, sample.sample_index) in without:
                continue
            rows[sample.group_id].append((sample.sample_index, round(sample.advantage, 6)))
        return rows


def graded(group: GradedGroup) -> list[GradedCompletion]:
    """Completions with a verdict about the answer; errors say nothing and leave the group's statistics."""
    return [c for c in group.completions if c.grading.verdict is not Verdict.ERROR]


def oldest_version(group: GradedGroup) -> PolicyVersion:
    """Version of the oldest token of a group."""
    return min((completion.meta.oldest for completion in group.completions), key=lambda version: version.order)


def reason_to_drop(group: GradedGroup, spec: JobSpec, learner_number: int) -> DropReason | None:
    """Why a group must not be trained on at all, or None."""
    if group.failed is not None:
        return group.failed
    if len(graded(group)) < max(2, spec.rollout.group_size / 2):
        return DropReason.VERIFIER_ERRORS
    if learner_number - oldest_version(group).number > spec.rollout.max_staleness:
        return DropReason.STALE
    return None


def reward_of(completion: GradedCompletion, spec: JobSpec) -> float:
    """The verifier's reward and the overlong penalty."""
    assert completion.grading.reward is not None
    return completion.grading.reward + overlong_penalty(
        completion.meta.tokens, spec.rollout.max_new_tokens, spec.algorithm.overlong_buffer
    )


def group_rewards(group: GradedGroup, spec: JobSpec) -> list[float]:
    """Rewards of a group's graded completions."""
    return [reward_of(completion, spec) for completion in graded(group)]


def make_batch(groups: list[GradedGroup], spec: JobSpec, objective: Objective) -> Batch:
    """Advantages over each group's graded completions, one TrainSample for each."""
    kept = [graded(group) for group in groups]
    rewards = [group_rewards(group, spec) for group in groups]
    samples = []
    for completions, its_rewards, its_advantages in zip(
        kept, rewards, advantages(objective.advantage, rewards), strict=True
    ):
        for completion, reward, advantage in zip(completions, its_rewards, its_advantages, strict=True):
            meta = completion.meta
            samples.append(
                TrainSample(
                    group_id=meta.group_id,
                    sample_index=meta.sample_index,
                    prompt_tokens=meta.prompt_tokens,
                    tokens=meta.tokens,
                    reward=reward,
                    advantage=advantage,
                    truncated=meta.truncated,
                    masked=spec.algorithm.mask_truncated and meta.truncated,
                    spans=meta.spans,
                    payload=completion.payload,
                )
            )
    return Batch(groups=tuple(groups), samples=tuple(samples))


def batch_metrics(batch: Batch, examined: list[GradedGroup], spec: JobSpec, learner_number: int) -> dict[str, float]:
    """What rewards, lengths, ages and verdicts were like in a batch.

    Verifier errors are counted over all `examined` groups, those that were dropped for them included.
    """
    completions = [completion for group in batch.groups for completion in group.completions]
    gradings = [completion.grading for group in examined for completion in group.completions]
    errors = sum(grading.verdict is Verdict.ERROR or grading.reason in UNVERIFIABLE for grading in gradings)
    verdicts = Counter(completion.grading.verdict for completion in completions)
    decided = verdicts[Verdict.CORRECT] + verdicts[Verdict.WRONG]
    lengths = np.array([completion.meta.tokens for completion in completions])
    reward_mean, reward_std = mean_and_std([sample.reward for sample in batch.samples])
    ages = [learner_number - completion.meta.oldest.number for completion in completions]
    metrics = {
        "reward/mean": reward_mean,
        "reward/std": reward_std,
        "reward/accuracy": verdicts[Verdict.CORRECT] / max(decided, 1),
        "reward/zero_signal_groups": float(sum(not has_signal(group_rewards(group, spec)) for group in batch.groups)),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/truncated": float(np.mean([completion.meta.truncated for completion in completions])),
        "verifier/errors": float(errors),
        "verifier/error_rate": errors / len(gradings),
        "age/sample_max": float(max(ages)),
        "age/sample_mean": float(np.mean(ages)),
        "rollout/reissues": float(sum(group.reissues for group in batch.groups)),
        "rollout/tokens": float(lengths.sum()),
    }
    parts: dict[str, list[float]] = {}
    for completion in completions:
        for name, value in completion.grading.parts.items():
            parts.setdefault(name, []).append(value)
    metrics |= {f"reward/part_{name}": mean_and_std(values)[0] for name, values in parts.items()}
    return metrics | accuracy_by_source(batch)


def accuracy_by_source(batch: Batch) -> dict[str, float]:
    """`reward/accuracy/<source>` of each source that has a verdict, where the batch is of more than one."""
    verdicts: dict[str, list[bool]] = {}
    for group in batch.groups:
        right = verdicts.setdefault(group.prompt.source, [])
        right += [completion.grading.verdict is Verdict.CORRECT for completion in graded(group)]
    if len(verdicts) < 2:
        return {}
    return {f"reward/accuracy/{source}": sum(right) / len(right) for source, right in verdicts.items() if right}


def stale_by_length(dropped: list[GradedGroup], max_new_tokens: int) -> dict[str, float]:
    """`drops/stale_length_q1` to `_q4`: stale groups by their longest completion, in quarters of `max_new_tokens`.

    Were long completions dropped more than short ones, the policy would learn to be brief for no reason of the reward.
    """
    counts = Counter(
        min(4 * (max(completion.meta.tokens for completion in group.completions) - 1) // max_new_tokens, 3)
        for group in dropped
    )
    return {f"drops/stale_length_q{quarter + 1}": float(counts[quarter]) for quarter in range(4)}


def sample_rows(groups: Sequence[GradedGroup]) -> list[dict[str, Any]]:
    """What people read beside the texts of completions, one row each in the order of the groups."""
    return [
        {
            "group": c.meta.group_id,
            "i": c.meta.sample_index,
            "prompt": group.prompt.text,
            "gold": group.prompt.gold,
            "verdict": c.grading.verdict,
            "reward": c.grading.reward,
            "parts": c.grading.parts,
            "reason": c.grading.reason,
            "detail": c.grading.detail,
        }
        for group in groups
        for c in group.completions
    ]
