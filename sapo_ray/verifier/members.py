"""The members of a verifier pool, and what it tells of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sapo_ray.diagnosis.vitals import Activity
from sapo_ray.verifier.worker import VerifierWorkerInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifierPoolStats:
    """Gauges and counters of the pool, and what each actor says of itself (absent: it did not answer in time)."""

    live: int
    in_flight: int
    """Completions being graded."""
    workers_lost: int
    """Actors that died or were ended for being silent."""
    unavailable: int
    """Gradings given up as verifier_unavailable."""
    last_failure: str
    workers: tuple[VerifierWorkerInfo, ...]

    @property
    def processes(self) -> int:
        """Living grading processes of all actors."""
        return sum(worker.stats.live for worker in self.workers)

    @property
    def errors(self) -> Counter[str]:
        """Errors by reason, of the actors that live."""
        return sum((worker.stats.errors for worker in self.workers), Counter())


class Member:
    """An actor and its load. `actor` is None while it is being replaced."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.actor: Any = None
        self.in_flight = 0
        self.progress = time.time()
        """When it last took or finished a call, came up, or was lost; Unix seconds."""
        self.after = ""
        """How the actor was lost that is being replaced."""
        self.lost = asyncio.Event()
        """Set when `actor` is given up, so that the calls it holds do not wait for it."""

    def activity(self) -> Activity | None:
        """What it is at; None if it has nothing to do."""
        if self.actor is not None and not self.in_flight:
            return None
        kind, task = ("start", "starting") if self.actor is None else ("grade", f"grading {self.in_flight} completions")
        at, after = self.progress, self.after if kind == "start" else ""
        return Activity(name=self.name, kind=kind, task=task, since=at, progress=at, after=after)
