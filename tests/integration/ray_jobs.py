"""A Ray cluster of a test's own, with its Jobs API, as a control plane finds one."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx


class Cluster:
    """`ray start --head`, with more logical CPUs than the machine has."""

    def __init__(self, folder: Path, cpus: int = 4) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="sapo-")  # socket paths are limited to 100 characters
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            gcs, dashboard = one.getsockname()[1], two.getsockname()[1]
        self.url, self.address = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}"
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {"HF_HUB_OFFLINE": "1", "SAPO_LINK_INTERVAL_S": "0.2", "RAY_AUTH_MODE": "disabled"}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        environment["PYTHONPATH"] = str(Path(__file__).parent)  # where a user's own reward lies
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}"]
        command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += ["--object-store-memory=1000000000", f"--temp-dir={self._temporary.name}/r"]
        with (folder / "ray.log").open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.call = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        end = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None, (folder / "ray.log").read_text()
            assert time.monotonic() < end, "no Jobs API"
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return self.call.get("/api/jobs/").status_code == 200
        except httpx.HTTPError:
            return False

    def submit(self, name: str, arguments: list[str]) -> None:
        entrypoint = shlex.join([sys.executable, "-m", "sapo_ray.driver.main", *arguments])
        answer = self.call.post("/api/jobs/", json={"entrypoint": entrypoint, "submission_id": name})
        assert answer.status_code == 200, answer.text

    def status(self, name: str) -> dict[str, Any]:
        job: dict[str, Any] = self.call.get(f"/api/jobs/{name}").json()
        return job

    def logs(self, name: str) -> str:
        return str(self.call.get(f"/api/jobs/{name}/logs").json()["logs"])

    def wait(self, name: str, seconds: float = 600) -> dict[str, Any]:
        """Until a job has ended."""
        end = time.monotonic() + seconds
        while (job := self.status(name))["status"] not in ("SUCCEEDED", "FAILED", "STOPPED"):
            assert time.monotonic() < end, self.logs(name)[-4000:]
            time.sleep(0.5)
        return job

    def actors(self) -> list[tuple[str, str]]:
        """(class, state) of all that are not dead, Ray's own job supervisors left out."""
        rows = self.call.get("/api/v0/actors?limit=1000&detail=1").json()["data"]["result"]["result"]
        return [
            (row["class_name"], row["state"])
            for row in rows
            if row["state"] != "DEAD" and row["class_name"] != "JobSupervisor"
        ]

    def placement_groups(self) -> list[str]:
        """States of placement groups that still hold something."""
        rows = self.call.get("/api/v0/placement_groups?limit=1000").json()["data"]["result"]["result"]
        return [row["state"] for row in rows if row["state"] != "REMOVED"]

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        self.call.close()
        self._temporary.cleanup()
