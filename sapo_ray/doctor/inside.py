"""The part that runs in the cluster, as a Ray job on its head: looks at every node, and lets all of them sum together.

    python -m sapo_ray.doctor.inside '{"data_dir": ..., "marker": ..., "control": ..., "versions": {...}, ...}'

Prints one line that begins with TOLD, then JSON. Nodes that the autoscaler has not started yet are not looked at.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from dataclasses import asdict, dataclass
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from sapo_ray.doctor import ping
from sapo_ray.doctor.findings import Check, Finding
from sapo_ray.doctor.machine import check_gpu, check_shm
from sapo_ray.doctor.network import clock_finding
from sapo_ray.doctor.storage import check_marker, check_storage
from sapo_ray.doctor.versions import REMEDY, compare, versions_here

TOLD = "SAPO-DOCTOR "
NODE_S = 90.0
"""For all nodes, side by side, to look at themselves: a worker process starts, and imports this."""
PLACED_S = 30.0
"""For a GPU to become free; jobs may hold them all."""
CLOCK_S = 10.0
CONTROL_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the control plane's end passes on."""

    checks: list[Check]
    data_dir: str
    min_free_gb: float
    marker: str
    """File that the other end has written to shared storage; empty if it could not."""
    text: str
    """What stands in it."""
    control: str
    """Where drivers report; empty if nothing is to be asked there."""
    versions: dict[str, str]
    """Of the other end."""


def look_at_node(asked: Asked, where: str, gpus: int, store: int, there: dict[str, str]) -> list[Finding]:
    """All that a node can tell of itself. `gpus` and `store`, bytes for objects: what Ray believes that it has."""
    found = []
    if "versions" in asked.checks:
        found.append(compare(there, versions_here(), "the head", where))
    if "storage" in asked.checks:
        wrong = check_marker(Path(asked.marker), asked.text, where) if asked.marker else None
        found.append(wrong or check_storage(Path(asked.data_dir), asked.min_free_gb, where))
    if "shm" in asked.checks:
        found.append(check_shm(where, store=store))
    if "gpu" in asked.checks:
        found.append(check_gpu(gpus, where))
    return found


def rank(number: int, world: int, address: str, backend: ping.Backend) -> tuple[bool, str]:
    """One rank of the sum, in a process that can be killed."""
    return ping.finish(ping.start_rank(number, world, address, backend), ping.BOUND_S)


def clock_here() -> float:
    """Unix time."""
    return time.time()


def address_here() -> str:
    """Where rank 0 can listen, as the other nodes reach it."""
    ray = import_module("ray")
    host = str(ray.util.get_node_ip_address())
    port = ping.free_port(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def look(asked: Asked) -> list[Finding]:
    """From the head at the whole cluster."""
    ray = import_module("ray")
    found = []
    if "versions" in asked.checks:
        found.append(_both_ends(asked.versions))
    if asked.control:
        found.append(_reach_control(asked.control))
    nodes = [node for node in ray.nodes() if node["Alive"]]
    pending = {}
    for node in nodes:
        where = f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
        gpus, store = (int(node["Resources"].get(name, 0)) for name in ("GPU", "object_store_memory"))
        task = ray.remote(look_at_node).options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node["NodeID"]))
        pending[where] = (task.remote(asked, where, gpus, store, versions_here()), node["NodeID"])
    deadline = time.monotonic() + NODE_S
    for where, (reference, node_id) in pending.items():
        found += _of_node(reference, where, node_id, asked.checks, deadline)
    if "nccl" in asked.checks:
        found.append(_sum(nodes))
    return found


def _of_node(reference: Any, where: str, node_id: str, checks: list[Check], deadline: float) -> list[Finding]:
    ray = import_module("ray")
    try:
        found: list[Finding] = ray.get(reference, timeout=max(1.0, deadline - time.monotonic()))
        if "clock" in checks:  # now that a process of that node is warm, so that the answer is quick
            started = time.time()
            task = ray.remote(clock_here).options(num_cpus=0, scheduling_strategy=_on(node_id))
            clock = ray.get(task.remote(), timeout=CLOCK_S)
            ended = time.time()
            offset, doubt = clock - (started + ended) / 2, (ended - started) / 2
            found.append(clock_finding(offset, doubt, "its clock beside the head's", where))
    except ray.exceptions.RayError as error:
        detail = f"the node could not look at itself: {_said(error)}"
        return [Finding(check="versions", status="failed", detail=detail, remedy=REMEDY, where=where)]
    return found


