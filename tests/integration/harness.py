"""Runs the command line as a user does, in a process of its own, and looks for what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

LEAVES_WITHIN_S = 60.0
"""Time for the last process of a run to end after its head was killed."""


@dataclass
class Command:
    """`sapo-ray ...`, its descendants recognisable by an environment variable."""

    arguments: list[str]
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)
    shm_before: set[str] = field(default_factory=lambda: set(os.listdir("/dev/shm")))
    reward_pause_s: float = 0.0
    """Of `example_reward` for each grading, so that a step lasts long enough to be interrupted."""

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "SAPO_TEST_TAG": self.tag, "HF_HUB_OFFLINE": "1"}
        environment["EXAMPLE_REWARD_PAUSE_S"] = str(self.reward_pause_s)
        environment["PYTHONPATH"] = str(Path(__file__).parent)  # where a user's own reward lies
        environment.pop("RAY_ADDRESS", None)
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-c", "from sapo_ray.cli import main; main()", *self.arguments],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def leftovers(self) -> list[str]:
        """Living processes of this command, and shared-memory files that were not there before."""
        found = []
        for process in psutil.process_iter(["pid", "name", "status"]):
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("SAPO_TEST_TAG") == self.tag:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        files = set(os.listdir("/dev/shm")) - self.shm_before
        return found + sorted(name for name in files if not name.startswith("PostgreSQL."))  # of a server beside us

    def pids(self, role: str) -> list[int]:
        """Living actors of a class, e.g. `LearnerWorker`, as Ray names their processes."""
        found = []
        for process in psutil.process_iter(["pid"]):
            try:
                named = " ".join(process.cmdline()).startswith(f"ray::{role}")
                if named and process.environ().get("SAPO_TEST_TAG") == self.tag:
                    found.append(process.pid)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def leaves_nothing(self) -> list[str]:
        """What is still there after the bound; [] is what we want."""
        end = time.monotonic() + LEAVES_WITHIN_S
        while (left := self.leftovers()) and time.monotonic() < end:
            time.sleep(0.5)
        return left


def run(arguments: list[str], log: Path, timeout: float = 900.0) -> str:
    """Run to the end; returns the output. Fails the test with the output if the exit code is not 0."""
    command = Command(arguments)
    process = command.start(log)
    code = process.wait(timeout=timeout)
    output = log.read_text()
    assert code == 0, output[-4000:]
    left = command.leaves_nothing()
    assert left == [], f"left behind: {left}"
    return output


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, timeout: float = 600.0
) -> None:
    """Wait until `condition`, while the process lives."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, f"nothing within {timeout} s: {log.read_text()[-4000:]}"
        time.sleep(0.05)


def rows(path: Path) -> list[dict[str, Any]]:
    """JSONL rows of a file that may not be there yet, or end in mid-line."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
