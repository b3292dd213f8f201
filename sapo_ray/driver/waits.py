"""Waits with a bound and a name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sapo_ray.errors import DeadlineExceeded


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
