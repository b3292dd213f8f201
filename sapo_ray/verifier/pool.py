"""The verifier pool: actors that each own grading processes, and the dispatch to them.

    driver --grade(prompt, gold, refs)--> least loaded actor --> gradings
                                            | died, silent when asked every WATCH_S, or beyond the bound of the call
                                            '-> ended, replaced in the background; the call is repeated once elsewhere

Who waits for whom: a call waits for a living actor at most REPLACEMENT_S, and for its answer at most as long as
everything that its actor holds can take if every item runs into two deadlines, and only while the actor answers the
watch, which finds a silent one within WATCH_S + SILENT_S. After two failures, or with no actor,
its gradings are `error (verifier_unavailable)`: never a hang, and never held against the completion.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.diagnosis.vitals import Activity
from sapo_ray.errors import DeadlineExceeded, SapoRayError, WorkerLost
from sapo_ray.placement import label_selector
from sapo_ray.types import Grading, Verdict
from sapo_ray.verifier import child
from sapo_ray.verifier.calls import answered, bounded, unless
from sapo_ray.verifier.members import Member, VerifierPoolStats
from sapo_ray.verifier.worker import VerifierWorker, VerifierWorkerInfo

log = logging.getLogger(__name__)

START_S = child.START_S + 60.0
"""Bound of an actor's start: its process, then its grading processes."""
REPLACEMENT_S = START_S + 10.0
"""Longest wait of a call for a living actor: long enough for one that was lost a moment ago to be replaced."""
WATCH_S = 10.0
"""Pause between two questions to an actor whether it still answers."""
SILENT_S = 30.0
"""An actor that has not answered within this is lost: its process is stopped, or its loop is blocked."""
CALLS = 10_000
"""Calls that an actor takes at once; Ray's own limit of 1,000 would let the watch wait behind gradings."""
INFO_S = 5.0
"""Bound of one actor's report in stats()."""
BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses before the attempts to replace an actor; the last is repeated."""
REPLACEMENT_OF_PROCESS_S = 5.0
"""Promised time to replace a grading process."""


class VerifierPool:
    """`spec.workers` verifier actors. Ray must be initialised."""

    def __init__(self, spec: VerifierSpec) -> None:
        self._spec = spec
        self._workers = [Member(f"verifier-{number}") for number in range(spec.workers)]
        self._actor_class = ray.remote(VerifierWorker)
        self._replacements: set[asyncio.Task[None]] = set()
        self._watches: set[asyncio.Task[None]] = set()
        self._a_worker_is_back = asyncio.Event()
        self._workers_lost = 0
        self._unavailable = 0
        self._last_failure = ""
        self._closed = False

    async def start(self) -> None:
        """Every actor ready.

        Raises:
            ConfigError: `verifier.reward` cannot be used.
            DeadlineExceeded, ResourceError, WorkerLost: an actor did not come up.
        """
        results = await asyncio.gather(*[self._start_actor(w) for w in self._workers], return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result

    async def grade(self, prompt: str, gold: str, payload_refs: Sequence[ray.ObjectRef[Any]]) -> list[Grading]:
        """One grading per payload, in order; bounded, see the module's text.

        Raises:
            ray.exceptions.ObjectLostError and the like: a payload is gone; the caller issues it again.
            WorkerLost: the pool is closed.
        """
        if not payload_refs:
            return []
        for attempt in (1, 2):
            worker = await self._least_loaded()
            if worker is None:
                break
            gradings = await self._grade_on(worker, prompt, gold, payload_refs)
            if gradings is not None:
                return gradings
            log.warning(
                "grading %d completions failed on %s (attempt %d of 2)", len(payload_refs), worker.name, attempt
            )
        self._unavailable += len(payload_refs)
        return [
            Grading(verdict=Verdict.ERROR, reward=None, reason="verifier_unavailable", detail=self._last_failure[:500])
            for _ in payload_refs
        ]

    def activity(self) -> list[Activity]:
        """What every actor that has something to do is at."""
        return [one for worker in self._workers if (one := worker.activity()) is not None]

    async def stats(self) -> VerifierPoolStats:
        """Bounded by INFO_S. An actor that turns out to be dead is replaced."""
        live = [worker for worker in self._workers if worker.actor is not None]
        actors = [worker.actor for worker in live]
        infos = await asyncio.gather(
            *[bounded(worker.actor.info.remote(), INFO_S, f"{worker.name}: its report") for worker in live],
            return_exceptions=True,
        )
        for worker, actor, info in zip(live, actors, infos, strict=True):
            if isinstance(info, RayActorError):
                self._lose(worker, actor, info)
        return VerifierPoolStats(
            live=sum(worker.actor is not None for worker in self._workers),
            in_flight=sum(worker.in_flight for worker in self._workers),
            workers_lost=self._workers_lost,
            unavailable=self._unavailable,
            last_failure=self._last_failure,
            workers=tuple(info for info in infos if isinstance(info, VerifierWorkerInfo)),
        )

    async def close(self) -> None:
        """Ends the actors; their grading processes end with them. Bounded by child.REAP_S."""
        self._closed = True
        tasks = [*self._replacements, *self._watches]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        live = [worker for worker in self._workers if worker.actor is not None]
        endings = [bounded(worker.actor.close.remote(), child.REAP_S, f"{worker.name}: its end") for worker in live]
        await asyncio.gather(*endings, return_exceptions=True)
        for worker in live:
            ray.kill(worker.actor)
            worker.actor = None
        self._a_worker_is_back.set()

    # One call

    async def _least_loaded(self) -> Member | None:
        """The living actor with the fewest completions in flight; None if there is none within REPLACEMENT_S."""
        deadline = time.monotonic() + REPLACEMENT_S
        while True:
            if self._closed:
                raise WorkerLost("the verifier pool is closed")
            live = [worker for worker in self._workers if worker.actor is not None]
            if live:
                return min(live, key=lambda worker: worker.in_flight)
            self._a_worker_is_back.clear()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self._a_worker_is_back.wait()
            except TimeoutError:
                return None

    async def _grade_on(
        self, worker: Member, prompt: str, gold: str, refs: Sequence[ray.ObjectRef[Any]]
    ) -> list[Grading] | None:
        """None when the actor failed; it is being replaced then."""
        actor, lost = worker.actor, worker.lost
        if not worker.in_flight:
            worker.progress = time.time()
        worker.in_flight += len(refs)
        try:
            call = unless(lost, actor.grade.remote(prompt, gold, *refs), worker.name)
            gradings: list[Grading] = await bounded(call, self._bound(worker), f"{worker.name}: {len(refs)} gradings")
        except (RayActorError, DeadlineExceeded, WorkerLost) as error:
            self._lose(worker, actor, error)
            return None
        finally:
            worker.in_flight -= len(refs)
        worker.progress = time.time()
        return gradings

    def _bound(self, worker: Member) -> float:
        """Seconds in which an actor that works answers everything it holds, were every item poison."""
        rounds = -(-worker.in_flight // self._spec.processes)
        return START_S + 2 * rounds * (self._spec.deadline_s + REPLACEMENT_OF_PROCESS_S)

    # Actors

    async def _start_actor(self, worker: Member) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        where = label_selector("verifier")
        options = {
            # Beside others they take what is left; on nodes of their own that is what keeps a node, or brings one.
            "num_cpus": self._spec.processes if where else 0,
            "label_selector": where,
            "max_restarts": 0,
            "max_concurrency": CALLS,
            "runtime_env": {"env_vars": threads},
        }
        actor = self._actor_class.options(**options).remote(self._spec, worker.name)
        try:
            await bounded(actor.start.remote(), START_S, f"{worker.name}: its start")
        except BaseException:
            ray.kill(actor)
            raise
        worker.actor, worker.lost, worker.progress = actor, asyncio.Event(), time.time()
        self._a_worker_is_back.set()
        watch = asyncio.create_task(self._watch(worker, actor), name=f"watch {worker.name}")
        self._watches.add(watch)
        watch.add_done_callback(self._watch_ended)

    async def _watch(self, worker: Member, actor: Any) -> None:
        """Until the actor is lost: no call need be under way for its silence to be noticed."""
        while worker.actor is actor:
            await asyncio.sleep(WATCH_S)
            if worker.actor is not actor:
                return
            try:
                await answered(actor.info.remote(), SILENT_S, f"{worker.name}: a sign of life")
            except (RayActorError, RayTaskError, SapoRayError) as error:
                self._lose(worker, actor, error)

    def _lose(self, worker: Member, actor: Any, error: Exception) -> None:
        """Ends the actor and starts another in its place; of several calls that saw it fail, the first does this."""
        if worker.actor is not actor or self._closed:
            return
        self._workers_lost += 1
        self._last_failure = f"{worker.name}: {type(error).__name__}: {error}".strip()
        log.warning("verifier actor lost: %s", self._last_failure.splitlines()[0])
        worker.actor, worker.progress, worker.after = None, time.time(), self._last_failure
        worker.lost.set()
        ray.kill(actor)
        task = asyncio.create_task(self._replace(worker), name=f"replace {worker.name}")
        self._replacements.add(task)
        task.add_done_callback(self._replacement_ended)

    async def _replace(self, worker: Member) -> None:
        attempt = 0
        while not self._closed:
            await asyncio.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)])
            attempt += 1
            try:
                await self._start_actor(worker)
            except (SapoRayError, RayActorError, RayTaskError) as error:
                self._last_failure = f"{worker.name}: {type(error).__name__}: {error}"
                log.warning("verifier actor could not be replaced (attempt %d): %s", attempt, self._last_failure)
            else:
                return

    def _replacement_ended(self, task: asyncio.Task[None]) -> None:
        self._replacements.discard(task)
        self._report_failure(task)

    def _watch_ended(self, task: asyncio.Task[None]) -> None:
        self._watches.discard(task)
        self._report_failure(task)

    def _report_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._last_failure = f"{task.get_name()}: {type(error).__name__}: {error}"
            log.error("%s failed", task.get_name(), exc_info=error)
