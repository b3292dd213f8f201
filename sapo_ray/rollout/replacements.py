"""How often a rollout worker is replaced before its slot is given up."""

from __future__ import annotations

from collections import defaultdict, deque

REPLACEMENTS = 3
"""Of each worker within REPLACEMENT_WINDOW_S; then the pool goes on with fewer."""
REPLACEMENT_WINDOW_S = 3600.0


class Replacements:
    """When each slot's workers were replaced. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._times: defaultdict[int, deque[float]] = defaultdict(deque)

    def take(self, slot: int, now: float) -> bool:
        """Whether the slot may be filled once more; counts it if so."""
        times = self._times[slot]
        while times and now - times[0] > REPLACEMENT_WINDOW_S:
            times.popleft()
        if len(times) >= REPLACEMENTS:
            return False
        times.append(now)
        return True

    def renew(self, slot: int) -> None:
        """A whole budget again, for a worker that was asked for."""
        self._times.pop(slot, None)
