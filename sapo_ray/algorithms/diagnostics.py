"""What gates, ratios and corrections did to the tokens of a step.

`TokenStats` holds sums, extremes and fixed-bin histograms, so its size does not grow with the number of tokens (it
grows with the number of groups: two numbers each), and stats of micro-batches and ranks merge in any order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from sapo_ray.algorithms.histogram import Histogram


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Tokens of one micro-batch, flattened, padding left out. All arrays are [n]."""

    active: np.ndarray
    """bool: carries loss (loss weight above 0); the others only tell of mismatch, age and entropy."""
    advantage: np.ndarray
    weight: np.ndarray
    """w = f'(r), or 1 where the restoring variant keeps slope r."""
    log_ratio: np.ndarray
    """log r, before clamping."""
    mass: np.ndarray
    """|A| r w x correction x loss weight: the token's share of the gradient."""
    clamped: np.ndarray
    """bool"""
    hard_clipped: np.ndarray
    """bool: clipping of the token's ratio would have cut it."""
    capped: np.ndarray
    """bool: on the restoring side beyond its cap."""
    rejected: np.ndarray
    """bool: by the mismatch correction."""
    correction: np.ndarray
    """Factor of the mismatch correction."""
    log_rho: np.ndarray
    """log of learner over sampler."""
    group: np.ndarray | None = None
    """int: a number that identifies the group within the step, the same on all ranks."""
    age: np.ndarray | None = None
    """Policy age: learner's version at the start of the step minus the token's."""
    entropy: np.ndarray | None = None
    """Of the policy's next-token distribution, nats."""

    def __getitem__(self, chosen: np.ndarray) -> Tokens:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        picked: dict[str, Any] = {name: None if v is None else v[chosen] for name, v in values.items()}
        return Tokens(**picked)

    @property
    def finite(self) -> np.ndarray:
        """bool [n]"""
        checked = [self.advantage, self.weight, self.log_ratio, self.mass, self.log_rho]
        checked += [values for values in (self.age, self.entropy) if values is not None]
        every: np.ndarray = np.logical_and.reduce([np.isfinite(values) for values in checked])
        return every


@dataclass(slots=True)
class SignStats:
    """Gate weights and log-ratios of the active tokens of one sign of A."""

    weight_sum: float = 0.0
    below_half: int = 0
    weights: Histogram = field(default_factory=lambda: Histogram("unit"))
    log_ratios: Histogram = field(default_factory=lambda: Histogram("signed"))

    @property
    def count(self) -> int:
        return int(self.weights.counts.sum())

    def add(self, tokens: Tokens) -> None:
        self.weight_sum += float(tokens.weight.sum(dtype=np.float64))
        self.below_half += int((tokens.weight < 0.5).sum())
        self.weights.add(tokens.weight)
        self.log_ratios.add(tokens.log_ratio)

    def merge(self, other: SignStats) -> None:
        self.weight_sum += other.weight_sum
        self.below_half += other.below_half
        self.weights.merge(other.weights)
        self.log_ratios.merge(other.log_ratios)

    def summary(self, sign: str) -> Iterator[tuple[str, float]]:
        yield f"gate/weight_mean_{sign}", self.weight_sum / self.count
        yield f"gate/below_half_{sign}", self.below_half / self.count
        for name, q in (("p01", 0.01), ("p50", 0.5), ("p99", 0.99)):
            yield f"gate/weight_{name}_{sign}", self.weights.quantile(q)
            yield f"log_ratio/{name}_{sign}", self.log_ratios.quantile(q)
        yield f"log_ratio/min_{sign}", self.log_ratios.low
        yield f"log_ratio/max_{sign}", self.log_ratios.high


