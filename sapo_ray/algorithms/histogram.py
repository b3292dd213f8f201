"""Counts in fixed bins: quantiles of any number of values in bounded memory, merged exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Scale = Literal["unit", "signed"]

BINS = 2000
_SPAN = float(np.arcsinh(20.0 / 1e-3))


def _to_position(scale: Scale, values: np.ndarray) -> np.ndarray:
    """Values to [0, 1], monotonically. `signed` is linear below 1e-3 and logarithmic beyond, up to +-20."""
    if scale == "unit":
        return values
    return 0.5 + 0.5 * np.arcsinh(values / 1e-3) / _SPAN


def _to_value(scale: Scale, position: float) -> float:
    return position if scale == "unit" else float(1e-3 * np.sinh((2.0 * position - 1.0) * _SPAN))


@dataclass(slots=True)
class Histogram:
    """`unit` resolves [0, 1] in steps of 1/2000; `signed` resolves [-20, 20] to 1% of a value, or 1e-5 near 0.

    Values outside fall into the outermost bins; the exact extremes are kept, and quantiles never leave them.
    """

    scale: Scale
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    low: float = np.inf
    high: float = -np.inf

    def add(self, values: np.ndarray) -> None:
        """Count finite values [n]."""
        if not len(values):
            return
        index = (_to_position(self.scale, values.astype(np.float64)) * BINS).astype(np.int64)
        self.counts += np.bincount(index.clip(0, BINS - 1), minlength=BINS)
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

    def merge(self, other: Histogram) -> None:
        """Take another histogram's counts in."""
        assert self.scale == other.scale
        self.counts += other.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def quantile(self, q: float) -> float:
        """The q-quantile, q in [0, 1], interpolated within a bin; there must be at least one value."""
        total = int(self.counts.sum())
        assert total > 0, "a quantile of nothing"
        rank = q * total
        cumulative = np.cumsum(self.counts)
        bin_ = int(np.searchsorted(cumulative, rank, side="left"))
        before = int(cumulative[bin_] - self.counts[bin_])
        inside = (rank - before) / max(int(self.counts[bin_]), 1)
        return min(max(_to_value(self.scale, (bin_ + inside) / BINS), self.low), self.high)
