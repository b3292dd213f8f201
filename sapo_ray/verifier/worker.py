"""The verifier actor: grading processes behind one method. A plain class; the pool makes an actor of it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sapo_ray.actor_log import log_as
from sapo_ray.config.spec import VerifierSpec
from sapo_ray.types import CompletionPayload, Grading
from sapo_ray.verifier.jobs import GradingItem, SupervisorStats
from sapo_ray.verifier.supervisor import GradingProcesses


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifierWorkerInfo:
    """Who runs where."""

    worker: str
    pid: int
    processes: tuple[int, ...]
    """Process ids of its grading processes, the spare included."""
    stats: SupervisorStats


class VerifierWorker:
    """Grades completions that come as payloads of the object store."""

    def __init__(self, spec: VerifierSpec, worker: str) -> None:
        log_as(worker)
        self._worker = worker
        self._spec = spec
        self._processes: GradingProcesses | None = None

    async def start(self) -> None:
        """Raises as GradingProcesses.start does."""
        processes = GradingProcesses(self._spec)
        await processes.start()
        self._processes = processes

    async def grade(self, prompt: str, gold: str, *payloads: CompletionPayload) -> list[Grading]:
        """One grading per payload, in order. Bounded: see supervisor."""
        assert self._processes is not None, "start() comes first"
        return await self._processes.grade_many(
            [GradingItem(completion=payload.text, gold=gold, prompt=prompt) for payload in payloads]
        )

    async def info(self) -> VerifierWorkerInfo:
        assert self._processes is not None, "start() comes first"
        return VerifierWorkerInfo(
            worker=self._worker,
            pid=os.getpid(),
            processes=tuple(self._processes.pids()),
            stats=self._processes.stats(),
        )

    async def close(self) -> None:
        """Ends the grading processes."""
        if self._processes is not None:
            await self._processes.close()