@dataclass(slots=True)
class TokenStats:
    """Token-level metrics of a step; add micro-batches, merge ranks, then read the summary."""

    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    maxima: dict[str, float] = field(default_factory=dict)
    positive: SignStats = field(default_factory=SignStats)
    negative: SignStats = field(default_factory=SignStats)
    group_weights: dict[int, float] = field(default_factory=dict)
    """Sum of gate weights of each group's active tokens."""
    group_tokens: dict[int, int] = field(default_factory=dict)

    def add(self, tokens: Tokens, *, rejected_sequences: int = 0) -> None:
        """Take the tokens of a micro-batch in. Non-finite ones are counted and left out of everything else."""
        finite = tokens.finite
        self._sum("nonfinite", float((~finite).sum()))
        self._sum("rejected_sequences", float(rejected_sequences))
        self._add_mismatch(tokens[finite])
        self._add_gates(tokens[finite & tokens.active])

    def merge(self, other: TokenStats) -> None:
        """Take another micro-batch's, update's or rank's stats in."""
        for name, value in other.sums.items():
            self._sum(name, value)
        for name, value in other.maxima.items():
            self._max(name, value)
        self.positive.merge(other.positive)
        self.negative.merge(other.negative)
        for group, weight in other.group_weights.items():
            self._group(group, weight, other.group_tokens[group])

    def summary(self) -> dict[str, float]:
        """Metrics by name. What nothing was seen of is left out, never reported as 0 or NaN."""
        tokens, active = self.sums["tokens"], self.sums["active"]
        metrics = {
            "tokens/all": tokens,
            "tokens/with_loss": active,
            "tokens/nonfinite": self.sums["nonfinite"],
            "gate/clamped_tokens": self.sums["clamped"],
            "restoring/capped_tokens": self.sums["capped"],
            "correction/rejected_tokens": self.sums["rejected"],
            "correction/rejected_sequences": self.sums["rejected_sequences"],
        }
        if tokens:
            metrics["mismatch/kl"] = self.sums["kl"] / tokens
            metrics["mismatch/abs_mean"] = self.sums["abs_log_rho"] / tokens
            metrics["mismatch/abs_max"] = self.maxima["abs_log_rho"]
        if self.sums["age_tokens"]:
            metrics["age/token_mean"] = self.sums["age"] / self.sums["age_tokens"]
            metrics["age/token_max"] = self.maxima["age"]
        if self.sums["entropy_tokens"]:
            metrics["policy/entropy"] = self.sums["entropy"] / self.sums["entropy_tokens"]
        if active:
            metrics["correction/factor_mean"] = self.sums["correction"] / active
        if self.group_tokens:
            ratios = [weight / self.group_tokens[group] for group, weight in self.group_weights.items()]
            metrics["gate/effective_update_ratio"] = float(np.mean(ratios))
        return metrics | dict(self._by_sign())

    def _by_sign(self) -> Iterator[tuple[str, float]]:
        for sign, stats in (("pos", self.positive), ("neg", self.negative)):
            if stats.count:
                yield from stats.summary(sign)
        signed = self.positive.count + self.negative.count
        if signed:
            yield "gate/below_half", (self.positive.below_half + self.negative.below_half) / signed
            yield "clip/would_cut_tokens", self.sums["hard_clipped"] / signed
        if self.sums["mass"]:
            yield "clip/would_cut_gradient", self.sums["hard_clipped_mass"] / self.sums["mass"]

    def _add_mismatch(self, tokens: Tokens) -> None:
        self._sum("tokens", float(len(tokens.log_rho)))
        if not len(tokens.log_rho):
            return
        log_rho = tokens.log_rho.astype(np.float64)
        # Beyond 20 the exponential says no more than that something is broken, which abs_max shows.
        self._sum("kl", float((np.expm1(np.minimum(log_rho, 20.0)) - log_rho).sum()))
        self._sum("abs_log_rho", float(np.abs(log_rho).sum()))
        self._max("abs_log_rho", float(np.abs(log_rho).max()))
        if tokens.age is not None:
            self._sum("age", float(tokens.age.sum(dtype=np.float64)))
            self._sum("age_tokens", float(len(tokens.age)))
            self._max("age", float(tokens.age.max()))
        if tokens.entropy is not None:
            self._sum("entropy", float(tokens.entropy.sum(dtype=np.float64)))
            self._sum("entropy_tokens", float(len(tokens.entropy)))

    def _add_gates(self, tokens: Tokens) -> None:
        self._sum("active", float(len(tokens.weight)))
        for name in ("clamped", "hard_clipped", "capped", "rejected", "mass", "correction"):
            self._sum(name, float(getattr(tokens, name).sum(dtype=np.float64)))
        self._sum("hard_clipped_mass", float(tokens.mass[tokens.hard_clipped].sum(dtype=np.float64)))
        self.positive.add(tokens[tokens.advantage > 0])
        self.negative.add(tokens[tokens.advantage < 0])
        if tokens.group is not None:
            names, index = np.unique(tokens.group, return_inverse=True)
            weights, counts = np.bincount(index, weights=tokens.weight), np.bincount(index)
            for group, weight, count in zip(names.tolist(), weights.tolist(), counts.tolist(), strict=True):
                self._group(group, weight, count)

    def _sum(self, name: str, value: float) -> None:
        self.sums[name] += value

    def _max(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, value), value)

    def _group(self, group: int, weight: float, count: int) -> None:
        self.group_weights[group] = self.group_weights.get(group, 0.0) + weight
        self.group_tokens[group] = self.group_tokens.get(group, 0) + count
