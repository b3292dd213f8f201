"""The living processes of a supervisor: a spare that is always warm, and the reaping of those that were killed."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine
from typing import Any

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.errors import SapoRayError, WorkerLost
from sapo_ray.verifier.child import GradingProcess

log = logging.getLogger(__name__)

LAUNCH_ATTEMPTS = 3
"""Starts in a row that may fail before the items that wait are given up, or the first start of all is."""


class NoProcess(Exception):
    """No grading process could be started, LAUNCH_ATTEMPTS times in a row."""


class ProcessStock:
    """Owns every process from its start until it is reaped."""

    def __init__(self, spec: VerifierSpec, *, shortcuts: bool) -> None:
        self._spec = spec
        self._shortcuts = shortcuts
        self._processes: set[GradingProcess] = set()
        self._spares: deque[asyncio.Task[GradingProcess]] = deque()
        self._reaping: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def living(self) -> list[GradingProcess]:
        return [process for process in self._processes if process.alive]

    async def start(self, count: int) -> list[GradingProcess]:
        """`count` processes to work with; the spare is ready too. Raises as GradingProcess.launch does."""
        launches = [self._launch_again() for _ in range(count + 1)]
        working: list[GradingProcess] = []
        for result in await asyncio.gather(*launches, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
            working.append(result)
        self._spares.append(_task(_as_it_is(working.pop())))
        return working

    async def fresh(self) -> GradingProcess:
        """A process that has graded nothing: the spare, while the next spare is started behind it.

        Raises:
            NoProcess: none could be started.
        """
        failure: Exception | None = None
        for _ in range(LAUNCH_ATTEMPTS):
            spare = self._spares.popleft() if self._spares else _task(self._launch())
            if not self._spares:
                self._spares.append(_task(self._launch()))
            try:
                process = await spare
            except (SapoRayError, OSError) as error:
                failure = error
                log.warning("a grading process could not be started: %s", error)
                continue
            if await process.answers():
                return process
            self.discard(process)
        raise NoProcess(str(failure or "every process died while it was the spare"))

    def discard(self, process: GradingProcess) -> None:
        """Killed now; reaped in the background, or by close()."""
        process.kill()
        if self._closed:
            return
        task = asyncio.create_task(self._reap(process), name=f"reap {process.pid}")
        self._reaping.add(task)
        task.add_done_callback(self._reaping.discard)

    async def close(self) -> None:
        """Kills and reaps everything; bounded by child.REAP_S."""
        self._closed = True
        tasks: list[asyncio.Task[Any]] = [*self._spares, *self._reaping]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in self._processes:
            process.kill()
        await asyncio.gather(*[self._reap(process) for process in list(self._processes)])

    async def _launch_again(self) -> GradingProcess:
        """As _launch; one that ends while it starts was killed, most often, so others are tried in its place."""
        for _ in range(LAUNCH_ATTEMPTS - 1):
            try:
                return await self._launch()
            except WorkerLost as error:
                log.warning("%s", error)
        return await self._launch()

    async def _launch(self) -> GradingProcess:
        process = await GradingProcess.launch(self._spec, shortcuts=self._shortcuts)
        self._processes.add(process)
        return process

    async def _reap(self, process: GradingProcess) -> None:
        if await process.reap():
            self._processes.discard(process)


def _task(work: Coroutine[Any, Any, GradingProcess]) -> asyncio.Task[GradingProcess]:
    task = asyncio.create_task(work, name="spare grading process")
    # A spare that cannot be started is reported by whoever takes it; until then asyncio must not complain.
    task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return task


async def _as_it_is(process: GradingProcess) -> GradingProcess:
    return process
