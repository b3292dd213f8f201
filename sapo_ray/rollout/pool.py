"""The pool of rollout workers: who samples, who takes weights over, who is replaced.

    generate   a group -> the least loaded attested worker; its death is a WorkerLost to the caller at once
    update     published weights -> every worker, each attested; one that fails is ended and replaced
    replace    in the background: start, newest published weights, canary, and only then used

The learner is never asked again: workers that join take the last published buckets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import ray

from sapo_ray.config.spec import JobSpec
from sapo_ray.diagnosis.vitals import Activity
from sapo_ray.errors import DeadlineExceeded, NoWorker, SapoRayError, TrainingFailed, WeightsRefused, WorkerLost
from sapo_ray.placement import wants_gpus
from sapo_ray.rollout.remote import Ref, RemoteWorker, WorkerInfo, WorkerState
from sapo_ray.rollout.replacements import REPLACEMENTS, Replacements
from sapo_ray.types import CompletionMeta, GroupRequest, Published, Takeover

STUCK = 0.95
"""A worker that finishes no completion for this share of rollout.group_deadline_s, while it has some, is lost too."""


class RolloutPool:
    """Rollout workers of one job. Lives in the driver; Ray must be initialised. All methods belong to one event loop.

    `events` gets a dict for every change that the journal should hold: kind (`worker_ready`, `worker_lost`,
    `takeover_failed`, `worker_not_replaced`, `worker_stopped`, `pool_failed`), worker, reason or version.

    A pool fails for good when its last worker is not replaced or its own code breaks: every call from then on raises
    TrainingFailed, and `until_failed` returns it.
    """

    def __init__(self, spec: JobSpec, model_path: str) -> None:
        self._spec, self._model_path = spec, model_path
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._workers: dict[int, RemoteWorker] = {}
        self._replacements = Replacements()
        self._generation: dict[int, int] = {}
        self._published: Published | None = None
        self._pushed_to: frozenset[str] = frozenset()
        self._noise: Takeover | None = None
        self._last_loss: SapoRayError | None = None
        self._failure: TrainingFailed | None = None
        self._coming: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._closing = False
        self._gpus = False

    async def start(self) -> None:
        """Start all workers; raises what the first failing one raised, after ending the others."""
        self._gpus = wants_gpus(ray.cluster_resources().get("GPU", 0) > 0)
        try:
            async with asyncio.TaskGroup() as group:
                for slot in range(self._spec.rollout.workers):
                    group.create_task(self._start_worker(self._spawn(slot)))
        except ExceptionGroup as errors:
            await self.close()
            raise errors.exceptions[0] from None

    async def close(self) -> None:
        """End every worker and every process of them. Who waits, and every later call, gets TrainingFailed."""
        self._closing = True
        self._failure = self._failure or TrainingFailed("the rollout pool is closed")
        for task in self._tasks - self._endings:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        workers, self._workers = list(self._workers.values()), {}
        self._notify()
        await asyncio.gather(*(worker.stop() for worker in workers))

    def workers(self) -> list[WorkerInfo]:
        """All workers that exist, starting ones included."""
        return [worker.info() for worker in self._workers.values()]

    def activity(self) -> list[Activity]:
        """What every worker that has something to do is at."""
        return [one for worker in self._workers.values() if (one := worker.activity()) is not None]

    def living(self) -> int:
        """Workers that sample, or are just taking weights over."""
        return len(self._ready())

    async def until_failed(self) -> TrainingFailed:
        """Return why the pool cannot go on (it failed, or was closed): for an owner that waits for something else."""
        while self._failure is None:
            await self._changed.wait()
        return self._failure

    def push_targets(self) -> list[Any]:
        """Actors for a native weight push, which `update` must follow; all others take the buckets."""
        # Not into one that is just taking older weights over: two updates at once would break its engine.
        ready = [worker for worker in self._ready() if not worker.bringing.locked()]
        self._pushed_to = frozenset(worker.id for worker in ready)
        return [worker.actor for worker in ready]

    async def generate(self, request: GroupRequest) -> AsyncGenerator[tuple[CompletionMeta, Ref], None]:
        """Yield (meta, ref of the payload) of each completion as it finishes, all from one worker.

        rollout.group_deadline_s bounds the wait for a worker and then, anew, the sampling. Raises WorkerLost when the
        worker dies, NoWorker or DeadlineExceeded at these bounds, TrainingFailed when no worker is left. What was
        yielded before stays good.
        """
        self._check_failure()
        clock = asyncio.get_running_loop().time
        worker = await self._attested_worker(request)
        deadline = clock() + self._spec.rollout.group_deadline_s
        worker.in_flight += len(request.samples)
        if worker.in_flight == len(request.samples):
            worker.last_progress = clock()  # it was idle until now
        try:
            async with aclosing(worker.generate(request, deadline)) as completions:
                async for completion in completions:
                    yield completion
        except (WorkerLost, WeightsRefused) as error:
            self._lose(worker, error)
            raise WorkerLost(str(error)) from None
        finally:
            worker.in_flight -= len(request.samples)
            silent = clock() - worker.last_progress
            if silent > STUCK * self._spec.rollout.group_deadline_s:
                self._lose(worker, DeadlineExceeded(f"{worker.id} finished nothing at all for {silent:.0f} s"))
            self._notify()

    async def update(self, published: Published) -> list[Takeover]:
        """Bring all live workers to `published`; return once those that can be are attested, at least one.

        Raises TrainingFailed when none is left, DeadlineExceeded when none is attested within deadlines.publish_s.
        """
        self._check_failure()
        self._published = published
        ready = [worker for worker in self._ready() if published.buckets or worker.id in self._pushed_to]
        takeovers = [takeover for takeover in await asyncio.gather(*map(self._bring, ready)) if takeover]
        if takeovers:
            return takeovers
        try:
            async with asyncio.timeout(self._spec.deadlines.publish_s):
                while not (attested := [worker.takeover for worker in self._usable() if worker.takeover]):
                    await self._wait_for_change()
        except TimeoutError:
            raise DeadlineExceeded(
                f"no rollout worker took weights {published.manifest.version} over within "
                f"{self._spec.deadlines.publish_s:g} s (deadlines.publish_s); last failure: {self._last_loss}"
            ) from None
        return attested

    async def scale(self, workers: int) -> None:
        """Aim at so many workers: start missing ones in the background, or let surplus ones finish and end."""
        for slot in range(workers):
            if slot not in self._workers and slot not in self._coming:
                self._replacements.renew(slot)
                self._add(slot)
        for slot, worker in list(self._workers.items()):
            if slot >= workers and worker.state in (WorkerState.STARTING, WorkerState.READY):
                worker.state = WorkerState.DRAINING
                self._background(self._drain(worker))

    def _usable(self) -> list[RemoteWorker]:
        """Workers that hold the newest weights, or attested ones that are just being replaced by them."""
        newest = self._published.manifest.version if self._published else None
        holding = [worker for worker in self._ready() if worker.takeover]
        return [worker for worker in holding if worker.version == newest or worker.bringing.locked()]

    def _ready(self) -> list[RemoteWorker]:
        return [worker for worker in self._workers.values() if worker.state is WorkerState.READY]

    async def _attested_worker(self, request: GroupRequest) -> RemoteWorker:
        try:
            async with asyncio.timeout(self._spec.rollout.group_deadline_s):
                while not (usable := self._usable()):
                    await self._wait_for_change()
        except TimeoutError:
            raise NoWorker(
                f"no attested rollout worker for group {request.group_id} within "
                f"{self._spec.rollout.group_deadline_s:g} s (rollout.group_deadline_s); last failure: {self._last_loss}"
            ) from None
        return min(usable, key=lambda worker: worker.in_flight)

    def _spawn(self, slot: int) -> RemoteWorker:
        number = self._generation[slot] = self._generation.get(slot, -1) + 1
        name = f"rollout-{slot}" + (f".{number}" if number else "")
        worker = self._workers[slot] = RemoteWorker(self._spec, self._model_path, name, slot, self._gpus)
        return worker

    async def _start_worker(self, worker: RemoteWorker) -> None:
        await worker.start(self._noise, self._spec.deadlines.start_s)
        if worker.state is WorkerState.STARTING:
            worker.state = WorkerState.READY
        self._background(self._watch(worker))

    def _add(self, slot: int) -> None:
        self._coming.add(slot)
        self._background(self._join(slot))

    async def _join(self, slot: int) -> None:
        """Start a worker, and bring it to the newest weights; it is lost like any other when that fails."""
        worker = self._spawn(slot)
        self._coming.discard(slot)
        try:
            await self._start_worker(worker)
        except SapoRayError as error:
            self._lose(worker, error)
            return
        if self._published is not None and self._published.buckets:
            await self._bring(worker)

    async def _bring(self, worker: RemoteWorker) -> Takeover | None:
        """Bring a worker to the newest weights, however often they change meanwhile. None when it was lost."""
        async with worker.bringing:
            worker.bringing_since = asyncio.get_running_loop().time()
            while (published := self._published) and worker.version != published.manifest.version:
                pushed = worker.id in self._pushed_to and published.manifest.transport != "shared_memory"
                offer = replace(published, buckets=()) if pushed else published
                try:
                    takeover = await worker.take_over(offer, self._spec.deadlines.publish_s)
                except SapoRayError as error:
                    version = str(published.manifest.version)
                    self._event("takeover_failed", worker, version=version, reason=str(error))
                    self._lose(worker, error)
                    return None
                if worker.takeover is None:
                    self._event("worker_ready", worker, version=str(takeover.version), seconds=takeover.seconds)
                worker.takeover = takeover
                self._noise = self._noise or takeover
        self._notify()
        return worker.takeover

    async def _watch(self, worker: RemoteWorker) -> None:
        self._lose(worker, await worker.until_lost())

    def _lose(self, worker: RemoteWorker, reason: SapoRayError) -> None:
        """Use a worker no more, from this moment on; end it, and replace it if its slot has replacements left."""
        if self._closing or worker.state in (WorkerState.LOST, WorkerState.STOPPED):
            return
        wanted = worker.state is not WorkerState.DRAINING
        worker.state = WorkerState.LOST
        del self._workers[worker.slot]
        self._last_loss = reason
        self._event("worker_lost", worker, reason=str(reason))
        self._endings.add(self._background(worker.kill()))
        if wanted and self._may_replace(worker):
            self._add(worker.slot)
        if not self._workers and not self._coming:
            self._fail(TrainingFailed(f"no rollout worker is left; the last one: {reason}"))
        self._notify()

    def _may_replace(self, worker: RemoteWorker) -> bool:
        if self._replacements.take(worker.slot, asyncio.get_running_loop().time()):
            return True
        self._event("worker_not_replaced", worker, reason=f"lost {REPLACEMENTS + 1} times within an hour")
        return False

    async def _drain(self, worker: RemoteWorker) -> None:
        """Let a surplus worker finish what it samples, no longer than a group may take, then end it."""
        with suppress(TimeoutError, TrainingFailed):
            async with asyncio.timeout(self._spec.rollout.group_deadline_s):
                while worker.in_flight:
                    await self._wait_for_change()
        if worker.state is WorkerState.DRAINING:
            del self._workers[worker.slot]
            self._event("worker_stopped", worker, reason="scaled down")
            await worker.stop()

    def _event(self, kind: str, worker: RemoteWorker, **details: Any) -> None:
        self.events.put_nowait({"kind": kind, "worker": worker.id, **details})

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
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
