"""A Ray cluster of the service's own, on this machine, for installations without one.

It is a process of its own (`ray start --head --block`) and outlives a service that is killed, so that training goes on;
the next service with the same data folder finds it by `ray.json` and goes on with it. A service that ends in order ends
it: exactly the processes that were started, found by a mark in their environment, and its temporary folder.

Whoever reaches a Ray cluster can run code in it, so this one wants a token, which lies in the data folder for this user
alone. Its processes and the drivers are given the file's path.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import structlog

from sapo_ray.control.embedded_processes import KILL_S, MARK, Record, is_alive, kill_all, this_boot, wait_until_gone
from sapo_ray.control.launcher import LauncherUnavailable, RayJobs
from sapo_ray.errors import DeadlineExceeded, ResourceError

log = structlog.get_logger("sapo_ray.control.embedded")

RECORD = "ray.json"
TOKEN = "ray.token"
LEAST_CPUS = 16
"""Logical: each actor of a job takes one, and on a small machine they share the real ones."""
START_S = 120.0
END_S = 10.0
"""Bound of Ray's own way to end; then what is left is killed."""
STOP_WAIT_S = 10
"""Time a driver has between SIGTERM and SIGKILL when it is stopped; Ray's default is 3."""
LEAST_STORE, MOST_STORE = 256 << 20, 8 << 30
"""Bytes of the object store."""
TRIES = 3
"""Starts of a cluster: a port that was free may be taken a moment later."""


class Stopped(Exception):
    """The service was told to end while the cluster started."""


