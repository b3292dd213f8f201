"""Random kills of a run for as long as one wants: faults drawn by weight and seed, an audit after each attempt.

step taken --> pause (random) --> fault (drawn) --> the run goes on, or is resumed where the fault ended it --> ...
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
from chaos_run import ChaosRun

from sapo_ray.audit import Report

WEIGHTS = {
    "grader": 60.0,
    "rollout": 20.0,
    "verifier": 5.0,
    "learner": 3.0,
    "scale": 3.0,
    "slow": 1.0,
    "stop": 0.5,
    "disk": 0.5,
    "driver": 0.5,
}
"""How often each fault is drawn. `stop` is SIGSTOP of a rollout worker, `slow` some seconds of it, again and again,
`scale` another number of rollout workers, `disk` a full disk for some seconds (where the run has one of its own)."""
ENDS_THE_ATTEMPT = ("driver", "raylet", "gcs")
PROGRESS_S = 600.0
"""Longest time without a step before a campaign has failed; a replaced worker on a busy machine takes minutes."""
RSS_EVERY_S = 2.0
FULL_S = 3.0
"""How long a disk stays full after the run has said so."""


@dataclass
class Campaign:
    """Faults against one run. `kills` counts what was really done, by role."""

    run: ChaosRun
    seed: int
    workers: int
    """Rollout workers that the job wants now."""
    weights: dict[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    pause_s: float = 1.0
    """Longest pause before a fault; each is drawn from 0 to this."""
    steps_between: int = 1
    """Steps that must have been taken since the last fault: it was outlived."""
    kills: Counter[str] = field(default_factory=Counter)
    struck: list[tuple[float, str, str]] = field(default_factory=list)
    """(Unix seconds, fault, victim) of each."""
    memory: list[tuple[int, float, int]] = field(default_factory=list)
    """(attempt, Unix seconds, resident bytes) of the driver."""
    chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.most_workers = self.workers + 1

    def go(self, seconds: float, most_kills: int | None = None) -> Report:
        """Until the time is over, or so many kills were made; then the run takes three steps more and ends."""
        end = time.monotonic() + seconds
        self.begin(self.run.train)
        while time.monotonic() < end and (most_kills is None or self.kills.total() < most_kills):
            self.watch(self.chance.uniform(0.0, self.pause_s))
            [fault] = self.chance.choices(list(self.weights), list(self.weights.values()))
            self.strike(fault)
            if self.steps_between and fault not in ENDS_THE_ATTEMPT:
                self.run.steps_on(self.steps_between)
        self.run.steps_on(1)
        return self.end()

    def begin(self, start: Callable[[], None]) -> None:
        """Start an attempt, up to its first step."""
        done = len(self.run.journal("step"))
        start()
        self.run.until(lambda: len(self.run.journal("step")) > done, "the first step of an attempt", 900)

    def end(self) -> Report:
        """Interrupt the attempt, and take three steps more with another, to the run's end."""
        if self.run.process.poll() is None:
            self.run.process.send_signal(signal.SIGINT)
            self.run.process.wait(180)
        self.run.audited()
        self.begin(lambda: self.run.resume(f"steps={self.run.step() + 3}"))
        code = self.run.end(900)
        assert code == 0, self.run.log.read_text()[-4000:]
        return self.run.audited()

    def strike(self, fault: str) -> str | None:
        """Do it, if it can be done at this moment. Returns the victim's name."""
        run, victim = self.run, None
        if fault in ("rollout", "stop", "slow") and len(run.workers_ready()) < self.workers:
            fault = "grader"  # whoever kills replacements faster than they start shows only that nothing is trained
        if fault in ENDS_THE_ATTEMPT:
            if victim := self.hit(fault):
                run.gone(300)
                run.audited()
                self.begin(run.resume)
        elif fault == "stop":
            victim = self.hit(fault, "rollout", signal.SIGSTOP)
        elif fault == "slow":
            victim = self._slow()
        elif fault == "scale":
            victim = self._scale()
        elif fault == "disk":
            victim = self._fill_disk()
        elif fault != "verifier" or run.living("grader"):
            victim = self.hit(fault)
        self.must_progress()
        return victim

    def hit(self, fault: str, role: str | None = None, number: int = signal.SIGKILL) -> str | None:
        """Send a signal to one process of a role, if there is one, and note it."""
        victim = self.run.kill(role or fault, self.chance.choice, number)
        return victim and self._noted(fault, victim)

    def _noted(self, fault: str, victim: str) -> str:
        self.kills[fault] += 1
        self.struck.append((time.time(), fault, victim))
        return victim

    def _slow(self) -> str | None:
        """A worker that works a fifth of the time, for ten seconds."""
        victims = self.run.living("rollout")
        if not victims:
            return None
        name = self.chance.choice(sorted(victims))
        victim = victims[name]
        try:
            for _ in range(10):
                victim.suspend()
                time.sleep(0.8)
                victim.resume()
                time.sleep(0.2)
        except psutil.NoSuchProcess:
            return None
        return self._noted("slow", name)

    def _scale(self) -> str:
        """Another number of rollout workers."""
        others = [number for number in range(1, self.most_workers + 1) if number != self.workers]
        self.workers = self.chance.choice(others)
        self.run.order(self.workers, self.most_workers)
        return self._noted("scale", f"{self.workers} workers")

    def _fill_disk(self) -> str | None:
        """A full disk until the run has said so, and some seconds more."""
        run = self.run
        if run.disk is None:
            return None

        def told() -> int:
            return sum(row["condition"] == "DiskFull" for row in run.journal("condition"))

        before = told()
        run.fill_disk()
        try:
            run.until(lambda: told() > before, "a full disk to be told")
            time.sleep(FULL_S)
        finally:
            run.free_disk()
        return self._noted("disk", json.dumps(run.journal("condition")[-1]["reason"]))

    def must_progress(self) -> None:
        """A step was taken within the bound."""
        steps = self.run.journal("step")
        if steps and time.time() - steps[-1]["time"] > PROGRESS_S:
            raise AssertionError(f"no step for {PROGRESS_S:g} s: {self.run.log.read_text()[-4000:]}")
        if self.run.process.poll() is not None:
            raise AssertionError(f"it ended: {self.run.log.read_text()[-4000:]}")

    def watch(self, seconds: float) -> None:
        """Let time pass; note the driver's memory now and then."""
        end = time.time() + seconds
        while True:
            if time.time() - (self.memory[-1][1] if self.memory else 0.0) >= RSS_EVERY_S:
                for driver in self.run.living("driver").values():
                    self.memory.append((self.run.attempt(), time.time(), driver.memory_info().rss))
            if (left := end - time.time()) <= 0:
                return
            time.sleep(min(left, RSS_EVERY_S))
