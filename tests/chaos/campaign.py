"""Random kills of a run for as long as one wants: faults drawn by weight and seed, an audit after each attempt.

step taken --> pause (random) --> fault (drawn) --> the run goes on, or is resumed where the fault ended it --> ...
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
from chaos_run import ChaosRun

from sapo_ray.audit import Report

WEIGHTS = {"grader": 70.0, "rollout": 20.0, "verifier": 5.0, "stop": 0.5, "slow": 1.0, "driver": 0.5}
"""How often each fault is drawn. `stop` is SIGSTOP of a rollout worker, `slow` some seconds of it, again and again."""
ENDS_THE_ATTEMPT = ("driver", "raylet", "gcs")
PROGRESS_S = 600.0
"""Longest time without a step before a campaign has failed; a replaced worker on a busy machine takes minutes."""
RSS_EVERY_S = 2.0


@dataclass
class Campaign:
    """Faults against one run. `kills` counts what was really done, by role."""

    run: ChaosRun
    seed: int
    workers: int
    """Rollout workers of the job."""
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
    attempts: int = 0

    def go(self, seconds: float, most_kills: int | None = None) -> Report:
        """Until the time is over, or so many kills were made; then the run takes three steps more and ends."""
        chance = random.Random(self.seed)
        end = time.monotonic() + seconds
        self._begin(self.run.train)
        while time.monotonic() < end and (most_kills is None or self.kills.total() < most_kills):
            self._watch(chance.uniform(0.0, self.pause_s))
            [fault] = chance.choices(list(self.weights), list(self.weights.values()))
            self._strike(fault, chance)
            if self.steps_between and fault not in ENDS_THE_ATTEMPT:
                self.run.steps_on(self.steps_between)
        self.run.steps_on(1)
        if self.run.process.poll() is None:
            self.run.process.send_signal(signal.SIGINT)
            self.run.process.wait(180)
        self.run.audited()
        self._begin(lambda: self.run.resume(f"steps={self.run.step() + 3}"))
        code = self.run.end(900)
        assert code == 0, self.run.log.read_text()[-4000:]
        return self.run.audited()

    def _begin(self, start: Callable[[], None]) -> None:
        done = len(self.run.journal("step"))
        start()
        self.attempts += 1
        self.run.until(lambda: len(self.run.journal("step")) > done, "the first step of an attempt", 900)

    def _strike(self, fault: str, chance: random.Random) -> None:
        run = self.run
        if fault in ("rollout", "stop", "slow") and len(run.workers_ready()) < self.workers:
            fault = "grader"
        if fault == "verifier" and not run.living("grader"):
            return
        if fault in ENDS_THE_ATTEMPT:
            if self._hit(fault, run.kill(fault, chance.choice)):
                run.process.wait(300)
                left = run.entry.leaves_nothing()
                assert left == [], f"left behind: {left}"
                run.audited()
                self._begin(run.resume)
        elif fault == "stop":
            self._hit(fault, run.kill("rollout", chance.choice, signal.SIGSTOP))
        elif fault == "slow":
            self._slow(chance)
        else:
            self._hit(fault, run.kill(fault, chance.choice))
        self.must_progress()

    def _hit(self, fault: str, victim: str | None) -> bool:
        if victim is None:
            return False
        self.kills[fault] += 1
        self.struck.append((time.time(), fault, victim))
        return True

    def _slow(self, chance: random.Random) -> None:
        """A worker that works a fifth of the time, for ten seconds."""
        victims = self.run.living("rollout")
        if not victims:
            return
        name = chance.choice(sorted(victims))
        victim = victims[name]
        try:
            for _ in range(10):
                victim.suspend()
                time.sleep(0.8)
                victim.resume()
                time.sleep(0.2)
        except psutil.NoSuchProcess:
            return
        self._hit("slow", name)

    def must_progress(self) -> None:
        """A step was taken within the bound."""
        steps = self.run.journal("step")
        if steps and time.time() - steps[-1]["time"] > PROGRESS_S:
            raise AssertionError(f"no step for {PROGRESS_S:g} s: {self.run.log.read_text()[-4000:]}")
        if self.run.process.poll() is not None:
            raise AssertionError(f"it ended: {self.run.log.read_text()[-4000:]}")

    def _watch(self, seconds: float) -> None:
        """Let time pass; note the driver's memory now and then."""
        last = self.memory[-1][1] if self.memory else 0.0
        if time.time() - last >= RSS_EVERY_S:
            for driver in self.run.living("driver").values():
                self.memory.append((self.attempts, time.time(), driver.memory_info().rss))
        time.sleep(seconds)
