"""KubeRay's operator, Kubernetes' scheduler and the heads' Jobs API, as far as a launcher meets them.

The operator does as KubeRay 1.7 does: it makes pods up to `replicas`, deletes the pods that are named, and where a
group still has too many, any. It deletes busy ones first then, which is what a launcher must never let happen.
"""

from __future__ import annotations

import base64
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fake_kube import NAMESPACE, FakeKube, Object

RAYCLUSTERS, PODS, SECRETS, EVENTS = "ray.io/v1/rayclusters", "v1/pods", "v1/secrets", "v1/events"
READY = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}]
NO_ROOM = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
NO_ROOM["message"] = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


class Operator:
    """`work()` is one round of it. What is free and what is busy is the test's."""

    def __init__(self, kube: FakeKube) -> None:
        self.kube = kube
        self.nodes = 100
        """Pods that the scheduler has room for."""
        self.waiting: dict[str, str] = {}
        """By group: why its containers do not start."""
        self.complaint: tuple[str, str] | None = None
        """Why it makes no pods: reason and message of its warning."""
        self.most_pods = 1000
        """A quota of pods, which it meets."""
        self.unmounted = ""
        """A group whose volumes cannot be mounted."""
        self.busy: set[str] = set()
        self.chosen_by_itself: list[str] = []
        """Pods that it had to choose for deletion."""
        self._numbers = itertools.count(1)

    def work(self, rounds: int = 1) -> None:
        for _ in range(rounds):
            with self.kube.lock:
                for cluster in list(self.kube.of(RAYCLUSTERS).values()):
                    self._reconcile(cluster)
                self._schedule()

    def pods(self, cluster: str, group: str) -> dict[str, Object]:
        labels = {"ray.io/cluster": cluster, "ray.io/group": group}
        pods = self.kube.of(PODS)
        return {name: one for name, one in pods.items() if labels.items() <= one["metadata"]["labels"].items()}

    def head(self, cluster: str) -> Object:
        (pod,) = self.pods(cluster, "headgroup").values()
        return pod

    def _reconcile(self, cluster: Object) -> None:
        name, spec = cluster["metadata"]["name"], cluster["spec"]
        if "deletionTimestamp" in cluster["metadata"] or spec.get("suspend"):
            return
        if self.complaint is not None:
            self._warn("RayCluster", name, *self.complaint)
            return
        assert len(name) <= 53
        assert spec["authOptions"]["mode"] == "token"
        if cluster.get("status") is None:
            cluster["status"] = {"head": {"serviceName": f"{name}-head-svc"}}
            self.kube.put(RAYCLUSTERS, cluster)
        if not self.pods(name, "headgroup"):
            self._pod(cluster, "headgroup", spec["headGroupSpec"])
        for group in spec["workerGroupSpecs"]:
            self._group(cluster, group)

    def _group(self, cluster: Object, group: Object) -> None:
        name = cluster["metadata"]["name"]
        for victim in (group.get("scaleStrategy") or {}).get("workersToDelete") or []:
            if (PODS, victim) in self.kube.objects:
                self.kube.delete(PODS, victim)
        wanted = min(max(group["replicas"], group["minReplicas"]), group["maxReplicas"])
        there = self.pods(name, group["groupName"])
        for _ in range(wanted - len(there)):
            self._pod(cluster, group["groupName"], group)
        for victim in sorted(there, key=lambda pod: pod not in self.busy)[: max(0, len(there) - wanted)]:
            self.chosen_by_itself.append(victim)
            self.kube.delete(PODS, victim)

    def _pod(self, cluster: Object, group: str, spec: Object) -> None:
        name = cluster["metadata"]["name"]
        labels = {"ray.io/cluster": name, "ray.io/group": group}
        labels["ray.io/node-type"] = "head" if group == "headgroup" else "worker"
        labels |= spec["template"]["metadata"]["labels"]
        if len(self.kube.of(PODS)) >= self.most_pods:
            self._warn("RayCluster", name, "FailedToCreateWorkerPod", "pods is forbidden: exceeded quota: team")
            return
        owner = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": name, "uid": cluster["metadata"]["uid"]}
        pod = f"{name}-head" if group == "headgroup" else f"{name}-{group}-worker-{next(self._numbers):05d}"
        metadata = {"name": pod, "labels": labels, "ownerReferences": [owner]}
        self.kube.put(PODS, {"metadata": metadata, "spec": spec["template"]["spec"], "status": {"phase": "Pending"}})

    def _schedule(self) -> None:
        placed = 0
        for pod in self.kube.of(PODS).values():
            placed += 1
            group, cluster = pod["metadata"]["labels"]["ray.io/group"], pod["metadata"]["labels"]["ray.io/cluster"]
            if pod["status"].get("phase") == "Failed":
                continue
            waiting = self.waiting.get(group) or ("" if self.token(cluster) else "CreateContainerConfigError")
            pod["status"] = {"phase": "Pending", "conditions": [NO_ROOM]}
            if group == self.unmounted:
                pod["status"] = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]}
                self._warn("Pod", pod["metadata"]["name"], "FailedMount", "nfs.registry.internal: no answer")
            elif placed <= self.nodes and waiting:
                state = {"waiting": {"reason": waiting, "message": "registry.internal/secret-image"}}
                pod["status"] = {"phase": "Pending", "containerStatuses": [{"name": "ray", "state": state}]}
            elif placed <= self.nodes:
                pod["status"] = {"phase": "Running", "conditions": READY, "podIP": f"10.0.0.{placed}"}

    def token(self, cluster: str) -> str:
        """What the cluster's pods have as their token; empty while its Secret is not there."""
        found = self.kube.objects.get((RAYCLUSTERS, cluster))
        name = found["spec"]["authOptions"]["secretName"] if found else ""
        secret = self.kube.objects.get((SECRETS, name))
        return base64.b64decode(secret["data"]["auth_token"]).decode() if secret else ""

    def _warn(self, kind: str, name: str, reason: str, message: str) -> None:
        event = {"metadata": {"name": f"{name}.warning"}, "type": "Warning", "reason": reason, "message": message}
        event["involvedObject"] = {"kind": kind, "name": name, "namespace": NAMESPACE}
        self.kube.put(EVENTS, event | {"lastTimestamp": "2026-01-01T00:00:00Z"})