def _both_ends(versions: dict[str, str]) -> Finding:
    here = versions_here()
    expected = {name: one for name, one in versions.items() if name != "python"}
    return compare(expected, here, "the control plane", "head")


def _reach_control(url: str) -> Finding:
    """Drivers report to the service from the head; without that no job gets on."""
    remedy = (
        "SAPO_CONTROL_URL must be an address of the service as the cluster's head sees it (Kubernetes: the Service's "
        "name), and a NetworkPolicy must let the head reach it"
    )
    try:
        with build_opener(ProxyHandler({})).open(url.rstrip("/") + "/healthz", timeout=CONTROL_S) as answer:
            good = answer.status == 200
            detail = f"{url} answered {answer.status}"
    except (OSError, ValueError, HTTPException) as error:
        good, detail = False, f"drivers would report to {url}, which cannot be reached from the head: {error}"
    return Finding(
        check="dns", status="ok" if good else "failed", detail=detail, remedy="" if good else remedy, where="head"
    )


def _sum(nodes: list[dict[str, Any]]) -> Finding:
    """One rank on every node: on a GPU of each where there are GPUs, else on CPUs."""
    ray = import_module("ray")
    with_gpu = [node for node in nodes if node["Resources"].get("GPU", 0) >= 1]
    backend: ping.Backend = "nccl" if with_gpu else "gloo"
    chosen = with_gpu or nodes
    among = f"{len(chosen)} {'nodes with GPUs' if with_gpu else 'nodes without GPUs'}"
    holders = []
    try:
        for node in chosen:
            options = {"num_cpus": 0, "num_gpus": 1 if with_gpu else 0, "scheduling_strategy": _on(node["NodeID"])}
            holders.append(ray.remote(_Rank).options(**options).remote())
        ready = [holder.address.remote() for holder in holders]
        _, waiting = ray.wait(ready, num_returns=len(ready), timeout=PLACED_S)
        if waiting:
            detail = (
                f"{len(waiting)} of {len(chosen)} nodes gave no process within {PLACED_S:.0f} s: are all GPUs in use?"
            )
            return Finding(
                check="nccl", status="skipped", detail=detail, remedy="ask again when no job runs", where="cluster"
            )
        address = ray.get(ready[0], timeout=PLACED_S)
        sums = [one.sum.remote(number, len(holders), address, backend) for number, one in enumerate(holders)]
        ends = ray.get(sums, timeout=ping.BOUND_S + PLACED_S)
    except ray.exceptions.RayError as error:
        detail = f"{backend} among {among}: {_said(error)}"
        return Finding(check="nccl", status="failed", detail=detail, remedy=ping.REMEDY, where="cluster")
    finally:
        for holder in holders:
            ray.kill(holder)
    return ping.finding(ends, backend, among, "cluster")


class _Rank:
    """Holds a node's GPU while the ranks meet."""

    def address(self) -> str:
        return address_here()

    def sum(self, number: int, world: int, address: str, backend: ping.Backend) -> tuple[bool, str]:
        return rank(number, world, address, backend)


def _said(error: Exception) -> str:
    """Kind and last line, which has the reason."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__


def _on(node_id: str) -> Any:
    strategies = import_module("ray.util.scheduling_strategies")
    return strategies.NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)


def main() -> None:
    """Look, and tell in one line."""
    asked = Asked(**json.loads(sys.argv[1]))
    ray = import_module("ray")
    ray.init(address="auto", log_to_driver=False, configure_logging=False)
    found = look(asked)
    ray.shutdown()
    print(TOLD + json.dumps({"head": socket.gethostname(), "findings": [asdict(one) for one in found]}), flush=True)


if __name__ == "__main__":
    main()
