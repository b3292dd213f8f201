"""The learner ranks as one: starts them, runs each verb on all of them, and ends them together.

Ranks work in collectives, so a rank that dies leaves the others waiting. Every call therefore watches all ranks at
once: the first failure ends the call, the remaining ranks are killed, and the caller hears which rank was lost. Every
wait has a bound and a name. A group that failed is `lost` until `restart` has put new ranks in its place, which then
load a checkpoint.

    spec.deadlines.start_s       actors placed, model loaded, engines ready
    spec.deadlines.step_s        train
    spec.deadlines.publish_s     publish
    spec.deadlines.checkpoint_s  save, load
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from sapo_ray.algorithms.diagnostics import TokenStats
from sapo_ray.config.spec import JobSpec
from sapo_ray.diagnosis.vitals import Activity
from sapo_ray.errors import DeadlineExceeded, PayloadLost, ResourceError, SapoRayError, WorkerLost
from sapo_ray.learner.batching import plan_step
from sapo_ray.learner.engine import Place
from sapo_ray.learner.reports import RankInfo, StepReport, UpdateReport, step_report
from sapo_ray.learner.room import Room, check_object_store
from sapo_ray.learner.worker import LearnerWorker
from sapo_ray.lost_payloads import payload_lost
from sapo_ray.types import PolicyVersion, Published, TrainSample, WeightsManifest
from sapo_ray.weights.canary import canary_sequences

DEATH_NOTICE_S = 5.0
"""How long after a rank's error another rank's death may become known: a peer's death shows first as a broken
connection in a collective, and only then as the death of an actor."""


class LearnerGroup:
    """All learner ranks. Ray must be initialised; calls must not overlap."""

    def __init__(self, spec: JobSpec, model_path: str) -> None:
        self.spec = spec
        self.model_path = model_path
        self.ranks: list[RankInfo] = []
        self.lost = False
        """A verb failed, so all ranks were ended; see restart."""
        self._canary: tuple[tuple[int, ...], ...] = ()
        self._actors: list[Any] = []
        self._room = Room(spec)
        self._version = PolicyVersion(0, 0)

    # -- start and end -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Place the ranks, connect them, load the model.

        Raises
            ResourceError: the cluster has no room for the ranks, or its object store none for published weights
            ModelError, ConfigError: the model or the settings are not supported
            WorkerLost, DeadlineExceeded: a rank failed or did not get ready; the group is closed
        """
        end = time.monotonic() + self.spec.deadlines.start_s
        await self._room.take(end)
        count = self.spec.learner.ranks
        for rank in range(count):
            place = Place(rank=rank, ranks=count, gpu=self._room.gpu, transport=self.spec.transport)
            actor = ray.remote(LearnerWorker).options(**self._room.options(rank))
            self._actors.append(actor.remote(self.spec, self.model_path, place))
        name = "learner start (deadlines.start_s)"
        host, port = await self._on_rank_0("listen", name, end)
        self.ranks = await self._on_all("setup", name, end, host, port)
        try:
            check_object_store(self.ranks[0])
        except ResourceError:
            self._kill()
            raise
        self.lost = False

    async def restart(self) -> None:
        """New ranks with the same job, canary and initial weights, in the place of those that are left.

        They have the room of the old ones, which nobody else could take meanwhile; Ray finds another for what was on a
        lost node. New processes find each other through a new store, so nothing of the old ones is joined. Raises as
        start does.
        """
        self._kill()
        await self.start()
        if self._canary:
            await self.set_canary(self._canary)

    async def close(self) -> None:
        """End all ranks and give their room back. Safe to call more than once."""
        self._kill()
        self._room.give_back()

    def activity(self) -> list[Activity]:
        """The cluster, while it has no room for the ranks."""
        return self._room.activity()

    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [info.pid for info in self.ranks]

    # -- verbs ---------------------------------------------------------------------------------------------------

    async def set_canary(self, sequences: Sequence[Sequence[int]]) -> None:
        """Sequences by which receivers of published weights are tested (I3). Raises as canary_sequences does."""
        fixed = self._canary = canary_sequences(sequences)
        end = time.monotonic() + self.spec.deadlines.publish_s
        await self._on_all("set_canary", "learner set_canary (deadlines.publish_s)", end, fixed)

    async def train(self, step: int, samples: Sequence[TrainSample]) -> StepReport:
        """All updates of one step. Payloads are passed on by ref and never opened here.

        Raises
            TrainingFailed: learner.max_nonfinite updates in a row had a non-finite gradient
            PayloadLost: a payload went with its node; nothing was done, the group is as it was
            WorkerLost: a rank died; the group is closed
            DeadlineExceeded: not done within deadlines.step_s; the group is closed
        """
        self._check_open()
        plan = plan_step(samples, self.spec, step, self._version.number)
        end = time.monotonic() + self.spec.deadlines.step_s
        seconds: dict[str, float] = defaultdict(float)

        async def timed(verb: str, *args: Any) -> list[Any]:
            started = time.monotonic()
            name = f"step {step}: learner {verb}{args or ''} (deadlines.step_s)"
            result = await self._on_all(verb, name, end, *args)
            seconds[verb] += time.monotonic() - started
            return result

        started = time.monotonic()
        calls = [
            actor.load_batch.remote(part, *(samples[i].payload for i in part.samples))
            for actor, part in zip(self._actors, plan.ranks, strict=True)
        ]
        await self._gather(calls, f"step {step}: learner load_batch (deadlines.step_s)", end, payloads=True)
        seconds["load_batch"] = time.monotonic() - started
        await timed("prepare")
        reports: list[list[UpdateReport]] = []
        for update in range(len(plan.updates)):
            await timed("forward_backward", update)
            reports.append(await timed("optim_step", update))
        stats = TokenStats()
        for part in await timed("finish_step"):
            stats.merge(part)
        return step_report(step, plan, reports, stats, dict(seconds))

    async def publish(self, version: PolicyVersion, receivers: Sequence[Any] = ()) -> Published:
        """Weights of this moment as objects owned by the caller's process.

        With a native transport (nccl, ipc) they are also pushed into `receivers`, actors of rollout workers; the
        buckets are then for workers that join later. With shared memory `receivers` is not looked at.

        Raises
            WorkerLost, DeadlineExceeded: the group is closed
        """
        end = time.monotonic() + self.spec.deadlines.publish_s
        name = f"learner publish {version} (deadlines.publish_s)"
        streams = [
            actor.publish.options(num_returns="streaming").remote(version, tuple(receivers)) for actor in self._actors
        ]
        drained = await self._race([asyncio.to_thread(_drain, stream) for stream in streams], name, end)
        buckets, manifest = drained[0]
        assert isinstance(manifest, WeightsManifest), manifest
        self._version = version
        return Published(manifest=manifest, buckets=tuple(buckets))

    async def save(self, folder: Path) -> None:
        """Write all ranks' state into an existing, empty folder. Durability and visibility are the caller's.

        Raises
            ResourceError: the disk did not take it; the ranks and their weights are as they were
            WorkerLost, DeadlineExceeded: the group is closed
        """
        refused = await self._checkpoint("save", folder)
        for rank, reason in enumerate(refused):
            if reason:
                raise ResourceError(f"learner rank {rank} could not write its part of {folder}: {reason}")

    async def load(self, folder: Path) -> None:
        """Restore what save wrote, right after start. Raises CheckpointError."""
        await self._checkpoint("load", folder)

    async def peak_publish_bytes(self) -> list[int]:
        """By rank: most bytes that publishing held at once beyond the shards."""
        end = time.monotonic() + self.spec.deadlines.publish_s
        return await self._on_all("peak_bytes", "learner peak_bytes (deadlines.publish_s)", end)

    # -- private -------------------------------------------------------------------------------------------------

    async def _checkpoint(self, verb: str, folder: Path) -> list[Any]:
        end = time.monotonic() + self.spec.deadlines.checkpoint_s
        return await self._on_all(verb, f"learner {verb} {folder} (deadlines.checkpoint_s)", end, str(folder))

    async def _on_all(self, verb: str, name: str, end: float, *args: Any) -> list[Any]:
        """One verb on all ranks; results by rank."""
        return await self._gather([getattr(actor, verb).remote(*args) for actor in self._actors], name, end)

    async def _on_rank_0(self, verb: str, name: str, end: float) -> Any:
        return (await self._gather([getattr(self._actors[0], verb).remote()], name, end))[0]

    async def _gather(
        self, refs: Sequence[ray.ObjectRef[Any]], name: str, end: float, *, payloads: bool = False
    ) -> list[Any]:
        return await self._race([asyncio.wrap_future(ref.future()) for ref in refs], name, end, payloads=payloads)

    async def _race(
        self, calls: Sequence[Awaitable[Any]], name: str, end: float, *, payloads: bool = False
    ) -> list[Any]:
        """Results by rank; or, after the first failure, the deadline or a cancellation, a closed group and an error.

        `payloads`: the calls were given some, and do not begin without them; their loss does not close the group.
        """
        self._check_open()
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            done, pending = await asyncio.wait(
                tasks, timeout=max(0.0, end - time.monotonic()), return_when=asyncio.FIRST_EXCEPTION
            )
            failed = [task for task in done if task.exception() is not None]
            if not failed and not pending:
                return [task.result() for task in tasks]
            if failed and pending:
                await asyncio.wait(pending, timeout=DEATH_NOTICE_S)
            problem = self._explain(tasks, name, payloads=payloads)
        except asyncio.CancelledError:
            self._lose()
            raise
        if not isinstance(problem, PayloadLost):
            self._lose()
        for task in tasks:
            task.cancel()  # they would fail unheard
        raise problem

    def _check_open(self) -> None:
        assert self._actors, "the learner group is not started, or was closed after a failure"

    def _explain(self, tasks: Sequence[asyncio.Future[Any]], name: str, *, payloads: bool) -> SapoRayError:
        """The error to raise: a rank's death before its consequences, a rank's own verdict before other errors."""
        errors = {rank: task.exception() for rank, task in enumerate(tasks) if task.done() and task.exception()}
        for rank, error in errors.items():
            if isinstance(error, RayActorError):
                return WorkerLost(f"{name}: rank {rank} died: {error}")
        if payloads and errors and all(payload_lost(error) for error in errors.values()):
            return PayloadLost(f"{name}: samples went with the node that held them")
        for error in errors.values():
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, SapoRayError):
                return cause
        for rank, error in errors.items():
            return WorkerLost(f"{name}: rank {rank} failed:\n{error}")
        waiting = [rank for rank, task in enumerate(tasks) if not task.done()]
        return DeadlineExceeded(f"{name}: rank {waiting} not done in time; the learner group is closed")

    def _lose(self) -> None:
        self.lost = True
        self._kill()

    def _kill(self) -> None:
        """End every rank. Their tasks fail, so that no thread is left waiting for them."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


def _drain(stream: Any) -> tuple[list[Any], Any]:
    """(refs of all items but the last, the last item) of a streaming actor method.

    Blocking, and deliberately not `async for`, which would fetch every bucket to this node; here only the manifest
    is fetched. If the method raised, its error is the last item.
    """
    refs = list(stream)
    return refs[:-1], ray.get(refs[-1]) if refs else None
