"""Calls to verifier actors, each with an end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from ray.exceptions import RayTaskError

from sapo_ray.errors import DeadlineExceeded, SapoRayError, WorkerLost

T = TypeVar("T")

READ_S = 1.0
"""For an answer of an actor that came while this loop was busy."""


async def bounded(call: Awaitable[T], seconds: float, what: str) -> T:
    """The result of an actor call.

    Raises:
        DeadlineExceeded: none within the time.
        SapoRayError: what the actor raised, as itself rather than wrapped by Ray.
    """
    try:
        async with asyncio.timeout(seconds):  # unlike wait_for, it loses no cancellation that comes with the answer
            return await call
    except RayTaskError as error:  # first: it is an instance of what the actor raised as well
        if isinstance(error.cause, SapoRayError):
            raise error.cause from None
        raise
    except TimeoutError as error:
        raise DeadlineExceeded(f"{what} did not come within {seconds:.0f} s") from error


async def _awaited(call: Awaitable[T]) -> T:
    return await call


async def unless(lost: asyncio.Event, call: Awaitable[T], worker: str) -> T:
    """The result of a call, or WorkerLost as soon as the actor that holds it is given up."""
    answer, end = asyncio.ensure_future(_awaited(call)), asyncio.ensure_future(lost.wait())
    try:
        await asyncio.wait({answer, end}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise WorkerLost(f"{worker} was given up while it held this call")
    finally:
        answer.cancel()
        end.cancel()


async def answered(call: Awaitable[T], seconds: float, what: str) -> T:
    """As bounded; but an answer that came while this loop was itself busy counts, however late it is read."""
    answer = asyncio.ensure_future(_awaited(call))
    try:
        for timeout in (seconds, READ_S):
            await asyncio.wait({answer}, timeout=timeout)
        if not answer.done():
            raise DeadlineExceeded(f"{what} did not come within {seconds:.0f} s")
        return await bounded(answer, READ_S, what)
    finally:
        answer.cancel()
