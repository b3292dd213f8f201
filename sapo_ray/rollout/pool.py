"""The pool of rollout workers: who samples, and who takes weights over. Which workers there are: membership.py.

    generate   a group -> the least loaded attested worker; its death is a WorkerLost to the caller at once
    update     published weights -> every worker, each attested; one that fails is ended and replaced, one that hangs
               is left behind: it gives back what it samples, and is used again once it has the newest
    join       in the background: start, newest published weights, canary, and only then used

The learner is never asked again: workers that join take the last published buckets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import DeadlineExceeded, NoWorker, SapoRayError, WeightsRefused, WorkerLost
from sapo_ray.rollout.choosing import LeastLoaded
from sapo_ray.rollout.membership import Membership
from sapo_ray.rollout.remote import Ref, RemoteWorker, WorkerState
from sapo_ray.types import CompletionMeta, GroupRequest, Published, Takeover

STUCK = 0.95
"""A worker that finishes no completion for this share of rollout.group_deadline_s, while it has some, is lost too."""
BEHIND_S = 10.0
"""Once one worker has taken weights over, the others have as long again as that took, and so long at least."""


class RolloutPool(Membership):
    """Rollout workers of one job. Lives in the driver; Ray must be initialised. All methods belong to one event loop.

    `events` gets a dict for every change that the journal should hold: kind (`worker_ready`, `worker_lost`,
    `takeover_failed`, `worker_behind`, `worker_caught_up`, `worker_not_replaced`, `worker_pending`, `worker_kept`,
    `worker_stopped`, `pool_failed`), worker, reason or version.

    A pool fails for good when fewer workers than its minimum are left and not replaced, or its own code breaks: every
    call from then on raises TrainingFailed, and `until_failed` returns it.
    """

    def __init__(self, spec: JobSpec, model_path: str) -> None:
        super().__init__(spec, model_path)
        self._pushed_to: frozenset[str] = frozenset()
        self._choice = LeastLoaded(self._usable, self._is_usable)

    def push_targets(self) -> list[Any]:
        """Actors for a native weight push, which `update` or `push_failed` must follow; all others take the buckets."""
        # Not into one that is just taking older weights over: two updates at once would break its engine.
        ready = [worker for worker in self._ready() if not worker.bringing.locked()]
        self._pushed_to = frozenset(worker.id for worker in ready)
        return [worker.actor for worker in ready]

    def push_failed(self) -> None:
        """The learner was lost while it published: an engine with half a native push in it must not sample again."""
        if self._spec.transport != "shared_memory":
            for worker in [worker for worker in self._ready() if worker.id in self._pushed_to]:
                self._lose(worker, WeightsRefused(f"the learner was lost while it pushed weights into {worker.id}"))
        self._pushed_to = frozenset()

    async def generate(self, request: GroupRequest) -> AsyncGenerator[tuple[CompletionMeta, Ref], None]:
        """Yield (meta, ref of the payload) of each completion as it finishes, all from one worker.

        rollout.group_deadline_s bounds the wait for a worker and then, anew, the sampling. Raises WorkerLost when the
        worker dies, WorkerDrained when it is scaled away or left behind, NoWorker or DeadlineExceeded at these bounds,
        TrainingFailed when the pool failed. What was yielded before stays good.
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
        """Bring all live workers to `published`; return once one is attested, and each other is as well, or lost,
        or left behind (BEHIND_S).

        Raises TrainingFailed when none is left, DeadlineExceeded when none is attested within deadlines.publish_s.
        """
        self._check_failure()
        self._published = published
        ready = [worker for worker in self._ready() if published.buckets or worker.id in self._pushed_to]
        if takeovers := await self._bring_all(ready):
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

    async def _bring_all(self, workers: list[RemoteWorker]) -> list[Takeover]:
        """Bring workers to the newest weights; one that hangs or is far slower than the first is left behind."""
        clock = asyncio.get_running_loop().time
        began = clock()
        bringing = {self._background(self._bring(worker)): worker for worker in workers}
        waiting = set(bringing)
        while waiting and not any(task.result() for task in bringing.keys() - waiting):
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            self._check_failure()
        if waiting:
            patience = max(BEHIND_S, clock() - began)
            _, waiting = await asyncio.wait(waiting, timeout=patience)
            self._check_failure()
            for task in waiting:
                self._leave_behind(bringing[task], clock() - began)
        return [takeover for task in bringing.keys() - waiting if (takeover := task.result())]

    def _leave_behind(self, worker: RemoteWorker, seconds: float) -> None:
        """Use a worker no more until it has the newest weights; its groups go to others, which may take none older."""
        if worker.state is WorkerState.READY:
            worker.state = WorkerState.BEHIND
            why = "did not take weights over in time"
            given_back = worker.recall(why)
            self._event("worker_behind", worker, reason=f"{why}: {seconds:.1f} s and more", given_back=given_back)
            self._notify()

    def _usable(self) -> list[RemoteWorker]:
        """Workers that hold the newest weights, or attested ones that are just being replaced by them."""
        return [worker for worker in self._workers.values() if self._is_usable(worker)]

    def _is_usable(self, worker: RemoteWorker) -> bool:
        if worker.state is not WorkerState.READY or worker.takeover is None:
            return False
        newest = self._published.manifest.version if self._published else None
        return worker.takeover.version == newest or worker.bringing.locked()

    async def _attested_worker(self, request: GroupRequest) -> RemoteWorker:
        try:
            async with asyncio.timeout(self._spec.rollout.group_deadline_s):
                while (chosen := self._choice.choose()) is None:
                    await self._wait_for_change()
        except TimeoutError:
            raise NoWorker(
                f"no attested rollout worker for group {request.group_id} within "
                f"{self._spec.rollout.group_deadline_s:g} s (rollout.group_deadline_s); last failure: {self._last_loss}"
            ) from None
        return chosen

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
            if worker.state is WorkerState.BEHIND:
                worker.state, worker.recalled = WorkerState.READY, ""
                self._event("worker_caught_up", worker, version=str(worker.version))
        self._notify()
        return worker.takeover
