"""One rollout worker as the driver sees it: a Ray actor whose every call is bounded, named, and fails in our words."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncGenerator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar, cast

import psutil
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sapo_ray.config.spec import JobSpec
from sapo_ray.diagnosis.vitals import Activity
from sapo_ray.errors import DeadlineExceeded, SapoRayError, WorkerDrained, WorkerLost
from sapo_ray.placement import label_selector
from sapo_ray.rollout.engine import actor_environment
from sapo_ray.rollout.worker import RolloutWorker
from sapo_ray.types import CompletionMeta, GroupRequest, PolicyVersion, Published, Takeover

Ref = Any
Result = TypeVar("Result")
STOP_S = 30.0
HEARTBEAT_S = 10.0
SILENCE_S = 60.0
"""A worker that does not answer its heartbeat for so long is lost."""
RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU"}
PLACING = ThreadPoolExecutor(32, thread_name_prefix="placing")
"""Threads that wait for room in the cluster; the loop's own few are for what the run waits for."""
_CONCURRENT_CALLS = 4096  # groups in flight on one worker, and then some


class WorkerState(StrEnum):
    """`pending` ones have no room in the cluster; `ready` ones may be sampled from once they hold attested weights;
    `behind` ones did not take the newest over in time, and will; `lost` and `stopped` are ends."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    BEHIND = "behind"
    DRAINING = "draining"
    LOST = "lost"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerInfo:
    """A worker for display, and its actor for the learner's native weight push."""

    id: str
    state: WorkerState
    version: PolicyVersion | None
    """Attested weights it holds."""
    in_flight: int
    """Completions it is sampling or will sample."""
    pid: int | None
    """Of the actor; None until it is started."""
    engine_pids: tuple[int, ...]
    address: str | None
    actor: Any


def ray_remote_args(spec: JobSpec, gpus: bool) -> dict[str, Any]:
    """Options of a rollout actor: GPUs by `rollout.tensor_parallel` where the cluster has any, else one logical CPU."""
    # With ipc a learner rank has the other half of the GPU.
    share = 0.5 if spec.transport == "ipc" else spec.rollout.tensor_parallel
    resources = {"num_cpus": 0, "num_gpus": share} if gpus else {"num_cpus": 1, "num_gpus": 0}
    return resources | {
        "max_concurrency": _CONCURRENT_CALLS,
        "max_restarts": 0,
        "runtime_env": {"env_vars": actor_environment(spec, gpus)},
    }


