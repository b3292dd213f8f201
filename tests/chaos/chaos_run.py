"""A run of the command line whose processes are found by role, and killed or stopped for real.

Roles: `rollout`, `verifier`, `learner` (actors, by what they print at the head of their logs), `grader` (the children
of a verifier), `driver`, `raylet`, `gcs`. Only processes of this run are ever touched: they carry its tag.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from harness import Command

from sapo_ray.audit import Report, audit

ROOT = Path(__file__).parents[2]
ACTORS = ("rollout", "verifier", "learner")
JOB = [
    "preset=quickstart",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "rollout.max_staleness=1",
    "evaluation.data=[]",
    "checkpoint.every=2",
    "model.warm_start_accuracy=null",
    "verifier.reward=example_reward:digits",
]
"""As the quickstart, with tiny steps, a random model, generation one step ahead, and many checkpoints."""
_HEAD = re.compile(r"^--- (\S+): process (\d+) on ", re.MULTILINE)


class Entry(Command):
    """`sapo-ray ...` by way of faulty.py."""

    def leftovers(self) -> list[str]:
        """Living processes; shared memory, which others on this machine use as well, is looked at elsewhere."""
        self.shm_before |= set(os.listdir("/dev/shm"))
        return super().leftovers()

    def start_with(self, log: Path, **faults: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **faults, "SAPO_TEST_TAG": self.tag, "HF_HUB_OFFLINE": "1"}
        environment["EXAMPLE_REWARD_PAUSE_S"] = str(self.reward_pause_s)
        paths = [str(ROOT / "tests" / "integration"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment.pop("RAY_ADDRESS", None)
        with log.open("ab") as output:
            command = [sys.executable, str(Path(__file__).with_name("faulty.py")), *self.arguments]
            return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


@dataclass
class ChaosRun:
    """One run directory and the attempt that is at work on it."""

    folder: Path
    settings: tuple[str, ...] = ()
    reward_pause_s: float = 0.05
    faults: dict[str, str] = field(default_factory=dict)
    """Of faulty.py, for the next attempt."""
    disk: Path | None = None
    """A small file system for the run directory, that may be filled."""
    entry: Entry = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)
    _rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of the journal, by kind: those that were ever asked for."""
    _read: dict[str, int] = field(default_factory=dict)
    """Bytes of the journal that were looked through for a kind."""

    @property
    def run_dir(self) -> Path:
        return (self.disk or self.folder) / "run"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def train(self) -> None:
        """Start a new run."""
        settings = (*JOB, f"run_dir={self.run_dir}", *self.settings)
        self._start(["train", str(ROOT / "configs" / "quickstart.yaml"), *(a for s in settings for a in ("--set", s))])

    def resume(self, *settings: str) -> None:
        """Start the next attempt."""
        self._start(["resume", str(self.run_dir), *(a for s in settings for a in ("--set", s))])

    def _start(self, arguments: list[str]) -> None:
        self.entry = Entry(arguments, reward_pause_s=self.reward_pause_s)
        self.process = self.entry.start_with(self.log, CHAOS_WORKERS=str(self._orders), **self.faults)

    # --- processes --------------------------------------------------------------------------------------------------

    def living(self, role: str) -> dict[str, psutil.Process]:
        """Processes of a role by the name of their part."""
        if role == "driver":
            return {"driver": psutil.Process(self.process.pid)} if self.process.poll() is None else {}
        if role == "grader":
            parts = self.living("verifier").items()
            return {f"{part}/{child.pid}": child for part, verifier in parts for child in _children(verifier)}
        if role in ACTORS:
            found = {}
            for path in sorted((self.run_dir / "logs").glob(f"{role}-*.log")):
                for name, pid in _HEAD.findall(path.read_text(errors="replace")):
                    if (process := self._mine(int(pid))) is not None:
                        found[name] = process
            return found
        name = {"raylet": "raylet", "gcs": "gcs_server"}[role]
        tree = _children(psutil.Process(self.process.pid)) if self.process.poll() is None else []
        return dict([(role, one) for one in tree if one.name() == name][:1])

    def _mine(self, pid: int) -> psutil.Process | None:
        """A living process of this attempt; a number may have passed to somebody else."""
        try:
            process = psutil.Process(pid)
            alive = process.status() != psutil.STATUS_ZOMBIE
            return process if alive and process.environ().get("SAPO_TEST_TAG") == self.entry.tag else None
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return None

    def kill(self, role: str, pick: Callable[[list[str]], str] = min, number: int = signal.SIGKILL) -> str | None:
        """Send a signal to one process of a role; returns its part's name, None if there is none at this moment."""
        victims = self.living(role)
        if not victims:
            return None
        name = pick(sorted(victims))
        try:
            victims[name].send_signal(number)
        except psutil.NoSuchProcess:
            return None
        return name

    def kill_all(self) -> None:
        """Whatever still runs of it; nothing if it has ended in order, or was never started."""
        if hasattr(self, "process"):
            for process in psutil.process_iter():
                if self._mine(process.pid) is not None:
                    with suppress(psutil.NoSuchProcess):  # it ended with the others
                        process.kill()
            self.process.wait(30)

    def gone(self, seconds: float = 30.0) -> None:
        """The attempt ends, or was killed: nothing of it may be left within a bound."""
        self.process.wait(seconds)
        left = self.entry.leaves_nothing()
        assert left == [], f"left behind: {left}"

    # --- orders and disk -------------------------------------------------------------------------------------------

    @property
    def _orders(self) -> Path:
        return self.folder / "workers"

    def order(self, workers: int, most: int) -> None:
        """Aim at another number of rollout workers, as a control plane would."""
        draft = self._orders.with_suffix(".new")
        draft.write_text(f"1 {most} {workers}")
        draft.replace(self._orders)

    def fill_disk(self) -> None:
        """Leave not a byte of room on the run's own disk."""
        assert self.disk is not None
        with (self.disk / "filler").open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free_disk(self) -> None:
        """Give it back."""
        assert self.disk is not None
        (self.disk / "filler").unlink()

    # --- progress ---------------------------------------------------------------------------------------------------

    def journal(self, kind: str) -> list[dict[str, Any]]:
        """Rows of a kind so far. This is asked often, of long journals: only what is new is read."""
        path, mark = self.run_dir / "journal.jsonl", f'"kind":"{kind}"'.encode()
        rows = self._rows.setdefault(kind, [])
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read.get(kind, 0))
                whole, _, _ = file.read().rpartition(b"\n")
            rows += [json.loads(line) for line in whole.splitlines() if mark in line]
            self._read[kind] = self._read.get(kind, 0) + (len(whole) + 1 if whole else 0)
        return rows

    def events(self, what: str) -> list[dict[str, Any]]:
        """`worker` events of a sort."""
        return [row for row in self.journal("worker") if row["what"] == what]

    def attempt(self) -> int:
        """Number of the newest attempt."""
        return int((self.run_dir / "attempt").read_text())

    def workers_ready(self) -> set[str]:
        """Rollout workers that the newest attempt may use, as far as is written down."""
        ready: set[str] = set()
        attempt = 0
        for row in self.journal("worker"):
            ready = ready if row["attempt"] == attempt else set()
            attempt = row["attempt"]
            if row["what"] in ("worker_ready", "worker_caught_up", "worker_kept"):
                ready.add(row["worker"])
            elif row["what"] in ("worker_lost", "worker_behind", "worker_stopped"):
                ready.discard(row["worker"])
        return ready

    def step(self) -> int:
        """The newest step that is written down."""
        steps = self.journal("step")
        return int(steps[-1]["step"]) if steps else 0

    def until(self, condition: Callable[[], object], what: str, seconds: float = 300.0) -> None:
        """Wait, while the attempt is at work."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended while {what}: {self.log.read_text()[-4000:]}"
            assert time.monotonic() < end, f"nothing within {seconds:g} s: {what}; {self.log.read_text()[-2000:]}"
            time.sleep(0.2)

    def steps_on(self, steps: int = 2) -> None:
        """Wait until so many steps more were taken: whatever was done to it, the run goes on."""
        done = len(self.journal("step"))
        self.until(lambda: len(self.journal("step")) >= done + steps, f"{steps} steps after {done}", 600)

    def end(self, seconds: float = 300.0) -> int:
        """Wait for the end; returns the exit code."""
        self.gone(seconds)
        return self.process.returncode

    def audited(self) -> Report:
        """The auditor's report, which must find nothing."""
        report = audit(self.run_dir)
        assert report.findings == [], report.findings
        return report


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
