"""What control.py puts under load, as processes of their own: the service, a bare FastAPI route, a PostgreSQL server.

python control_service.py PORT bare
python control_service.py PORT service DATA_DIR DATABASE_URL
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import psycopg
import uvicorn
from fastapi import FastAPI, Request, Response

from sapo_ray.control import logs
from sapo_ray.control.app import create_app
from sapo_ray.control.settings import load_settings
from sapo_ray.control.store import Store

START_S = 60.0
LIKE_A_JOB = json.dumps({"spec": {f"key_{n}": n for n in range(250)}}).encode()
"""About as long as a job's answer."""


class Server:
    """One of the two as a process; `url` is where it listens."""

    def __init__(self, kind: str, folder: Path, *arguments: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._command = [sys.executable, __file__, str(self.port), kind, *arguments]
        self._environment = {**os.environ, **environment}
        self._log = folder / f"{kind}.log"

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self._process.kill()
                    raise RuntimeError(f"it did not start: {self._log.read_text()[-2000:]}") from None
                time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(15)

    def resident(self) -> int:
        """Bytes of memory that it holds."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def cpu(self) -> float:
        """Processor seconds that it has used."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system


class Postgres:
    """A temporary server on a Unix socket, with PostgreSQL's own settings: each commit is flushed to the disk."""

    def __init__(self) -> None:
        # Run as root it refuses; then it is the packages' own user that runs it.
        self._user = pwd.getpwnam("postgres").pw_name if os.getuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="sapo-pg-"))  # a socket's path must be short

    def __enter__(self) -> Self:
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(self._folder, account.pw_uid, account.pw_gid)
        data = str(self._folder / "data")
        made = [program("initdb"), "-D", data, "-U", "sapo", "-A", "trust", "-E", "UTF8", "--locale=C"]
        subprocess.run(made, stdout=subprocess.DEVNULL, user=self._user, cwd=self._folder, timeout=120, check=True)
        command = [program("postgres"), "-D", data, "-k", str(self._folder), "-c", "listen_addresses="]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, user=self._user, cwd=self._folder)
        deadline = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(host=str(self._folder), user="sapo", dbname="postgres", connect_timeout=5).close()
                return self
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self._folder / "log").read_text()[-500:]) from None
                time.sleep(0.05)

    @property
    def url(self) -> str:
        """For the store."""
        return f"postgresql+psycopg://sapo@/postgres?host={self._folder}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        shutil.rmtree(self._folder, ignore_errors=True)


def program(name: str) -> str | None:
    """A program of PostgreSQL's: on the PATH, or where Debian keeps them. None: not installed."""
    kept = sorted(str(path) for path in Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or next(iter(kept), None)


def run_bare(port: int) -> None:
    """FastAPI and nothing else: read the body as JSON, answer with bytes that are ready. No key, no checks, no log."""
    app = FastAPI()

    @app.get("/bare")
    async def look() -> Response:
        return Response(LIKE_A_JOB, media_type="application/json")

    @app.post("/bare")
    async def submit(request: Request) -> Response:
        json.loads(await request.body())
        return Response(LIKE_A_JOB, 201, media_type="application/json")

    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False)


def run_service(port: int, data_dir: str, database_url: str) -> None:
    """The service as `sapo-ray serve` runs it, without reconciler and cluster; nobody is held to a rate."""
    settings = load_settings(data_dir=data_dir, database_url=database_url, rate_per_s=0)
    logs.configure(settings.log_level)
    launcher: Any = None  # only logs and /readyz ask for it
    app = create_app(settings, Store(settings.database_url), launcher)
    config = uvicorn.Config(
        app, "127.0.0.1", port, log_config=None, access_log=False, backlog=2048, timeout_graceful_shutdown=2
    )
    uvicorn.Server(config).run()


if __name__ == "__main__":
    if sys.argv[2] == "bare":
        run_bare(int(sys.argv[1]))
    else:
        run_service(int(sys.argv[1]), *sys.argv[3:5])
