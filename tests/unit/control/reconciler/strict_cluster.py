"""A cluster for tests that is stricter than Ray: it checks what it is handed, and remembers every launch."""

from __future__ import annotations

import re
import stat
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sapo_ray.control.launcher import (
    LauncherUnavailable,
    LaunchRefused,
    LaunchRequest,
    LaunchState,
    LaunchStatus,
)

FINAL = {"STOPPED", "SUCCEEDED", "FAILED"}
NEXT: dict[str, set[str]] = {"PENDING": {"RUNNING", *FINAL}, "RUNNING": FINAL}


@dataclass
class Driver:
    """A driver that was started."""

    request: LaunchRequest
    token: str
    state: LaunchState = "PENDING"
    message: str = ""
    printed: str = ""

    def become(self, state: LaunchState, message: str = "") -> None:
        assert state in NEXT.get(self.state, ()), f"{self.request.submission_id}: {self.state} -> {state}"
        self.state, self.message = state, message


class StrictCluster:
    """Launcher and cluster in one. Safe for several threads."""

    def __init__(self) -> None:
        self.drivers: dict[str, Driver] = {}
        self.submits: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.available = True
        self.obeys_stop = True
        self.refuses: str | None = None
        self._lock = threading.RLock()

    def ping(self) -> None:
        if not self.available:
            raise LauncherUnavailable("no cluster")

    def submit(self, request: LaunchRequest) -> None:
        self.ping()
        if self.refuses:
            raise LaunchRefused(self.refuses)
        with self._lock:
            id = request.submission_id
            assert id == f"sapo-{request.job_id}-{request.attempt}"
            assert re.fullmatch(r"sapo-job-[2-7a-z]{20}-[1-9]\d*", id)
            self.submits[id] += 1
            if id in self.drivers:
                return
            mode = stat.S_IMODE(request.token_file.stat().st_mode)
            assert mode == 0o600, oct(mode)
            alive = [other for other in self.of_job(request.job_id) if other.state not in FINAL]
            assert not alive, f"{id} was started while {alive} ran"
            self.drivers[id] = Driver(request=request, token=Path(request.token_file).read_text())

    def status(self, submission_id: str) -> LaunchStatus:
        self.ping()
        with self._lock:
            driver = self.drivers.get(submission_id)
            if driver is None:
                return LaunchStatus(state="UNKNOWN")
            return LaunchStatus(state=driver.state, message=driver.message)

    def stop(self, submission_id: str) -> None:
        self.ping()
        with self._lock:
            self.stops[submission_id] += 1
            driver = self.drivers.get(submission_id)
            if driver is not None and driver.state not in FINAL and self.obeys_stop:
                driver.become("STOPPED")

    def logs(self, submission_id: str) -> str:
        self.ping()
        return self.drivers[submission_id].printed if submission_id in self.drivers else ""

    def of_job(self, job_id: str) -> list[Driver]:
        """All drivers that a job ever had, in order."""
        return [driver for driver in list(self.drivers.values()) if driver.request.job_id == job_id]

    def forget_everything(self) -> None:
        """The head node is replaced."""
        self.drivers.clear()
