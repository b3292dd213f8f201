"""Threads for work that lasts: each kind has few of its own, so that none takes those that serve everybody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, WouldBlock, fail_after, to_thread

from sapo_ray.control.problems import Refused, unavailable

P = ParamSpec("P")
T = TypeVar("T")


class Room:
    """`places` at once; who comes beyond them waits at most `wait_s`, which takes no thread, and is then refused."""

    def __init__(self, places: int, what: str, *, wait_s: float = 0.0) -> None:
        self._places = CapacityLimiter(places)
        self._what = what
        self._wait_s = wait_s

    def check(self) -> None:
        """Raises Refused (503) if all places are taken: before something long is done in vain."""
        if self._places.available_tokens < 1:
            raise self._full()

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work` in a thread. Raises Refused (503, with Retry-After) if there is no place."""
        visit = object()
        try:
            self._places.acquire_on_behalf_of_nowait(visit)
        except WouldBlock:
            await self._wait(visit)
        try:
            return await to_thread.run_sync(lambda: work(*args, **kwargs), limiter=CapacityLimiter(1))
        finally:
            self._places.release_on_behalf_of(visit)

    async def _wait(self, visit: object) -> None:
        try:
            with fail_after(self._wait_s):
                await self._places.acquire_on_behalf_of(visit)
        except TimeoutError:
            raise self._full() from None

    def _full(self) -> Refused:
        return unavailable(f"as many {self._what} as the service takes at once are under way")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rooms:
    """Of one application."""

    cluster: Room = field(default_factory=lambda: Room(4, "reads from the cluster"))
    """The cluster may take 20 s for an answer."""
    examination: Room = field(default_factory=lambda: Room(2, "examinations of data sets", wait_s=30.0))
    """Gigabytes, row by row."""
    link: Room = field(default_factory=lambda: Room(12, "deliveries of drivers", wait_s=5.0))
    """Drivers are heard, whatever users ask for. Fewer than connections to the database."""
