"""The processes of a cluster that a service started, and no others: found again, even by another service.

A number alone is not a process: numbers are given out again. A mark in the environment is, and so is the head's session
together with a file in the cluster's own folder.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "SAPO_EMBEDDED_RAY"
"""Environment variable that every process of the cluster inherits; its value is this cluster's alone."""
KILL_S = 5.0
"""Longest wait for killed processes to be gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a later service needs to find the cluster, or what is left of it."""

    mark: str
    folder: str
    dashboard: int
    pid: int | None = None
    started: float | None = None
    """Process creation time, so that the number alone is not taken for the process."""
    boot: str = ""

    @property
    def url(self) -> str:
        """Of the Jobs API."""
        return f"http://127.0.0.1:{self.dashboard}"


def this_boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def is_alive(record: Record) -> bool:
    """Whether the head's own process runs."""
    if record.pid is None or record.boot != this_boot():
        return False
    try:
        process = psutil.Process(record.pid)
        return bool(process.create_time() == record.started and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def processes_of(record: Record) -> list[psutil.Process]:
    """All processes of the cluster that live.

    Ray overwrites the environment of some with their title; those stay in the head's session and hold its files open.
    """
    if record.boot != this_boot():
        return []
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # ended meanwhile, or another user's
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                continue
            if process.environ().get(MARK) == record.mark or (
                record.pid is not None and os.getsid(process.pid) == record.pid and _holds_files(process.pid, record)
            ):
                found.append(process)
    return found


def _holds_files(pid: int, record: Record) -> bool:
    below = record.folder + os.sep
    return any(os.readlink(one).startswith(below) for one in Path(f"/proc/{pid}/fd").iterdir())


def wait_until_gone(record: Record, seconds: float) -> None:
    """Wait at most so long for the end of them all."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (is_alive(record) or processes_of(record)):
        time.sleep(0.1)


def kill_all(record: Record) -> list[int]:
    """Kill what is left; returns what cannot be killed."""
    deadline = time.monotonic() + KILL_S
    while left := processes_of(record):
        if time.monotonic() > deadline:
            return [process.pid for process in left]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # psutil makes sure that it is still the same process
        psutil.wait_procs(left, timeout=0.5)
    return []
