"""What stands around Ray's KubeRay autoscaler in a test: a head, an operator that starts raylets for pods, a driver.

The raylets are Ray's own, on this machine; their resources and labels are those of the RayCluster's groups.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from api_server_stand_in import ADMIN, Kubernetes
from api_server_tools import Failure

Object = dict[str, Any]
STARTS, START_S = 3, 300.0
"""Of a node: tries, and how long each may take."""
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_RAY = f"""
import sys, time
from ray._private import services
from ray.scripts.scripts import main
asked = services.get_node
def patiently(*of_node):  # Ray itself gives a raylet 30 s, and its agents' imports alone take longer on a busy machine
    end = time.monotonic() + {START_S - 10}
    while True:
        try:
            return asked(*of_node)
        except RuntimeError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
services.get_node = patiently
main()
"""
START = [sys.executable, "-c", START_RAY, "start", "--block"]
PATIENCE = {
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_gcs_server_port_wait_time_s": "240",
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "20",
}
"""By Ray's own bounds a node that gets no processor for some seconds is dead, which is not what is looked at here."""
RUN_AUTOSCALER = """
import sys
from ray.autoscaler._private.kuberay import node_provider
account, name, namespace, address = sys.argv[1:]
node_provider.IN_CLUSTER_TOKEN_PATH = f"{account}/token"  # a pod has it at a fixed place, which this machine has not
from ray.autoscaler._private.kuberay.run_autoscaler import run_kuberay_autoscaler
run_kuberay_autoscaler(name, namespace, address)
"""
DRIVER = """
import json, sys
import ray
from sapo_ray.placement import label_selector
for left in reversed(range(8)):  # Ray gives a node half a minute to tell of itself
    try:
        ray.init(sys.argv[1], log_to_driver=False, logging_level="error")
        break
    except Exception:
        if not left:
            raise
        ray.shutdown()
class Worker:
    def node(self): return ray.get_runtime_context().get_node_id()
made = []
print("up", flush=True)
for line in sys.stdin:
    do, count = json.loads(line)
    if do == "make":
        made += [ray.remote(Worker).options(num_gpus=1, label_selector=label_selector("rollout")).remote()
                 for _ in range(count)]
        print("made", flush=True)
    elif do == "answering":
        ready, _ = ray.wait([one.node.remote() for one in made], num_returns=len(made), timeout=count)
        print(len(set(ray.get(ready))), flush=True)
    elif do == "end":
        for one in made[:count]:
            ray.kill(one)
        del made[:count]
        print("ended", flush=True)
"""


