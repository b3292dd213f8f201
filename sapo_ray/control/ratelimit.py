"""A token bucket per key, in this process: each replica counts for itself."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

REMEMBERED = 10_000
"""Buckets kept; the one unused for longest goes first, and comes back full."""


class Buckets:
    """`rate` tokens a second flow into each bucket, which holds `burst`; a request takes one. Thread-safe."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str) -> float:
        """0 if the request may go on, else the seconds until there is a token again. Rate 0 lets everything pass."""
        if self._rate == 0:
            return 0.0
        now = self._clock()
        with self._lock:
            level, filled = self._buckets.pop(name, (self._burst, now))
            level = min(self._burst, level + (now - filled) * self._rate)
            allowed = level >= 1
            self._buckets[name] = (level - 1 if allowed else level, now)
            if len(self._buckets) > REMEMBERED:
                self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - level) / self._rate

    def give_back(self, name: str) -> None:
        """What was taken for something that does not count after all."""
        with self._lock:
            level, filled = self._buckets.get(name, (self._burst, 0.0))
            if name in self._buckets:
                self._buckets[name] = (min(self._burst, level + 1), filled)
