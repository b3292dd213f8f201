"""Background tasks of a rollout pool, and its failure: nothing of it dies silently."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from sapo_ray.errors import TrainingFailed
from sapo_ray.rollout.remote import RemoteWorker

Result = TypeVar("Result")


class Supervised:
    """Keeps tasks, tells of changes, and fails once and for good. All methods belong to one event loop."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._failure: TrainingFailed | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        """Those among them that end a worker."""
        self._changed = asyncio.Event()

    async def until_failed(self) -> TrainingFailed:
        """Return why the pool cannot go on (it failed, or was closed): for an owner that waits for something else."""
        while self._failure is None:
            await self._changed.wait()
        return self._failure

    def _event(self, kind: str, worker: RemoteWorker, **details: Any) -> None:
        self.events.put_nowait({"kind": kind, "worker": worker.id, **details})

    def _background(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._endings.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(TrainingFailed(f"the rollout pool failed: {error!r}"))

    def _fail(self, failure: TrainingFailed) -> None:
        """Nothing of the pool may die silently: the journal, `until_failed` and every caller get the first failure."""
        if self._failure is None:
            self._failure = failure
            self.events.put_nowait({"kind": "pool_failed", "worker": "rollout pool", "reason": str(failure)})
            self._notify()

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise TrainingFailed(str(self._failure))

    async def _wait_for_change(self) -> None:
        self._check_failure()
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