class Process:
    """A process with a group of its own, ended by its id."""

    def __init__(self, log: Path, command: list[str], environment: dict[str, str], **how: Any) -> None:
        self.log = log
        with log.open("wb") as file:
            how = {"stdout": file, **how}
            self.process = subprocess.Popen(
                command, env=environment, stderr=subprocess.STDOUT, start_new_session=True, **how
            )

    def end(self) -> None:
        """Politely, then not."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait(10)


class Cluster:
    """A head with Ray's autoscaler beside it, and an operator that brings pods to what the RayCluster says."""

    def __init__(self, kube: Kubernetes, name: str, account: Path, folder: Path) -> None:
        self.kube, self.name, self.folder = kube, name, folder
        self._temporary = tempfile.TemporaryDirectory(prefix="sapo-")
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in range(2)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            gcs, client = (one.getsockname()[1] for one in sockets)
        self.address = f"127.0.0.1:{gcs}"
        self._environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self._environment |= PATIENCE | {"OMP_NUM_THREADS": "1"}
        self._environment |= {"RAY_AUTH_MODE": "token", "RAY_enable_autoscaler_v2": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        self._environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.nodes: dict[str, Process] = {}
        self.removed: list[str] = []
        """Pods that the autoscaler named, in order."""
        self.trouble: list[str] = []
        self._count = 0
        start = [*START, "--head", "--num-cpus=0", "--no-monitor", "--include-dashboard=false"]
        start += [f"--port={gcs}", f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1"]
        start += ["--object-store-memory=80000000", f"--temp-dir={self._temporary.name}/r"]
        head = f"{name}-head"
        self.head = Process(folder / "head.log", start, self._as_pod(head, "headgroup"))
        self._wait_for_head()
        self._pod(head, "head", "headgroup")
        self._runs(head)
        service = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT_HTTPS": str(kube.port)}
        self.autoscaler = Process(
            folder / "autoscaler.log",
            [sys.executable, "-c", RUN_AUTOSCALER, str(account), name, "rl", self.address],
            self._environment
            | service
            | {"RAY_KUBERAY_CA_CERT_PATH": str(account / "ca.crt"), "RAY_HEAD_POD_NAME": head}
            | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "KUBERAY_CRD_VER": "v1"},
        )
        self._ending = threading.Event()
        self._operator = threading.Thread(target=self._operate, name="operator", daemon=True)
        self._operator.start()

    def close(self) -> None:
        """Autoscaler first: it would ask for new nodes."""
        self._ending.set()
        self._operator.join(60)
        for process in (self.autoscaler, *self.nodes.values(), self.head):
            process.end()
        self._temporary.cleanup()

    def driver(self) -> Driver:
        """A process that makes actors as rollout workers are made."""
        return Driver(self.folder / "driver.log", self.address, self._environment)

    def pods(self, group: str) -> list[str]:
        """Names of a group's pods."""
        found = self.kube.do(ADMIN, "list", "pods", "rl", "", query={"labelSelector": f"ray.io/group={group}"})
        return [pod["metadata"]["name"] for pod in found["items"]]

    def until(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Wait; what went wrong is shown with the autoscaler's last words."""
        end = time.monotonic() + seconds
        while not condition():
            assert not self.trouble, self.trouble
            told = f"{what} did not happen within {seconds:.0f} s\n" + self.autoscaler.log.read_text()[-3000:]
            assert time.monotonic() < end, told
            time.sleep(0.3)

    def _wait_for_head(self) -> None:
        check = [*RAY, "health-check", "--address", self.address]
        end = time.monotonic() + START_S
        while subprocess.run(check, env=self._environment, capture_output=True, timeout=60, check=False).returncode:
            assert self.head.process.poll() is None, self.head.log.read_text()
            assert time.monotonic() < end, "no head"

    def _as_pod(self, name: str, group: str) -> dict[str, str]:
        """What the operator sets in every Ray container."""
        return self._environment | {"RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": group}

    def _pod(self, name: str, kind: str, group: str) -> None:
        """One that only starts. It is there before its raylet, as in Kubernetes: a raylet that the autoscaler finds
        without a pod is another node to it, beside the one that it asked for, and its books are wrong for good."""
        labels = {"ray.io/cluster": self.name, "ray.io/node-type": kind, "ray.io/group": group}
        pod = {"metadata": {"name": name, "labels": labels}, "spec": {"containers": [{"name": "ray", "image": "x"}]}}
        pod["status"] = _status("Pending", {"waiting": {"reason": "ContainerCreating"}})
        self.kube.do(ADMIN, "create", "pods", "rl", "", body=pod)

    def _runs(self, name: str) -> None:
        running = _status("Running", {"running": {"startedAt": "2026-01-01T00:00:00Z"}})
        self.kube.change("Pod", name, lambda pod: pod.update(status=running))

    def _operate(self) -> None:
        while not self._ending.wait(0.5):
            try:
                for group in self.kube.get("RayCluster", self.name)["spec"]["workerGroupSpecs"]:
                    self._bring(group)
            except (Failure, OSError, KeyError) as error:
                self.trouble.append(repr(error))

    def _bring(self, group: Object) -> None:
        """As the operator does where the cluster scales itself: named pods go, missing ones come, none is chosen."""
        mine = self.pods(group["groupName"])
        for name in group["scaleStrategy"].get("workersToDelete") or []:
            if name in mine:
                mine.remove(name)
                self.removed.append(name)
                self._end_node(name)
        for name in mine:
            if self.nodes[name].process.poll() is not None:
                self.trouble.append(f"{name} ended: {self.nodes[name].log.read_text()[-1000:]}")
        for _ in range(max(group["replicas"], group["minReplicas"]) - len(mine)):
            self._start_node(group)

    def _start_node(self, group: Object) -> None:
        self._count += 1
        name = f"{self.name}-{group['groupName']}-worker-{self._count}"
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        labels = ",".join(f"{key}={value}" for key, value in group["labels"].items())
        start = [*START, f"--address={self.address}", "--node-ip-address=127.0.0.1"]
        start += [f"--num-cpus={limits['cpu']}", f"--num-gpus={limits.get('nvidia.com/gpu', 0)}"]
        start += [f"--labels={labels}", "--object-store-memory=80000000"]
        self._pod(name, "worker", group["groupName"])
        for left in reversed(range(STARTS)):  # as a kubelet does
            node = Process(self.folder / f"{name}.log", start, self._as_pod(name, group["groupName"]))
            if self._has_started(node) or not left or self._ending.is_set():
                break
            node.end()
        self.nodes[name] = node
        self._runs(name)

    def _has_started(self, node: Process) -> bool:
        """Waited for: of two raylets that start on one address at once, one fails after half a minute."""
        end = time.monotonic() + START_S
        while "Ray runtime started" not in node.log.read_text():
            if node.process.poll() is not None or time.monotonic() > end or self._ending.wait(0.2):
                return False
        return True

    def _end_node(self, name: str) -> None:
        self.nodes.pop(name).end()
        self.kube.do(ADMIN, "delete", "pods", "rl", name)


def _status(phase: str, state: Object) -> Object:
    running = "running" in state
    container = {"name": "ray", "image": "x", "imageID": "", "restartCount": 0, "ready": running, "state": state}
    return {"phase": phase, "containerStatuses": [container]}


class Driver:
    """Makes and ends actors in a process of its own, which a test's own Ray does not disturb."""

    def __init__(self, log: Path, address: str, environment: dict[str, str]) -> None:
        self._process = Process(
            log,
            [sys.executable, "-c", DRIVER, address],
            environment | {"SAPO_ROLE_LABEL": "sapo-ray.io/role"},
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
        )
        assert self._read() == "up"

    def do(self, what: str, count: int) -> str:
        """make, end (the first so many), or answering (how many nodes, within so many seconds)."""
        pipe = self._process.process.stdin
        assert pipe is not None
        pipe.write(json.dumps([what, count]).encode() + b"\n")
        pipe.flush()
        return self._read()

    def close(self) -> None:
        self._process.end()
        for pipe in (self._process.process.stdin, self._process.process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> str:
        pipe = self._process.process.stdout
        assert pipe is not None
        while line := pipe.readline().decode().strip():
            if line in ("up", "made", "ended") or line.isdigit():
                return line
        raise AssertionError("the driver ended")
