"""Choosing a worker at a cost that does not grow with their number.

Asking every worker for every group would be 1,000 times 4,000 questions a step of a large job. So the workers are
looked through once in a while only, the rarer the more there are, and for a choice the next few of those found are
compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

COMPARED = 32
"""Workers compared for one choice; up to so many, all of them every time."""


class Loaded(Protocol):
    """What a choice is made by."""

    in_flight: int


W = TypeVar("W", bound=Loaded)


class LeastLoaded(Generic[W]):
    """Chooses among workers that come, go, and are fit or not from one moment to the next.

    Whoever is chosen is fit at that moment. One that has become fit since they were looked through may have to wait for
    as many choices as COMPARED goes into their number.
    """

    def __init__(self, fit: Callable[[], list[W]], is_fit: Callable[[W], bool]) -> None:
        """`fit`: all that are, in any order."""
        self._fit, self._is_fit = fit, is_fit
        self._found: list[W] = []
        self._next = 0
        self._left = 0
        """Choices until they are looked through again."""

    def choose(self) -> W | None:
        """The one with the least in flight of the next few that are fit; None if no worker is."""
        self._left -= 1
        some = [worker for worker in self._few() if self._is_fit(worker)] if self._left >= 0 else []
        if not some:
            self._found = self._fit()
            self._left = len(self._found) // COMPARED
            some = self._few()
        return min(some, key=lambda worker: worker.in_flight, default=None)

    def _few(self) -> list[W]:
        if len(self._found) <= COMPARED:
            return self._found
        start = self._next % len(self._found)
        self._next = start + COMPARED
        return self._found[start : start + COMPARED]