class Heads:
    """The Jobs API of all clusters' heads, each below `/<cluster>`; only a head that is ready answers."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.drivers: dict[str, Object] = {}
        """By cluster, what was submitted to its head; gone with the head."""
        self.submissions: list[str] = []
        """All that were ever taken."""
        self.silent = False
        """They do not answer, whatever Kubernetes says."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def address(self, cluster: Object) -> str:
        """What is told of a cluster whose operator has made its service."""
        if not (cluster.get("status") or {}).get("head"):
            return ""
        return f"http://127.0.0.1:{self._server.server_port}/{cluster['metadata']['name']}"

    def become(self, cluster: str, state: str, message: str = "") -> None:
        """A driver goes on, or ends."""
        self.drivers[cluster] |= {"status": state, "message": message}

    def _ready(self, cluster: str) -> str:
        """The head's own identity while it is ready, else empty."""
        pods = self.operator.pods(cluster, "headgroup").values()
        return next((pod["metadata"]["uid"] for pod in pods if pod["status"].get("conditions") == READY), "")

    def answer(self, method: str, path: str, token: str, body: Object) -> tuple[int, Any] | None:
        """One request; None: no answer."""
        _, cluster, *rest = path.split("/")
        with self.operator.kube.lock:
            head = self._ready(cluster)
            if self.silent or not head:
                return None
            if token != self.operator.token(cluster):
                return 401, "Unauthorized"
            if method == "POST" and rest == ["api", "jobs", ""]:
                return self._submit(cluster, head, body)
            driver = self.drivers.get(cluster)
            if driver is None or driver["submission_id"] != rest[2] or driver["head"] != head:
                return 404, f"Job {rest[2]} does not exist"
            if rest[3:] == ["stop"]:
                driver["status"] = "STOPPED"
                return 200, {"stopped": True}
            return 200, {"logs": f"log of {cluster}"} if rest[3:] == ["logs"] else driver

    def _submit(self, cluster: str, head: str, body: Object) -> tuple[int, Any]:
        there = self.drivers.get(cluster)
        if there is not None and there["head"] == head:
            return 500, "Job with submission_id already exists. Please use a different submission_id."
        self.submissions.append(body["submission_id"])
        self.drivers[cluster] = body | {"status": "RUNNING", "head": head, "message": ""}
        return 200, {"submission_id": body["submission_id"]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        heads = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Nothing."""

            def _handle(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
                said = heads.answer(self.command, self.path, token, json.loads(raw) if raw else {})
                if said is None:
                    self.close_connection = True
                    return
                body = (said[1] if isinstance(said[1], str) else json.dumps(said[1])).encode()
                self.send_response(said[0])
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = _handle

        return Handler
