"""Advantages of completions, the overlong penalty, and the weights that turn token losses into one sum.

Plain Python in float64: a step has a few thousand completions, and a group of equal rewards must give exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from sapo_ray.errors import TrainingFailed

AdvantageKind = Literal["group_std", "group_mean", "rloo", "batch_std"]
Aggregation = Literal["sequence_mean", "token_mean", "constant"]

STD_EPS = 1e-6
"""Added to the standard deviation before dividing."""
LARGE = 1e100
"""From here on squares of rewards, summed, would come near the largest float."""
LARGEST_ADVANTAGE = 1e30
"""The learner's losses are float32, whose largest number is 3e38; a gradient is a sum of many."""


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether a group can teach anything: at least two graded completions, and not all equal."""
    return len(rewards) > 1 and max(rewards) != min(rewards)


def advantages(kind: AdvantageKind, rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """Advantage of each completion, one inner list per group (graded completions only, finite rewards).

    group_std   (R - mean) / (std + 1e-6), mean and unbiased std of the group (GRPO, arXiv 2402.03300)
    group_mean  R - mean of the group (Dr. GRPO, arXiv 2503.20783)
    rloo        n/(n-1) (R - mean): R against the mean of the others (arXiv 2402.14740)
    batch_std   (R - mean of the group) / (std + 1e-6), std over all rewards given; needs all groups of the batch

    Rewards may be as large as a float64 holds: none of these overflows.

    Raises:
        TrainingFailed: an advantage that keeps the size of its reward (group_mean, rloo) is beyond what float32 losses
            can take.

    A group of one, or of equal rewards, gives 0 exactly: tested before dividing, since the mean of equal numbers
    may differ from them in the last bit.
    """
    every = [reward for group in rewards for reward in group]
    exponent = _exponent(every)
    scaled = [[math.ldexp(reward, -exponent) for reward in group] for group in rewards]
    batch_std = _std([reward for group in scaled for reward in group]) if kind == "batch_std" else 0.0
    return [
        _of_group(kind, small, batch_std, exponent) if has_signal(group) else [0.0] * len(group)
        for group, small in zip(rewards, scaled, strict=True)
    ]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation; finite for all finite values."""
    exponent = _exponent(values)
    scaled = [math.ldexp(value, -exponent) for value in values]
    mean = math.fsum(scaled) / len(scaled)
    variance = math.fsum((value - mean) ** 2 for value in scaled) / len(scaled)
    return math.ldexp(mean, exponent), math.ldexp(math.sqrt(variance), exponent)


def _exponent(values: Sequence[float]) -> int:
    """A power of two by which values are divided so that no sum of squares overflows: 0 for ordinary ones.

    Division by a power of two is exact, so nothing is rounded for it (but for values 300 orders of magnitude smaller).
    """
    largest = max(map(abs, values), default=0.0)
    return math.frexp(largest)[1] if largest > LARGE else 0


def _of_group(kind: AdvantageKind, rewards: Sequence[float], batch_std: float, exponent: int) -> list[float]:
    """Advantages of a group whose rewards were divided by 2**exponent."""
    n = len(rewards)
    mean = math.fsum(rewards) / n
    eps = math.ldexp(STD_EPS, -exponent)
    if kind == "group_std":
        scale = 1.0 / (_std(rewards) + eps)
    elif kind == "group_mean":
        scale = 1.0
    elif kind == "rloo":
        scale = n / (n - 1)
    elif kind == "batch_std":
        scale = 1.0 / (batch_std + eps)
    else:
        raise ValueError(f"advantage must be one of group_std, group_mean, rloo, batch_std, got {kind!r}")
    unscaled = [(reward - mean) * scale for reward in rewards]
    if kind in ("group_mean", "rloo"):  # these keep the size of the rewards
        bound = math.ldexp(LARGEST_ADVANTAGE, -exponent)
        if any(abs(value) > bound for value in unscaled):
            raise TrainingFailed(
                f"rewards of up to {math.ldexp(max(map(abs, rewards)), exponent):.3g} give advantages beyond float32 "
                f"with algorithm.advantage: {kind}; bound the reward function, or use group_std"
            )
        return [math.ldexp(value, exponent) for value in unscaled]
    return unscaled


def _std(values: Sequence[float]) -> float:
    """Unbiased standard deviation; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def overlong_penalty(tokens: int, max_new_tokens: int, buffer: int) -> float:
    """Soft penalty on length (DAPO, arXiv 2503.14476): 0 up to max_new_tokens - buffer, then linear to -1.

    tokens: length of the completion. buffer: 0 switches the penalty off.
    """
    if buffer == 0:
        return 0.0
    over = tokens - (max_new_tokens - buffer)
    return -min(max(over / buffer, 0.0), 1.0)


def loss_weights(
    aggregation: Aggregation, tokens: Sequence[int], masked: Sequence[bool], max_new_tokens: int
) -> list[float]:
    """Weight of each token of each completion, so that the loss of an update is one weighted sum.

    tokens, masked: of all N graded completions of the update's mini-batch over all ranks, masked and zero-signal
    ones included: those stay in the denominator, and masked ones get weight 0.

    sequence_mean  1 / (|y_i| N): mean of token means (SAPO, GRPO)
    token_mean     1 / sum |y|: long completions count for more (DAPO, CISPO)
    constant       1 / (max_new_tokens N): no length in the denominator at all (Dr. GRPO)
    """
    assert len(tokens) == len(masked), (len(tokens), len(masked))
    n, total = len(tokens), sum(tokens)

    def weight(length: int) -> float:
        if aggregation == "sequence_mean":
            return 1.0 / (length * n)
        if aggregation == "token_mean":
            return 1.0 / total
        if aggregation == "constant":
            return 1.0 / (max_new_tokens * n)
        raise ValueError(f"aggregation must be one of sequence_mean, token_mean, constant, got {aggregation!r}")

    return [0.0 if skip or length == 0 else weight(length) for length, skip in zip(tokens, masked, strict=True)]
