"""A full disk: the run holds where it is until there is room again. Nothing is given up meanwhile.

    a write finds the disk full   the reserve is given back, so that the journal can say `DiskFull`
    every CHECK_S                 once there is room for the reserve again, the same write is tried again
    a pause is ordered            it needs a checkpoint: said, and obeyed once there is room
    a cancel is ordered           the run ends at once
    another attempt has the run   it ends as anywhere else

Actors, weights in memory and everything sampled stay as they are, and so does the newest checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sapo_ray.driver.files import came_of_a_full_disk, not_written
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.orders import Ended, StandingOrders
from sapo_ray.driver.rundir import stop_if_superseded
from sapo_ray.errors import DiskFull, ResourceError

log = logging.getLogger(__name__)

Result = TypeVar("Result")
CHECK_S = 30.0
"""Between two looks at a full disk."""
ORDERS_S = 1.0
"""Between two looks at the orders meanwhile."""
RESERVE_BYTES = 4 << 20
"""Kept in the run directory for the journal of a full disk, and for the last words of a run that ends on one."""
RESERVE = ".reserve"
DISK_FULL = "DiskFull"


class DiskHold:
    """Writes to the run directory that outlive a full disk."""

    def __init__(self, run_dir: Path, journal: Journal, orders: StandingOrders) -> None:
        self._run_dir = run_dir
        self._reserve = run_dir / RESERVE
        self._journal = journal
        self._orders = orders
        self._since: float | None = None
        """When the disk was found full, while it is."""
        self._pause_said = False

    @contextmanager
    def ready(self) -> Iterator[DiskHold]:
        """Keep the reserve while the body runs. Raises DiskFull where there is no room for it at the start."""
        if (refused := self._take_reserve()) is not None:
            raise not_written(self._reserve, refused) from refused
        try:
            yield self
        finally:
            self._reserve.unlink(missing_ok=True)

    def wait_at_start(self, check: Callable[[], None]) -> None:
        """Return once `check` raises no DiskFull any more: a run that held goes on holding when its driver is replaced.

        Blocks; before the event loop. Raises as `through` does, and Ended for a pause, too: nothing is under way.
        """
        while True:
            try:
                check()
            except DiskFull as error:
                if self._since is None:
                    self._since = time.monotonic()
                    reason = f"{_what(error)}; the run starts again once there is room"
                    log.error("%s", reason)
                    self._journal.event("condition", condition=DISK_FULL, reason=reason)
            else:
                self._over()
                return
            end = time.monotonic() + CHECK_S
            while (left := end - time.monotonic()) > 0:
                self._orders.check()
                if self._orders.ending is not None:
                    raise Ended(self._orders.ending)
                time.sleep(min(left, ORDERS_S))
            stop_if_superseded(self._run_dir, self._journal)

    async def call(self, write: Callable[[], None]) -> None:
        """As `through`, for a write that takes no time worth waiting for."""

        async def called() -> None:
            write()

        await self.through(called)

    async def through(self, write: Callable[[], Awaitable[Result]]) -> Result:
        """What `write` returns, tried again for as long as the disk is full. It must leave nothing half done.

        Raises:
            Ended: the run was cancelled meanwhile.
            Superseded: another attempt has the run.
        """
        while True:
            try:
                done = await write()
            except DiskFull as error:
                await self._wait_for_room(error)
            else:
                self._over()
                return done

    async def _wait_for_room(self, error: DiskFull) -> None:
        self._reserve.unlink(missing_ok=True)
        if self._since is None:
            self._since = time.monotonic()
            await self._say(f"{_what(error)}; the run holds until there is room, and then goes on by itself")
        while True:
            end = time.monotonic() + CHECK_S
            while (left := end - time.monotonic()) > 0:
                if self._orders.ending == "cancelled":
                    raise Ended("cancelled")
                if self._orders.ending == "paused" and not self._pause_said:
                    self._pause_said = True
                    await self._say(
                        f"{_what(error)}; a pause was asked for, but needs a checkpoint: free some space and the run "
                        "pauses, or cancel it, which keeps the newest checkpoint"
                    )
                await asyncio.sleep(min(left, ORDERS_S))
            stop_if_superseded(self._run_dir, self._journal)
            if self._take_reserve() is None:
                return

    def _over(self) -> None:
        if self._since is None:
            return
        held, self._since, self._pause_said = time.monotonic() - self._since, None, False
        log.warning("there is room on the disk again after %.0f s; the run goes on", held)
        self._journal.event("condition", condition=DISK_FULL, cleared=True, seconds=round(held, 1))

    async def _say(self, reason: str) -> None:
        log.error("%s", reason)
        self._journal.event("condition", condition=DISK_FULL, reason=reason)
        try:
            await self._journal.sync()
        except ResourceError as error:  # somebody else took what the reserve left: it is said once there is room
            log.error("%s", error)

    def _take_reserve(self) -> OSError | None:
        """Preallocate the reserve; returns why not where the disk is full. Raises ResourceError where it cannot be."""
        try:
            file = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.posix_fallocate(file, 0, RESERVE_BYTES)
            finally:
                os.close(file)
        except OSError as error:
            if not came_of_a_full_disk(self._reserve, error):
                raise not_written(self._reserve, error) from error
            self._reserve.unlink(missing_ok=True)
            return error
        return None


def _what(error: DiskFull) -> str:
    """What could not be written, and why; its way out is for a run that has ended."""
    return str(error).partition(";")[0]
