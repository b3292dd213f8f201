"""A real run that is made ill on purpose, and how soon its diagnosis names the part that is ill.

What was named, and when, is written to the file that DIAGNOSIS_RESULTS names, one JSON object a line, right or wrong.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from chaos_run import ChaosRun

from sapo_ray.api.diagnosis import Diagnosis
from sapo_ray.diagnosis import diagnose
from sapo_ray.diagnosis.run_dir import evidence
from sapo_ray.errors import CheckpointError

PROMISED_S = 60.0
"""From a fault to the diagnosis that names its part."""
LONGEST_S = 600.0
"""Of a wait, the start of a run included."""
BOUND_S = 3 * PROMISED_S
"""Asserted, for machines that do other work as well."""
SETTINGS = (
    "steps=100000",
    "rollout.workers=1",
    "verifier.reward=moody_reward:digits",
    "verifier.processes=1",
    "verifier.deadline_s=60",
    "checkpoint.min_free_gb=0",
)


class Patient(ChaosRun):
    """The run of a folder, whose reward has the mood that it is told."""

    def __init__(self, folder: Path, *settings: str, **faults: str) -> None:
        self._mood = folder / "mood"
        super().__init__(folder, (*SETTINGS, *settings), faults={"MOODY_REWARD": str(self._mood), **faults})
        self.reward("0")

    def reward(self, mood: str) -> None:
        """Seconds, or `raise`."""
        self._mood.write_text(mood)

    def gets_on(self, steps: int = 3) -> None:
        self.until(lambda: self.step() >= 1, "the first step", 600)
        self.steps_on(steps)

    def one(self, role: str) -> psutil.Process:
        """The only process of a role; of a verifier's two children the one that grades."""
        found = sorted(self.living(role).values(), key=lambda process: process.pid)
        assert found, role
        return found[0]

    def diagnosis(self) -> Diagnosis | None:
        return diagnosis_of(self.run_dir)

    def well(self) -> None:
        """Steps are taken again, the diagnosis says so, and by the journal nothing stalls any more."""
        self.steps_on()
        end = time.monotonic() + BOUND_S
        while (found := self.diagnosis()) is None or found.verdict != "healthy" or self.stalled():
            assert time.monotonic() < end, (found, self.stalled())
            time.sleep(0.2)

    def stalled(self) -> list[str]:
        """Whose condition `Stalled` the journal holds and does not take back."""
        told = [row for row in self.journal("condition") if row["condition"] == "Stalled"]
        return [row["component"] for row in told[-1:] if not row.get("cleared")]

    def names(self, fault: str, component: str, verdict: str, injected: float | Callable[[], float]) -> Diagnosis:
        return first_named(self.run_dir, fault, component, verdict, injected)

    def began(self) -> float:
        """When the first attempt did, in Unix seconds."""
        return self.when("transition", "state", "starting")()

    def when(self, kind: str, name: str, value: str) -> Callable[[], float]:
        """The time of the first event whose field `name` has the value; it is written down within a step."""

        def time_of() -> float:
            def events() -> list[float]:
                return [float(row["time"]) for row in self.journal(kind) if row.get(name) == value]

            if self.process.poll() is None:
                self.until(events, f"{kind} {value}")
            return events()[0]

        return time_of

    def end_now(self) -> None:
        """Ctrl-C, and nothing is left. A run that has ended stays as it is."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGINT)
            self.end(180)


def diagnosis_of(run_dir: Path) -> Diagnosis | None:
    """What `sapo-ray diagnose RUN` says; None before there is a run to ask about."""
    try:
        return diagnose(evidence(run_dir, time.time()))
    except CheckpointError:
        return None


def first_named(
    run_dir: Path, fault: str, component: str, verdict: str, injected: float | Callable[[], float]
) -> Diagnosis:
    """The first diagnosis from now on that is not `healthy`: it must name the part, and in time.

    `injected` is when the fault was, in Unix seconds, or tells afterwards what the journal says of it.
    """
    end = time.monotonic() + LONGEST_S
    while (found := diagnosis_of(run_dir)) is None or found.verdict == "healthy":
        assert time.monotonic() < end, f"nothing was named; {found}"
        time.sleep(0.2)
    named = time.time()
    seconds = named - (injected() if callable(injected) else injected)
    _write_down(fault, component, found, seconds)
    assert (found.verdict, found.component) == (verdict, component), found
    assert seconds < BOUND_S
    assert found.remedy
    return found


def _write_down(fault: str, component: str, found: Diagnosis, seconds: float) -> None:
    """One row of the table."""
    row = {
        "fault": fault,
        "part": component,
        "named": found.component,
        "verdict": found.verdict,
        "cause": found.cause.code if found.cause else None,
        "seconds": round(seconds, 1),
    }
    if path := os.environ.get("DIAGNOSIS_RESULTS"):
        with Path(path).open("a") as lines:
            lines.write(json.dumps(row) + "\n")


@contextmanager
def stopped(process: psutil.Process) -> Iterator[float]:
    """SIGSTOP, and SIGCONT afterwards; yields when, in Unix seconds."""
    process.suspend()
    try:
        yield time.time()
    finally:
        process.resume()
