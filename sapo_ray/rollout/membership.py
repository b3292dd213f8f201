"""Which rollout workers there are: started, joined, drained, lost, replaced.

pending -- the cluster has room --> starting --> ready -- surplus --> draining --> stopped
   |                                   |      |    ^  |                |    |
   |                                   |      v    |  v                |    |
   |                                   |      behind  <- wanted again -+    |
   +-----------------------------------+-----------+------------------------+--> lost --> replaced, unless it drained

scale      another number wanted: missing workers are added in the background, surplus ones drained
draining   no new groups, and rollout.drain_timeout_s to finish those it has; then they are given back (WorkerDrained)
behind     not used until it has taken the newest weights over, which nobody waits for: see pool.py
pending    no room in the cluster: wanted all the same, and placed as soon as a node has room; costs no replacement
lost       replaced REPLACEMENTS times within an hour; then the pool shrinks, and below its minimum it fails
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from contextlib import suppress

import ray

from sapo_ray.config.spec import JobSpec
from sapo_ray.diagnosis.causes import CLUSTER
from sapo_ray.diagnosis.vitals import Activity
from sapo_ray.errors import DeadlineExceeded, SapoRayError, TrainingFailed
from sapo_ray.placement import wants_gpus
from sapo_ray.rollout.remote import RemoteWorker, WorkerInfo, WorkerState
from sapo_ray.rollout.replacements import REPLACEMENTS, Replacements
from sapo_ray.rollout.supervision import Supervised
from sapo_ray.types import Published, Takeover, WorkerCount

PLACED_S = 10.0
"""A worker that the cluster has no room for within this is `pending`."""
BEGIN_S = 60.0
"""A job waits so long for the last of the workers that it begins with, if those that it has are enough: nodes may be on
their way."""
LOOK_S = 1.0
"""Longest time between two looks at whether there is room."""
COMING = (WorkerState.PENDING, WorkerState.STARTING)
KEPT_FIRST = (WorkerState.READY, WorkerState.BEHIND, WorkerState.STARTING, WorkerState.PENDING)


class Membership(Supervised):
    """The workers of a pool. All methods belong to one event loop."""

    def __init__(self, spec: JobSpec, model_path: str) -> None:
        super().__init__()
        self._spec, self._model_path = spec, model_path
        self._wanted, self._minimum = spec.rollout.workers, spec.rollout.min_workers
        self._workers: dict[int, RemoteWorker] = {}
        """By slot, each with its own budget of replacements."""
        self._given_up: set[int] = set()
        """Slots whose budget is spent; wanted, but not filled until the pool is scaled again."""
        self._replacements = Replacements()
        self._generation: dict[int, int] = {}
        self._published: Published | None = None
        self._noise: Takeover | None = None
        self._last_loss: SapoRayError | None = None
        self._drains: dict[str, asyncio.Task[None]] = {}
        self._closing = False
        self._gpus = False
        self._asked_for = ""
        """What the cluster had no room for, when it was found: asking the cluster each time would hold up the loop."""

    async def start(self) -> None:
        """Start the workers that the job begins with.

        Returns when all are ready; or when at least rollout.min_workers are and the cluster has no room for the others,
        which then join as soon as it has. Raises what the first failing one raised, after ending the others;
        DeadlineExceeded when there is no room for the minimum within deadlines.start_s.
        """
        self._gpus = wants_gpus(ray.cluster_resources().get("GPU", 0) > 0)
        starts = [asyncio.create_task(self._start_worker(self._spawn(slot))) for slot in range(self._wanted)]
        joining = dict(zip(self._workers.values(), starts, strict=True))
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            while waiting := [task for task in starts if not task.done()]:
                await asyncio.wait(waiting, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                for task in starts:
                    if task.done():
                        task.result()
                states = [worker.state for worker in joining]
                placed = len(states) - states.count(WorkerState.PENDING)
                waited = clock() - began
                if WorkerState.STARTING not in states and placed >= self._minimum and waited > BEGIN_S:
                    break
                if placed < self._minimum and waited > self._spec.deadlines.start_s:
                    raise DeadlineExceeded(
                        f"the cluster has room for {placed} rollout workers, and at least "
                        f"{self._minimum} are needed (rollout.min_workers): {self._asked()} within "
                        f"{self._spec.deadlines.start_s:g} s (deadlines.start_s); add nodes, or lower it"
                    )
        except BaseException:
            for task in starts:
                task.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.close()
            raise
        for worker, task in joining.items():
            if not task.done():
                self._background(self._join(worker, task))

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
        """What every worker that has something to do is at; the cluster, while too few have room in it."""
        at_work = [one for worker in self._workers.values() if (one := worker.activity()) is not None]
        pending = [worker for worker in self._staying() if worker.state is WorkerState.PENDING]
        if not pending or len(self._staying()) - len(pending) >= self._minimum:
            return at_work
        since = time.time() - (asyncio.get_running_loop().time() - min(worker.last_progress for worker in pending))
        task = f"making room for {', '.join(worker.id for worker in pending[:3])}"
        return [*at_work, Activity(name=CLUSTER, kind="place", task=task, since=since, progress=since)]

    def living(self) -> int:
        """Workers that sample, or are just taking newer weights over."""
        return sum(worker.takeover is not None for worker in self._ready())

    def count(self) -> WorkerCount:
        """How many workers are wanted, and what those that exist are at."""
        states = [worker.state for worker in self._workers.values()]
        ready = self.living()
        joining = states.count(WorkerState.READY) - ready + states.count(WorkerState.BEHIND)
        return WorkerCount(
            wanted=self._wanted,
            ready=ready,
            starting=states.count(WorkerState.STARTING) + joining,
            pending=states.count(WorkerState.PENDING),
            draining=states.count(WorkerState.DRAINING),
            given_up=len(self._given_up),
            asked=self._asked_for if WorkerState.PENDING in states else "",
            last_loss=str(self._last_loss or ""),
            nodes=tuple(sorted({info.address for info in self.workers() if info.address})),
        )

    def scale(self, workers: int, minimum: int) -> None:
        """Aim at so many workers, of which `minimum` are what the pool must not fall below."""
        self._minimum = minimum
        if workers == self._wanted or self._failure is not None:
            return
        self._wanted = workers
        self._given_up.clear()
        staying = sorted(self._staying(), key=lambda worker: (KEPT_FIRST.index(worker.state), worker.slot))
        for worker in staying[workers:]:
            worker.state = WorkerState.DRAINING
            self._drains[worker.id] = self._background(self._drain(worker))
        # One that holds weights; one that was only starting is left to its end.
        holding = [w for w in self._workers.values() if w.state is WorkerState.DRAINING and w.takeover is not None]
        for worker in holding[: max(0, workers - len(staying))]:
            self._keep(worker)
        for _ in range(workers - len(self._staying())):
            slot = next(slot for slot in range(len(self._workers) + 1) if slot not in self._workers)
            self._replacements.renew(slot)
            self._add(slot)
        self._notify()

    # --- starting and joining --------------------------------------------------------------------------------------

    def _staying(self) -> list[RemoteWorker]:
        return [worker for worker in self._workers.values() if worker.state is not WorkerState.DRAINING]

    def _ready(self) -> list[RemoteWorker]:
        return [worker for worker in self._workers.values() if worker.state is WorkerState.READY]

    def _spawn(self, slot: int) -> RemoteWorker:
        number = self._generation[slot] = self._generation.get(slot, -1) + 1
        name = f"rollout-{slot}" + (f".{number}" if number else "")
        worker = self._workers[slot] = RemoteWorker(self._spec, self._model_path, name, slot, self._gpus)
        return worker

    def _add(self, slot: int, after: str = "") -> None:
        worker = self._spawn(slot)
        worker.after = after
        self._background(self._join(worker, self._start_worker(worker)))

    async def _start_worker(self, worker: RemoteWorker) -> None:
        await self._place(worker)
        if worker.state not in COMING:
            return  # nobody wants it any more
        await worker.start(self._noise, self._spec.deadlines.start_s)
        if worker.state is WorkerState.STARTING:
            worker.state = WorkerState.READY
        self._background(self._watch(worker))

    async def _place(self, worker: RemoteWorker) -> None:
        """Return once the cluster has room for the worker, however long that takes, or nobody wants it any more."""
        clock = asyncio.get_running_loop().time
        overdue = clock() + PLACED_S
        while worker.state in COMING and not await worker.placed(LOOK_S):
            if worker.state is WorkerState.STARTING and clock() > overdue:
                worker.state = WorkerState.PENDING
                self._asked_for = self._asked()
                self._event("worker_pending", worker, reason=self._asked_for)
        if worker.state is WorkerState.PENDING:
            worker.state = WorkerState.STARTING

    async def _join(self, worker: RemoteWorker, start: Awaitable[None]) -> None:
        """Start a worker, and bring it to the newest weights; it is lost like any other when that fails."""
        try:
            await start
        except SapoRayError as error:
            self._lose(worker, error)
            return
        if worker.state is WorkerState.READY:
            await self._catch_up(worker)

    async def _bring(self, worker: RemoteWorker) -> Takeover | None:
        """Bring a worker to the newest weights. None when it was lost."""
        raise NotImplementedError

    def _asked(self) -> str:
        """What the cluster has no room for, in words."""
        kind, amount = ("GPU", self._spec.rollout.tensor_parallel) if self._gpus else ("CPU", 1)
        if self._gpus and self._spec.transport == "ipc":
            return "each asks for half a GPU beside a learner rank"
        return f"each asks for {amount} {kind}, the cluster has {ray.cluster_resources().get(kind, 0):g} in all"

    # --- ending and replacing --------------------------------------------------------------------------------------

    async def _watch(self, worker: RemoteWorker) -> None:
        self._lose(worker, await worker.until_lost())

    def _lose(self, worker: RemoteWorker, reason: SapoRayError) -> None:
        """Use a worker no more, from this moment on; end it, and replace it if its slot has replacements left."""
        if self._closing or worker.state in (WorkerState.LOST, WorkerState.STOPPED):
            return
        wanted = worker.state is not WorkerState.DRAINING
        worker.state = WorkerState.LOST
        del self._workers[worker.slot]
        self._drains.pop(worker.id, None)
        self._last_loss = reason
        self._event("worker_lost", worker, reason=str(reason))
        self._endings.add(self._background(worker.kill()))
        if wanted and self._may_replace(worker):
            self._add(worker.slot, f"{worker.id}: {reason}")
        elif wanted:
            self._shrink(worker, reason)
        self._notify()

    def _may_replace(self, worker: RemoteWorker) -> bool:
        return self._replacements.take(worker.slot, asyncio.get_running_loop().time())

    def _shrink(self, worker: RemoteWorker, reason: SapoRayError) -> None:
        """Go on with one worker fewer, if that is not below the minimum."""
        self._given_up.add(worker.slot)
        why = f"lost {REPLACEMENTS + 1} times within an hour"
        self._event("worker_not_replaced", worker, reason=why)
        left = len(self._staying())
        if left >= self._minimum:
            return
        few = f"{left} of at least {self._minimum} rollout workers (rollout.min_workers) are left"
        self._fail(TrainingFailed(f"{few}: slot {worker.slot} was {why}; the last one: {reason}"))

    async def _drain(self, worker: RemoteWorker) -> None:
        """Let a surplus worker finish what it samples, within rollout.drain_timeout_s; take the rest back; end it."""
        with suppress(TimeoutError, TrainingFailed):
            async with asyncio.timeout(self._spec.rollout.drain_timeout_s):
                while worker.in_flight:
                    await self._wait_for_change()
        if worker.state is WorkerState.DRAINING:
            given_back = worker.recall("was scaled away")
            del self._workers[worker.slot]
            self._event("worker_stopped", worker, reason="scaled down", given_back=given_back)
            self._drains.pop(worker.id, None)
            self._notify()
            self._endings.add(self._background(worker.stop()))  # not here: `close` cancels a drain, but waits for ends

    def _keep(self, worker: RemoteWorker) -> None:
        """A worker that drains is wanted again: it takes the weights that it missed, and goes on."""
        self._drains.pop(worker.id).cancel()
        newest = self._published.manifest.version if self._published and self._published.buckets else worker.version
        worker.state = WorkerState.READY if worker.version == newest else WorkerState.BEHIND
        worker.recalled = ""
        self._event("worker_kept", worker, reason="scaled up while it drained")
        self._background(self._catch_up(worker))

    async def _catch_up(self, worker: RemoteWorker) -> None:
        if self._published is not None and self._published.buckets:
            await self._bring(worker)
