"""A slot: one grading process at a time, kept busy, and replaced whenever it hangs, dies or grows.

waiting --(pending)--> working --(nothing pending)--> waiting
   |                      |
   '------- died ---------'--> a fresh process from the stock; the item it was at is run there alone
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from typing import Any

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.errors import WorkerLost
from sapo_ray.types import Grading, Verdict
from sapo_ray.verifier.child import GradingProcess, ProcessDied
from sapo_ray.verifier.jobs import Job, JobQueue
from sapo_ray.verifier.stock import NoProcess, ProcessStock

log = logging.getLogger(__name__)

BACKOFF_S = 1.0
"""Pause before processes are started again after none could be."""
BELIEVED_AFTER = 3
"""Fresh processes that must confirm an exception of a reward function before it is believed at once."""


class Slot:
    """Args: `reproduced` counts, for all slots together, which exceptions fresh processes have confirmed."""

    def __init__(
        self,
        spec: VerifierSpec,
        queue: JobQueue,
        stock: ProcessStock,
        reproduced: Counter[str],
        process: GradingProcess,
    ) -> None:
        self._deadline_s = spec.deadline_s
        self._with_prompt = spec.reward is not None or spec.format_reward != "none"
        self._queue = queue
        self._stock = stock
        self._reproduced = reproduced
        self._process = process
        self._sent: deque[Job] = deque()
        """In the order of sending: the child is at the first."""
        self._suspects: deque[Job] = deque()
        """Failed once; each waits for a fresh process of its own."""
        self._started = 0.0
        """When the child started the first of `_sent`, by the loop's clock."""

    async def run(self) -> None:
        """Until cancelled; what the slot holds then gets WorkerLost."""
        try:
            while True:
                try:
                    await self._work()
                    await self._pending_or_death()
                except NoProcess as error:
                    self._without_process(str(error))
                    await asyncio.sleep(BACKOFF_S)
        except BaseException as error:
            for job in (*self._suspects, *self._sent):
                JobQueue.fail(job, WorkerLost(f"the verifier ended while grading ({type(error).__name__}: {error})"))
            raise

    async def _pending_or_death(self) -> None:
        """No bound: nothing is owed while nothing is pending."""
        if len(self._queue):
            return
        self._queue.not_empty.clear()
        pending = asyncio.ensure_future(self._queue.not_empty.wait())
        try:
            await asyncio.wait({pending, self._process.gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pending.cancel()
        if not self._process.alive:
            self._queue.stats.died += 1
            self._stock.discard(self._process)

    async def _work(self) -> None:
        """Grades until nothing is pending; the process is well then."""
        while True:
            if not self._sent:
                if self._suspects or self._process.tired or not self._process.alive:
                    await self._replace_process()
                if self._suspects:
                    self._send([self._suspects.popleft()])
            reproducing = bool(self._suspects) or any(job.suspected for job in self._sent)
            if not reproducing and not self._process.tired:
                self._send(self._queue.take(len(self._sent)))
            if not self._sent:
                return
            await self._hear()

    async def _replace_process(self) -> None:
        if self._process.alive:
            self._queue.stats.retired += 1
            self._stock.discard(self._process)
        self._process = await self._stock.fresh()

    def _send(self, jobs: list[Job]) -> None:
        if jobs and not self._sent:
            self._started = asyncio.get_running_loop().time()
        self._sent.extend(jobs)
        self._process.send([job.message(with_prompt=self._with_prompt) for job in jobs])

    async def _hear(self) -> None:
        """The next frame of the child, its end, or the deadline of the item it is at."""
        now = asyncio.get_running_loop().time
        try:
            frame = await self._process.receive(self._started + self._deadline_s - now())
            answer = None if frame is None or "phase" in frame else _answer(frame, self._sent[0])
        except ProcessDied as death:
            self._queue.stats.died += 1
            self._first_failed("died", f"the grading process ended: {death}", now() - self._started)
            return
        if frame is None:
            self._queue.stats.killed += 1
            self._first_failed("timeout", f"no grading within {self._deadline_s:g} s", now() - self._started)
        elif answer is None:
            self._sent[0].phase = frame["phase"]
        else:
            self._started = now()
            self._process.tired |= "tired" in frame
            self._answered(self._sent.popleft(), answer)

    def _answered(self, job: Job, answer: Grading | bool) -> None:
        if isinstance(answer, Grading) and self._must_reproduce(job, answer):
            job.suspected = True
            self._suspects.append(job)
        else:
            self._queue.settle(job, answer)

    def _must_reproduce(self, job: Job, grading: Grading) -> bool:
        """Is this an error that the state of the process may have caused?

        `too_long` compares two lengths and `gold_unparseable` is no fault of the completion. An exception leaves the
        process alive; a reward function that always raises must not cost a fresh process each time.
        """
        if grading.verdict is not Verdict.ERROR or grading.reason in ("too_long", "gold_unparseable"):
            return False
        kind_and_place = f"{grading.detail.partition(':')[0]} {grading.detail.rpartition('(')[2]}"
        if job.suspected:
            self._reproduced[kind_and_place] += 1
            return False
        return self._reproduced[kind_and_place] < BELIEVED_AFTER

    def _first_failed(self, reason: str, detail: str, seconds: float) -> None:
        """The process is lost. The item it was at is suspected, or believed; the others go to any process."""
        self._queue.stats.seconds_lost += seconds
        self._stock.discard(self._process)
        job = self._sent.popleft()
        self._queue.put_back(self._sent)
        self._sent.clear()
        if job.suspected:
            self._queue.give_up(job, reason, detail, seconds)
        else:
            job.suspected, job.phase = True, "answer"
            self._suspects.append(job)

    def _without_process(self, why: str) -> None:
        """Suspects end here; what is pending does too, unless another slot still has a process."""
        log.error("no grading process could be started: %s", why)
        while self._suspects:
            self._queue.give_up(self._suspects.popleft(), "verifier_unavailable", why)
        if not self._stock.living:
            self._queue.give_up_all("verifier_unavailable", why)


def _answer(frame: dict[str, Any], job: Job) -> Grading | bool:
    """What the child says of the job. Raises ProcessDied where it is not an answer to it."""
    values = {name: value for name, value in frame.items() if name not in ("id", "tired")}
    try:
        if frame["id"] != job.number:
            raise ProcessDied("it answered out of turn; does the reward function fork?")
        if job.kind == "gold":
            return bool(values["usable"])
        return Grading(**{**values, "verdict": Verdict(values["verdict"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ProcessDied("it answered nonsense; does the reward function write into its pipes?") from error
