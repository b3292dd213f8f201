"""Items on their way through the supervisor, and the counters of what became of them."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.types import Grading, Verdict

WINDOW = 16
"""Most items that one process is sent ahead."""
POISON_GOLDS = 1024
"""Most references remembered because they ended processes; a group shares one."""
THE_COMPLETION = frozenset(["timeout", "too_long", "died"])
"""Reasons that `verifier.unverifiable` applies to. A reward function's exception, and what it
returned instead of a number, are its own fault: a defect there must never become reward 0 for everybody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradingItem:
    """One completion to grade."""

    completion: str
    gold: str
    prompt: str = ""


@dataclass(kw_only=True, slots=True)
class SupervisorStats:
    """Counters since the start, and gauges of now."""

    live: int = 0
    """Processes alive, the spare included."""
    pending: int = 0
    """Items that no process has been sent yet."""
    graded: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Gradings by reason whose verdict is `error`, or would be without `unverifiable: wrong`."""
    killed: int = 0
    """Processes killed at a deadline."""
    died: int = 0
    """Processes that ended by themselves."""
    retired: int = 0
    """Processes replaced while well: they had grown, or an error was to be reproduced in a fresh one."""
    seconds_lost: float = 0.0
    """Process time spent on items that ended in a kill or a death."""


@dataclass(eq=False, kw_only=True, slots=True)
class Job:
    """A request on its way."""

    number: int
    kind: str
    """`grade` (result: a Grading) or `gold` (result: does the reference parse?)."""
    item: GradingItem
    future: asyncio.Future[Any]
    suspected: bool = False
    """It has failed once; the next failure is believed."""
    phase: str = "answer"
    """What the child last said it was parsing."""

    def message(self, *, with_prompt: bool) -> list[Any]:
        """As it goes to the child."""
        item = self.item
        return [self.number, self.kind, item.completion, item.gold, item.prompt if with_prompt else ""]


class JobQueue:
    """What waits, and how it ends."""

    def __init__(self, spec: VerifierSpec) -> None:
        self._spec = spec
        self._pending: deque[Job] = deque()
        self._poison_golds: set[str] = set()
        self._count = 0
        self.not_empty = asyncio.Event()
        self.stats = SupervisorStats()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, kind: str, item: GradingItem) -> asyncio.Future[Any]:
        self._count += 1
        job = Job(number=self._count, kind=kind, item=item, future=asyncio.get_running_loop().create_future())
        self._pending.append(job)
        self.not_empty.set()
        return job.future

    def take(self, already_sent: int) -> list[Job]:
        """So many that a process never waits for us, but few enough that the others get their share."""
        share = math.ceil(len(self._pending) / (2 * self._spec.processes))
        window = min(WINDOW, max(1, share))
        if already_sent > window // 2:
            return []
        jobs: list[Job] = []
        while self._pending and already_sent + len(jobs) < window:
            job = self._pending.popleft()
            if job.future.done():  # its caller has gone away
                continue
            if job.item.gold in self._poison_golds:
                self.give_up(job, "gold_unparseable", "the reference itself has ended two processes before")
            else:
                jobs.append(job)
        return jobs

    def put_back(self, jobs: deque[Job]) -> None:
        """In front, in their order."""
        self._pending.extendleft(reversed(jobs))
        if self._pending:
            self.not_empty.set()

    def settle(self, job: Job, result: Grading | bool) -> None:
        """The job has its result."""
        if isinstance(result, Grading):
            self.stats.graded += 1
            if result.verdict is Verdict.ERROR:
                self.stats.errors[result.reason] += 1
                if self._spec.unverifiable == "wrong" and result.reason in THE_COMPLETION:
                    result = replace(result, verdict=Verdict.WRONG, reward=0.0)
        if not job.future.done():
            job.future.set_result(result)

    def give_up(self, job: Job, reason: str, detail: str, seconds: float = 0.0) -> None:
        """The job ends without an answer of the child."""
        if job.kind == "gold":
            self.settle(job, False)
            return
        if job.phase == "gold":
            reason, detail = "gold_unparseable", f"parsing the reference ended in {reason}: {detail}"
            if len(self._poison_golds) < POISON_GOLDS:
                self._poison_golds.add(job.item.gold)
        grading = Grading(verdict=Verdict.ERROR, reward=None, reason=reason, detail=detail[:500], seconds=seconds)
        self.settle(job, grading)

    def give_up_all(self, reason: str, detail: str) -> None:
        while self._pending:
            self.give_up(self._pending.popleft(), reason, detail)

    def fail_all(self, error: Exception) -> None:
        while self._pending:
            self.fail(self._pending.popleft(), error)

    @staticmethod
    def fail(job: Job, error: Exception) -> None:
        if not job.future.done():
            job.future.set_exception(error)