class EmbeddedRay:
    """The cluster of one data folder; one service at a time may hold it (see serve.py's lock).

    `token` is what it wants to be shown; it stays the same for all clusters of the folder.
    """

    def __init__(self, data_dir: Path) -> None:
        if find_spec("ray") is None:
            raise ResourceError(
                "there is no Ray in this environment to start a cluster with; name the dashboard of one that runs "
                "with --ray-jobs-url or SAPO_RAY_JOBS_URL"
            )
        self._path = data_dir / RECORD
        self._log = data_dir / "ray.log"
        self._token_file = data_dir / TOKEN
        self.token = _token(self._token_file)
        self._record: Record | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of the Jobs API; stays the same when the head is replaced."""
        assert self._record is not None, "not started"
        return self._record.url

    def start(self, stop: threading.Event) -> None:
        """Go on with the cluster that is there, or start one. Raises ResourceError, DeadlineExceeded, Stopped."""
        found = self._read()
        if found is not None:
            if is_alive(found) and self._why_not(found) is None:
                log.info("cluster_found", pid=found.pid, url=found.url)
                self._record = found
                return
            self._record = found
            self.end()
        self._start(stop, None)

    def replace_if_dead(self, stop: threading.Event) -> bool:
        """Start a new head where the old one has died. Whether it had."""
        record = self._record
        if record is None or is_alive(record):
            return False
        log.error("cluster_died", pid=record.pid, log=str(self._log))
        self.end()
        self._record = record  # its address goes on
        self._start(stop, record.dashboard)
        return True

    def end(self) -> None:
        """End the cluster's processes and remove its folder. Bounded; what cannot be killed is logged."""
        record = self._record
        if record is None:
            return
        if is_alive(record):
            assert record.pid is not None
            with suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGTERM)
            wait_until_gone(record, END_S)
        left = kill_all(record)
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_S)
            self._process = None
        if left:
            log.error("cluster_processes_left", pids=left)
            return
        shutil.rmtree(record.folder, ignore_errors=True)
        self._path.unlink(missing_ok=True)
        self._record = None
        log.info("cluster_ended", pid=record.pid)

    def _start(self, stop: threading.Event, dashboard: int | None) -> None:
        for left in reversed(range(TRIES)):
            try:
                self._start_once(stop, dashboard)
                return
            except ResourceError:
                self.end()
                if not left:
                    raise
            except BaseException:
                self.end()
                raise

    def _start_once(self, stop: threading.Event, dashboard: int | None) -> None:
        store = object_store_bytes()
        ports = _free_ports(4)
        folder = tempfile.mkdtemp(prefix="sapo-")  # short: the paths of sockets are limited to about 100 characters
        record = Record(
            mark=secrets.token_hex(16), folder=folder, dashboard=dashboard or ports[0], boot=this_boot(), pid=None
        )
        self._record = record
        self._write(record)  # before anything runs, so that nothing can be forgotten
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={record.dashboard}", f"--port={ports[1]}"]
        command += [f"--ray-client-server-port={ports[2]}", f"--dashboard-agent-listen-port={ports[3]}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
        command += [f"--num-cpus={max(LEAST_CPUS, os.cpu_count() or 1)}", f"--object-store-memory={store}"]
        command += [f"--temp-dir={folder}/r"]  # a folder below: Ray opens its own to all users
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=_environment(record.mark, self._token_file),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,  # Ctrl-C is for the service, which ends the cluster after its drivers
            )
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(self._process.pid).create_time()
            self._record = record = replace(record, pid=self._process.pid, started=started)
            self._write(record)
        self._until_it_answers(record, stop)
        log.info("cluster_started", pid=record.pid, url=record.url, folder=folder)

    def _until_it_answers(self, record: Record, stop: threading.Event) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_S
        while (why := self._why_not(record)) is not None:
            if self._process.poll() is not None:
                raise ResourceError(
                    f"Ray ended while it started (exit code {self._process.returncode}); the end of {self._log}:\n"
                    + "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
                )
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"Ray's dashboard did not answer as it should within {START_S:.0f} s, at last: {why}; "
                    f"its own log ends with:\n{_end_of_dashboard_log(record)}"
                )
            if stop.wait(0.2):
                raise Stopped

    def _why_not(self, record: Record) -> str | None:
        """What keeps the cluster from answering, or None."""
        try:
            with RayJobs(record.url, token=self.token) as jobs:
                jobs.ping()
        except LauncherUnavailable as error:
            return str(error)
        return None

    def _write(self, record: Record) -> None:
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps(asdict(record)))
        os.replace(draft, self._path)

    def _read(self) -> Record | None:
        try:
            return Record(**json.loads(self._path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            log.warning("record_damaged", path=str(self._path), error=str(error))
            return None


def object_store_bytes() -> int:
    """Size of the object store: three tenths of what memory and /dev/shm have. Raises ResourceError."""
    memory = psutil.virtual_memory().available
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else memory
    size = min(int(0.3 * min(memory, shm)), MOST_STORE)
    if size < LEAST_STORE:
        raise ResourceError(
            f"Ray's object store needs {LEAST_STORE >> 20} MiB, three tenths of the shared memory; "
            f"{memory >> 20} MiB of memory and {shm >> 20} MiB of /dev/shm are free; give the machine or container "
            "more (docker: --shm-size)"
        )
    return size


def _token(path: Path) -> str:
    """The cluster's token, made when there is none."""
    if not path.exists():
        draft = path.with_suffix(".new")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.replace(draft, path)
    return path.read_text()


def _environment(mark: str, token_file: Path) -> dict[str, str]:
    """This process's, without what is the service's own business: its secrets, and another cluster's address."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")
        and (not name.startswith("SAPO_") or name.startswith("SAPO_LINK_"))
    }
    return kept | {
        MARK: mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # drivers were stopped before
        "RAY_worker_niceness": "0",  # Ray's 15 would let everything else on the machine come before the engines
    }


def _end_of_dashboard_log(record: Record) -> str:
    """Kept in the error, because the folder goes with the cluster."""
    try:
        return "\n".join((Path(record.folder) / "r/session_latest/logs/dashboard.log").read_text().splitlines()[-5:])
    except OSError as error:
        return f"(no log: {error})"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        ports = []
        for _ in range(count):
            one = held.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            ports.append(int(one.getsockname()[1]))
        return ports
