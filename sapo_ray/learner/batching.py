"""How a step's samples are divided: into mini-batches, over ranks, and into micro-batches.

Everything here is a pure function of sample ids, lengths and the seed, never of arrival order.

    step         the samples of one rollout batch
    mini-batch   whole groups; one optimizer update trains on one of them; membership is fixed for the step
    rank share   a sample sits on one rank for the whole step, so its payload travels once
    micro-batch  rows of one forward pass; at most tokens_per_micro_batch = rows x longest row, padding included

Micro-batches of a mini-batch are fixed too: its log-probs before the first update are computed in the very shapes in
which it is trained on, so that r is exactly 1 there. Every rank has the same number of micro-batches in a mini-batch,
empty ones included, because each of them is a collective operation under ZeRO-2 and ZeRO-3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sapo_ray.algorithms.advantages import loss_weights
from sapo_ray.algorithms.settings import resolve
from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ConfigError
from sapo_ray.types import TrainSample

SampleId = tuple[str, int]
"""(group_id, sample_index)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sample as a row of a micro-batch."""

    slot: int
    """Position among the payloads of its rank."""
    id: SampleId
    group: int
    """Number of its group within the step."""
    prompt_tokens: int
    tokens: int
    advantage: float
    weight: float
    """Loss weight of each of its completion tokens; 0 where masked."""
    ages: tuple[tuple[int, int, int], ...]
    """(start, end, policy age in publishes) over its completion tokens."""

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.tokens


MicroBatch = tuple[Row, ...]
"""Rows of one forward pass, longest first; empty: a padding micro-batch of zero weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """What one rank does in a step."""

    step: int
    samples: tuple[int, ...]
    """Which of the step's samples sit on this rank, as positions in `samples` given to plan_step."""
    mini_batches: tuple[tuple[MicroBatch, ...], ...]
    updates: tuple[int, ...]
    """The mini-batch that each update trains on, epochs one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """A whole step."""

    ranks: tuple[RankPlan, ...]
    members: tuple[tuple[SampleId, ...], ...]
    """Samples of each mini-batch over all ranks."""
    updates: tuple[int, ...]


def plan_step(samples: Sequence[TrainSample], spec: JobSpec, step: int, version: int = 0) -> StepPlan:
    """Divide the samples of one step; `version` is the learner's at its start, for the ages of tokens.

    With fewer groups than mini-batches (the others were dropped) there are as many mini-batches as groups.

    Raises
        ConfigError: a sample alone is over learner.tokens_per_micro_batch
        ValueError: no samples
    """
    if not samples:
        raise ValueError("a learner step needs at least one sample, got none")
    objective = resolve(spec.algorithm, spec.rollout.max_new_tokens, spec.rollout.temperature)
    order = sorted(range(len(samples)), key=lambda i: (samples[i].group_id, samples[i].sample_index))
    groups = _shuffled({samples[i].group_id for i in order}, spec.seed, step, "groups")
    parts = _split(groups, min(spec.learner.mini_batches, len(groups)))
    numbers = {group: number for number, group in enumerate(groups)}
    ranks = spec.learner.ranks
    slots: list[list[int]] = [[] for _ in range(ranks)]
    mini_batches: list[list[tuple[MicroBatch, ...]]] = [[] for _ in range(ranks)]
    members: list[tuple[SampleId, ...]] = []
    for part in parts:
        chosen = [i for i in order if samples[i].group_id in part]
        weights = loss_weights(
            objective.aggregation,
            [samples[i].tokens for i in chosen],
            [samples[i].masked for i in chosen],
            spec.rollout.max_new_tokens,
        )
        weight_of = dict(zip(chosen, weights, strict=True))
        shares = _balance([(i, _length(samples[i])) for i in chosen], ranks)
        packed = [_pack(share, samples, spec.learner.tokens_per_micro_batch) for share in shares]
        count = max(len(micro_batches) for micro_batches in packed)
        for rank, micro_batches in enumerate(packed):
            rows = [
                tuple(
                    _row(samples[i], _seat(slots[rank], i), numbers[samples[i].group_id], weight_of[i], version)
                    for i in micro
                )
                for micro in micro_batches
            ]
            mini_batches[rank].append((*rows, *([()] * (count - len(rows)))))
        members.append(tuple((samples[i].group_id, samples[i].sample_index) for i in chosen))
    updates = _update_order(len(parts), spec.learner.epochs, spec.seed, step)
    plans = tuple(
        RankPlan(step=step, samples=tuple(slots[r]), mini_batches=tuple(mini_batches[r]), updates=updates)
        for r in range(ranks)
    )
    return StepPlan(ranks=plans, members=tuple(members), updates=updates)


def _seat(slots: list[int], position: int) -> int:
    """Slot of a sample that joins the payloads of a rank."""
    slots.append(position)
    return len(slots) - 1


def _row(sample: TrainSample, slot: int, group: int, weight: float, version: int) -> Row:
    return Row(
        slot=slot,
        id=(sample.group_id, sample.sample_index),
        group=group,
        prompt_tokens=sample.prompt_tokens,
        tokens=sample.tokens,
        advantage=sample.advantage,
        weight=weight,
        ages=tuple((span.start, span.end, version - span.version.number) for span in sample.spans),
    )


def _length(sample: TrainSample) -> int:
    return sample.prompt_tokens + sample.tokens


def _shuffled(names: set[str], seed: int, step: int, what: str) -> list[str]:
    """Names in the order of a keyed hash: a shuffle that knows nothing of the order in which they came."""
    return sorted(names, key=lambda name: hashlib.blake2b(f"{seed}/{step}/{what}/{name}".encode()).digest())


def _split(groups: Sequence[str], parts: int) -> list[set[str]]:
    """Consecutive parts whose sizes differ by at most one."""
    size, rest = divmod(len(groups), parts)
    ends = [sum(size + (p < rest) for p in range(part + 1)) for part in range(parts)]
    return [set(groups[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _update_order(mini_batches: int, epochs: int, seed: int, step: int) -> tuple[int, ...]:
    """Mini-batches in the order of updates: as they were split, then in a new order in each further epoch."""
    order = list(range(mini_batches))
    for epoch in range(1, epochs):
        names = _shuffled({str(m) for m in range(mini_batches)}, seed, step, f"epoch{epoch}")
        order += [int(name) for name in names]
    return tuple(order)


def _balance(lengths: Sequence[tuple[int, int]], ranks: int) -> list[list[int]]:
    """Shares of (sample, tokens) with about equal sums of tokens: the longest first, each to the emptiest rank."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for sample, tokens in sorted(lengths, key=lambda item: -item[1]):
        rank = loads.index(min(loads))
        shares[rank].append(sample)
        loads[rank] += tokens
    return shares


def _pack(share: Sequence[int], samples: Sequence[TrainSample], budget: int) -> list[list[int]]:
    """Micro-batches of a share whose samples come longest first: the first row of each says its width."""
    packed: list[list[int]] = []
    for sample in share:
        length = _length(samples[sample])
        if length > budget:
            raise ConfigError(
                f"learner.tokens_per_micro_batch must be >= {length}, the length of sample "
                f"{samples[sample].sample_index} of group {samples[sample].group_id}, got {budget}; "
                "one sample must fit into a micro-batch"
            )
        if packed and (len(packed[-1]) + 1) * _length(samples[packed[-1][0]]) <= budget:
            packed[-1].append(sample)
        else:
            packed.append([sample])
    return packed
