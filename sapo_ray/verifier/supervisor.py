"""Grading processes that may hang, crash, leak or be attacked, and the supervisor that never waits for them.

    grade_many -> queue --(a window of requests)--> process of a slot --(frames, in order)--> gradings
                    ^                                      |
                    '--- the others of the window <--- killed at the deadline, or dead: the first of the window is
                                                       suspected, and run alone in a fresh process before it is
                                                       believed

Who waits for whom: a slot waits for pending items or the death of its idle process, and for a frame until the deadline
of the item that its process is at. Once a process is at it, an item takes at most two deadlines and two replacements;
a replacement comes from a spare that is already warm.

The clock of an item starts when the child starts it, which is when the item before it was answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.errors import WorkerLost
from sapo_ray.types import Grading
from sapo_ray.verifier.jobs import GradingItem, JobQueue, SupervisorStats
from sapo_ray.verifier.slot import Slot
from sapo_ray.verifier.stock import ProcessStock

log = logging.getLogger(__name__)


class GradingProcesses:
    """`spec.processes` grading processes and a warm spare, in the running event loop. Needs no Ray.

    Args:
        shortcuts: see equality.Comparer; off only to measure.
    """

    def __init__(self, spec: VerifierSpec, *, shortcuts: bool = True) -> None:
        self._spec = spec
        self._queue = JobQueue(spec)
        self._stock = ProcessStock(spec, shortcuts=shortcuts)
        self._slots: list[asyncio.Task[None]] = []
        self._running = False

    async def start(self) -> None:
        """Every process and the spare ready; bounded by child.START_S.

        Raises:
            ConfigError, ResourceError, WorkerLost, DeadlineExceeded: see GradingProcess.launch; all are ended then.
        """
        try:
            processes = await self._stock.start(self._spec.processes)
        except BaseException:
            await self._stock.close()
            raise
        reproduced: Counter[str] = Counter()
        for number, process in enumerate(processes):
            slot = Slot(self._spec, self._queue, self._stock, reproduced, process)
            task = asyncio.create_task(slot.run(), name=f"grading slot {number}")
            task.add_done_callback(self._slot_ended)
            self._slots.append(task)
        self._running = True

    async def grade_many(self, items: Sequence[GradingItem]) -> list[Grading]:
        """Gradings in the order of the items. Every item ends: the module's text gives the bound.

        Raises:
            WorkerLost: the supervisor is not running, or was closed meanwhile.
        """
        return list(await asyncio.gather(*[self.submit(item) for item in items]))

    def submit(self, item: GradingItem) -> asyncio.Future[Grading]:
        """One item; the future brings its grading. Cancelling it drops the item if it has not been sent."""
        self._must_run()
        return self._queue.add("grade", item)

    async def usable_golds(self, golds: Sequence[str]) -> list[bool]:
        """Which references parse, each within the deadline; same order. Raises as grade_many does."""
        self._must_run()
        jobs = [self._queue.add("gold", GradingItem(completion="", gold=gold)) for gold in golds]
        return list(await asyncio.gather(*jobs))

    def stats(self) -> SupervisorStats:
        """A copy."""
        stats = self._queue.stats
        return replace(stats, live=len(self._stock.living), pending=len(self._queue), errors=Counter(stats.errors))

    def pids(self) -> list[int]:
        """Of the living processes, the spare included."""
        return [process.pid for process in self._stock.living]

    async def close(self) -> None:
        """Ends all processes, bounded by child.REAP_S; what still waits gets WorkerLost."""
        self._running = False
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        await self._stock.close()
        self._queue.fail_all(WorkerLost("the verifier was closed while gradings were waiting"))

    def _must_run(self) -> None:
        if not self._running:
            raise WorkerLost("the verifier is not running: start() comes first, and nothing after close()")

    def _slot_ended(self, slot: asyncio.Task[None]) -> None:
        """A slot ends only by close(). Anything else is a defect of ours, told to whoever waits."""
        if slot.cancelled() or (error := slot.exception()) is None:
            return
        log.error("%s failed", slot.get_name(), exc_info=error)
        self._running = False
        self._queue.fail_all(WorkerLost(f"{slot.get_name()} failed: {type(error).__name__}: {error}"))
