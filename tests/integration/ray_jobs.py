"""A Ray cluster of a test's own, with its Jobs API, as a control plane finds one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from sapo_ray.placement import ROLE_LABEL

LABEL = "sapo-ray.io/role"


class Cluster:
    """`ray start --head`, with more logical CPUs than the machine has.

    With `node_types` (as in a cluster's configuration), Ray's own autoscaler (v2) adds and removes nodes of these
    types; they are raylets on this machine, which Ray's provider for tests starts.
    """

    def __init__(self, folder: Path, cpus: int = 4, node_types: dict[str, Any] | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="sapo-")  # socket paths are limited to 100 characters
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in range(4)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            gcs, dashboard, client, agent = (one.getsockname()[1] for one in sockets)
        self.url, self.address = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}"
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {"HF_HUB_OFFLINE": "1", "SAPO_LINK_INTERVAL_S": "0.2", "RAY_AUTH_MODE": "disabled"}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        environment["PYTHONPATH"] = str(Path(__file__).parent)  # where a user's own reward lies
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}"]
        command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        command += ["--object-store-memory=1000000000", f"--temp-dir={self._temporary.name}/r"]
        if node_types is not None:
            command += ["--node-ip-address=127.0.0.1", f"--autoscaling-config={_autoscaled(folder, gcs, node_types)}"]
            environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
            environment |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}
            environment |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID, ROLE_LABEL: LABEL}
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

    def _get(self, path: str) -> httpx.Response:
        """An answer; asked for again where Ray closed a kept connection in the same moment."""
        try:
            return self.call.get(path)
        except httpx.RemoteProtocolError:
            return self.call.get(path)

    def submit(self, name: str, arguments: list[str]) -> None:
        entrypoint = shlex.join([sys.executable, "-m", "sapo_ray.driver.main", *arguments])
        end = time.monotonic() + 120
        while True:
            answer = self.call.post("/api/jobs/", json={"entrypoint": entrypoint, "submission_id": name})
            if "No available agent" not in answer.text or time.monotonic() > end:
                break
        assert answer.status_code == 200, answer.text

    def status(self, name: str) -> dict[str, Any]:
        job: dict[str, Any] = self._get(f"/api/jobs/{name}").json()
        return job

    def logs(self, name: str) -> str:
        return str(self._get(f"/api/jobs/{name}/logs").json()["logs"])

    def wait(self, name: str, seconds: float = 600) -> dict[str, Any]:
        """Until a job has ended."""
        end = time.monotonic() + seconds
        while (job := self.status(name))["status"] not in ("SUCCEEDED", "FAILED", "STOPPED"):
            assert time.monotonic() < end, self.logs(name)[-4000:]
            time.sleep(0.5)
        return job

    def actors(self) -> list[tuple[str, str]]:
        """(class, state) of all that are not dead, Ray's own job supervisors left out."""
        rows = self._get("/api/v0/actors?limit=1000&detail=1").json()["data"]["result"]["result"]
        return [
            (row["class_name"], row["state"])
            for row in rows
            if row["state"] != "DEAD" and row["class_name"] != "JobSupervisor"
        ]

    def placement_groups(self) -> list[str]:
        """States of placement groups that still hold something."""
        rows = self._get("/api/v0/placement_groups?limit=1000").json()["data"]["result"]["result"]
        return [row["state"] for row in rows if row["state"] != "REMOVED"]

    def nodes(self) -> dict[str, list[str]]:
        """Ids of living nodes by the role that they bear."""
        found: dict[str, list[str]] = {}
        for row in self._get("/api/v0/nodes?limit=1000&detail=1").json()["data"]["result"]["result"]:
            if row["state"] == "ALIVE" and (role := row["labels"].get(LABEL)):
                found.setdefault(role, []).append(row["node_id"])
        return found

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        self.call.close()
        self._temporary.cleanup()


def _autoscaled(folder: Path, gcs: int, node_types: dict[str, Any]) -> Path:
    """Configuration file of a cluster whose nodes are raylets on this machine."""
    empty: dict[str, list[str]] = {
        f"{where}_commands": []
        for where in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    }
    head = {"resources": {}, "node_config": {}, "max_workers": 0}
    config: dict[str, Any] = empty | {
        "cluster_name": "simulated",
        "max_workers": 16,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "head_node_type": "ray.head.default",
        "available_node_types": node_types | {"ray.head.default": head},
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{gcs}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        **{"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "rsync_exclude": []},
        **{"rsync_filter": [], "file_mounts_sync_continuously": False},
    }
    path = folder / "autoscaling.json"
    path.write_text(json.dumps(config))
    return path
