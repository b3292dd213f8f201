"""How much is asked of the rollout workers at once, in the order of asking."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Admission:
    """Places for completions. All methods belong to one event loop.

    Args:
        places: how many there are at this moment; workers come and go. A group that is larger has its turn when
            nothing else is under way.
    """

    def __init__(self, places: Callable[[], int]) -> None:
        self._places = places
        self._taken = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._busy = 0.0
        self._busy_since = 0.0

    def look(self) -> None:
        """The number of places changed: those who wait may have their turn now."""
        self._admit()

    def busy_seconds(self) -> float:
        """How long anything was under way so far."""
        return self._busy + (time.monotonic() - self._busy_since if self._taken else 0.0)

    @asynccontextmanager
    async def admitted(self, completions: int) -> AsyncIterator[None]:
        """Run the body once there is room for so many completions; no bound, its caller has one."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asked = (completions, turn)
        self._queue.append(asked)
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._taken -= completions
                if not self._taken:
                    self._busy += time.monotonic() - self._busy_since
            elif asked in self._queue:
                self._queue.remove(asked)
            self._admit()

    def _admit(self) -> None:
        """Give the places that are free to those who asked first."""
        while self._queue:
            completions, turn = self._queue[0]
            if self._taken and self._taken + completions > self._places():
                return
            self._queue.popleft()
            if not turn.cancelled():
                if not self._taken:
                    self._busy_since = time.monotonic()
                self._taken += completions
                turn.set_result(None)
