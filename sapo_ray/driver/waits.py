"""Waits with a bound and a name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from sapo_ray.errors import DeadlineExceeded

GRACE_S = 30.0
"""The parts bound their own waits and say more about them; the driver's bound is later by this."""


@asynccontextmanager
async def bounded(seconds: float, what: str, details: Callable[[], str]) -> AsyncIterator[None]:
    """Raise DeadlineExceeded, with `what` was waited for and `details` of that moment, after so many seconds.

    A timeout that comes from inside is passed on as it is.
    """
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise DeadlineExceeded(f"waited {seconds:g} s for {what}{details()}") from error


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Run `work`, which ends only by failing, while the body runs. Its failure ends the body and is raised."""
    task = asyncio.create_task(work, name=name)
    scope = asyncio.timeout(None)

    def ended(_: asyncio.Task[None]) -> None:
        if not task.cancelled() and not scope.expired():
            scope.reschedule(asyncio.get_running_loop().time())

    try:
        async with scope:
            task.add_done_callback(ended)
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        task.result()
        raise AssertionError(f"{name} ended by itself") from None
    finally:
        task.remove_done_callback(ended)
        task.cancel()
        await asyncio.wait((task,))