class RemoteWorker:
    """Handle of one actor. Its errors are this package's: WorkerLost, DeadlineExceeded, or what the worker raised."""

    def __init__(self, spec: JobSpec, model_path: str, worker_id: str, slot: int, gpus: bool) -> None:
        self.id, self.slot = worker_id, slot
        self.state = WorkerState.STARTING
        self.takeover: Takeover | None = None
        self.in_flight = 0
        self.recalled = ""
        """Why what it samples is taken back, if it is."""
        self.after = ""
        """How the worker was lost whose place this one takes."""
        self.bringing = asyncio.Lock()
        self.bringing_since = 0.0
        """When the takeover under way began; the loop's clock, as below."""
        self.last_progress = asyncio.get_running_loop().time()
        self.actor: Any = None
        self._arguments = (spec, model_path, worker_id)
        self._asked = ray_remote_args(spec, gpus)
        self._room: PlacementGroup | None = None
        self._keys = itertools.count()
        self._waits: set[asyncio.Timeout] = set()
        """Of completions, those that are under way."""
        self._info: dict[str, Any] = {}
        self._processes: list[psutil.Process] = []

    @property
    def version(self) -> PolicyVersion | None:
        return self.takeover.version if self.takeover else None

    def info(self) -> WorkerInfo:
        return WorkerInfo(
            id=self.id,
            state=self.state,
            version=self.version,
            in_flight=self.in_flight,
            pid=self._info.get("pid"),
            engine_pids=tuple(self._info.get("engine_pids", ())),
            address=self._info.get("address"),
            actor=self.actor,
        )

    def activity(self) -> Activity | None:
        """What it is at; None if it has nothing to do."""
        if self.state is WorkerState.STARTING:
            kind, task, since = "start", "starting", self.last_progress
        elif self.bringing.locked():
            kind, task, since = "takeover", "taking weights over", self.bringing_since
        elif self.in_flight:
            kind, task, since = "sample", f"sampling {self.in_flight} completions", self.last_progress
        else:
            return None
        at = time.time() - (asyncio.get_running_loop().time() - since)
        after = self.after if kind == "start" else ""
        return Activity(name=self.id, kind=kind, task=task, since=at, progress=at, after=after)

    async def placed(self, wait_s: float) -> bool:
        """Whether the cluster has room for the worker, which is kept for it; waits for that no longer than this."""
        if self._room is None:
            bundle = {name: float(self._asked[key]) for key, name in RESOURCES.items() if self._asked[key]}
            where = label_selector("rollout")
            self._room = placement_group([bundle], bundle_label_selector=[where] if where else None)
        try:
            return await asyncio.get_running_loop().run_in_executor(PLACING, self._room.wait, wait_s)
        except Exception:
            if self.state in (WorkerState.LOST, WorkerState.STOPPED):  # the room was given back meanwhile
                return False
            raise

    async def start(self, noise: Takeover | None, deadline_s: float) -> None:
        """Load the model, in the room that `placed` found; the error carries the actor's own traceback."""
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._room, placement_group_bundle_index=0)
        options = self._asked | {"scheduling_strategy": strategy}
        self.last_progress = asyncio.get_running_loop().time()
        self.actor = ray.remote(RolloutWorker).options(**options).remote(*self._arguments)
        try:
            self._info = await self._call(self.actor.start.remote(noise), deadline_s, "start (deadlines.start_s)")
        except DeadlineExceeded as error:
            asked = {key: value for key, value in self._asked.items() if key.startswith("num_")}
            raise DeadlineExceeded(f"{error}; asked {asked}, free in the cluster {ray.available_resources()}") from None
        if self._info["address"] == socket.gethostname():
            try:
                self._processes = [psutil.Process(pid) for pid in (self._info["pid"], *self._info["engine_pids"])]
            except psutil.NoSuchProcess as error:
                raise WorkerLost(f"{self.id} died (start): process {error.pid} is gone") from None

    async def heartbeat(self, deadline_s: float) -> None:
        """Raises unless the worker's event loop answers."""
        self._info = await self._call(self.actor.stats.remote(), deadline_s, "answer its heartbeat")

    async def until_broken(self) -> SapoRayError:
        """Return why the worker cannot be used any more, as soon as that is so."""
        try:
            await self.actor.until_broken.remote()
        except RayError as error:
            return self._translated(error, "waiting")
        return WorkerLost(f"{self.id} ended")

    async def until_lost(self) -> SapoRayError:
        """Return why the worker is lost, as soon as it dies, breaks, or falls silent."""
        broken = asyncio.ensure_future(self.until_broken())
        try:
            while not (await asyncio.wait({broken}, timeout=HEARTBEAT_S))[0]:
                await self.heartbeat(SILENCE_S)
            return broken.result()
        except SapoRayError as error:
            return error
        finally:
            broken.cancel()

    async def take_over(self, published: Published, deadline_s: float) -> Takeover:
        """See RolloutWorker.take_over; the buckets go by reference."""
        call = self.actor.take_over.remote(published.manifest, *published.buckets)
        return await self._call(call, deadline_s, f"take over weights {published.manifest.version}")

    async def generate(
        self, request: GroupRequest, deadline: float
    ) -> AsyncGenerator[tuple[CompletionMeta, Ref], None]:
        """Completions as they finish, until `deadline` (the loop's clock); the rest is aborted when this is closed."""
        left, begin = len(request.samples), cast(GroupRequest | None, request)
        places = left
        key = f"{request.group_id}#{next(self._keys)}"
        try:
            while left:
                # Each payload is a return value of its own, owned by this process: it outlives the worker.
                metas, *payloads = self.actor.collect.options(num_returns=1 + places).remote(key, begin, places)
                finished = await self._until(metas, deadline, request)
                begin, left = None, left - len(finished)
                places = min(left, 2 * len(finished))  # room for a bigger batch; unused places cost too
                self.last_progress = asyncio.get_running_loop().time()
                for completion in zip(finished, payloads, strict=False):
                    yield completion
        finally:
            if left:
                self.actor.abort.remote(key)

    async def _until(
        self, metas: Awaitable[tuple[CompletionMeta, ...]], deadline: float, request: GroupRequest
    ) -> tuple[CompletionMeta, ...]:
        scope = asyncio.timeout_at(deadline)
        try:
            async with scope:
                self._waits.add(scope)
                if self.recalled:
                    scope.reschedule(asyncio.get_running_loop().time())
                return await metas
        except TimeoutError:
            if self.recalled or scope.when() != deadline:  # it may be used again by now
                raise self._drained(request) from None
            raise DeadlineExceeded(
                f"{self.id} did not finish group {request.group_id} in time (rollout.group_deadline_s)"
            ) from None
        except RayError as error:
            if self.recalled:
                raise self._drained(request) from None
            raise self._translated(error, f"sample group {request.group_id}") from None
        finally:
            self._waits.discard(scope)

    def _drained(self, request: GroupRequest) -> WorkerDrained:
        why = self.recalled or "was asked for it back"
        return WorkerDrained(f"{self.id} {why} before group {request.group_id} was finished")

    def recall(self, why: str) -> int:
        """Take back what is being sampled: each caller of `generate` gets WorkerDrained. Returns the number."""
        self.recalled = why
        now = asyncio.get_running_loop().time()
        for scope in self._waits:
            if not scope.expired():
                scope.reschedule(now)
        return self.in_flight

    async def stop(self) -> None:
        """End the actor and its engine, politely if it answers."""
        self.state = WorkerState.STOPPED
        if self._info:  # it is up
            with suppress(SapoRayError):  # it is killed next, which is all that is left to do
                await self._call(self.actor.stop.remote(), STOP_S, "stop")
        await self.kill()

    async def kill(self) -> None:
        """End the actor, and see to it that no process of it is left on this host."""
        if self.actor is not None:
            ray.kill(self.actor, no_restart=True)
        if self._room is not None:
            remove_placement_group(self._room)
        _, alive = await asyncio.to_thread(psutil.wait_procs, self._processes, 5)
        for process in alive:
            with suppress(psutil.NoSuchProcess):  # it ended by itself a moment ago
                process.kill()
        if alive:
            await asyncio.to_thread(psutil.wait_procs, alive, 5)

    async def _call(self, ref: Awaitable[Result], deadline_s: float, what: str) -> Result:
        try:
            async with asyncio.timeout(deadline_s):
                return await ref
        except TimeoutError:
            raise DeadlineExceeded(f"{self.id} did not {what} within {deadline_s:g} s") from None
        except RayError as error:
            raise self._translated(error, what) from None

    def _translated(self, error: RayError, what: str) -> SapoRayError:
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, SapoRayError):
                return type(error.cause)(str(error.cause))
            return WorkerLost(f"{self.id} failed to {what}:\n{error}")
        return WorkerLost(f"{self.id} died ({what}): {str(error).splitlines()[0]}")
