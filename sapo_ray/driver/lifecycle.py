"""How parts begin and end: all or none of them, and every one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from sapo_ray.driver.journal import Journal

CLOSE_S = 120.0
"""Bound of a part's close; the longest of them asks an engine politely, waits, and kills it."""


async def start_together(*starts: Coroutine[Any, Any, None]) -> None:
    """Start parts side by side; each bounds its own start and names what it waits for.

    Raises what the first failing one raised, once the other starts have ended too: nothing may still be starting while
    the parts are closed.
    """
    try:
        async with asyncio.TaskGroup() as group:
            for start in starts:
                group.create_task(start)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def close_all(journal: Journal, **closes: Coroutine[Any, Any, None]) -> None:
    """Close parts side by side, whatever cancels the caller meanwhile, within CLOSE_S.

    What could not be closed is a condition `CloseFailed` with the part's name: its processes may be left.
    """
    tasks = {name: asyncio.create_task(close, name=f"close {name}") for name, close in closes.items()}
    clock = asyncio.get_running_loop().time
    end, cancelled = clock() + CLOSE_S, None
    while (left := end - clock()) > 0 and not all(task.done() for task in tasks.values()):
        try:
            await asyncio.wait(tasks.values(), timeout=left)
        except asyncio.CancelledError as caught:  # raised again below: first everything is closed
            cancelled = caught
    for name, task in tasks.items():
        reason = None
        if not task.done():
            task.cancel()
            reason = f"it did not end within {CLOSE_S:g} s"
        elif task.cancelled():
            reason = "its close was cancelled"
        elif (error := task.exception()) is not None:
            reason = repr(error)
        if reason is not None:
            journal.event("condition", condition="CloseFailed", part=name, reason=reason)
    if cancelled is not None:
        raise cancelled
