"""A service as a process of its own, with a cluster that is only said to be there.

`python tests/api/api_server.py DATA_DIR DATABASE_URL PORT` serves until it is ended. With API_SERVER_PATIENCE_S it
waits so long, instead of half a minute, for a head or a body.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

PLAIN: Any = {"trust_env": False, "verify": False}
"""For clients of httpx: no proxy, and no certificates, which take longer to load than a request takes."""
ADMIN_KEY = "sapo_the-operators-own-key-of-this-test"


class FakeCluster:
    """A launcher whose cluster can be taken away; nothing is started."""

    def __init__(self) -> None:
        self.down = False
        self.printed: dict[str, str] = {}

    def ping(self) -> None:
        self._check()

    def submit(self, request: object) -> None:
        raise AssertionError("the application launches nothing")

    def status(self, submission_id: str) -> object:
        raise AssertionError("the application asks for nothing but logs")

    def stop(self, submission_id: str) -> None:
        raise AssertionError("the application stops nothing")

    def logs(self, submission_id: str) -> str:
        self._check()
        return self.printed.get(submission_id, "")

    def _check(self) -> None:
        from sapo_ray.control.launcher import LauncherUnavailable

        if self.down:
            raise LauncherUnavailable("no cluster")


class ServerProcess:
    """Starts and ends one service. `url` is where it listens; it keeps its port over a restart."""

    def __init__(self, data_dir: Path, database_url: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.database_url = database_url
        self._arguments = [str(data_dir), database_url, str(self._port)]
        self._environment = {**os.environ, "SAPO_ADMIN_KEY": ADMIN_KEY, **environment}
        self._log = data_dir / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def log(self) -> str:
        """Everything the service wrote."""
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        """Start, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *self._arguments], env=self._environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{self.url}/healthz", timeout=5, **PLAIN)
                return
            except httpx.TransportError:
                assert self._process.poll() is None, self.log
                time.sleep(0.05)
        raise AssertionError(f"the service did not start within 60 s: {self.log}")

    def kill(self) -> None:
        """End it without warning."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None


def _serve(data_dir: str, database_url: str, port: str) -> None:
    import uvicorn

    from sapo_ray.control import edge, http, logs
    from sapo_ray.control.access import first_admin_key
    from sapo_ray.control.app import create_app
    from sapo_ray.control.http import configured
    from sapo_ray.control.settings import load_settings
    from sapo_ray.control.store import Store

    http.HEAD_S = edge.BODY_S = float(os.environ.get("API_SERVER_PATIENCE_S", http.HEAD_S))
    settings = load_settings(data_dir=data_dir, database_url=database_url, rate_per_s=0)
    logs.configure(settings.log_level)
    store = Store(settings.database_url)
    store.migrate()
    first_admin_key(store, settings)
    app = create_app(settings, store, FakeCluster())  # type: ignore[arg-type]
    uvicorn.Server(configured(app, host="127.0.0.1", port=int(port), timeout_graceful_shutdown=3)).run()


if __name__ == "__main__":
    _serve(*sys.argv[1:4])
