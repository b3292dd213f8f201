"""How many nodes of each kind a job needs. The numbers are what its actors ask Ray for; see the roles' own packages."""

from __future__ import annotations

from dataclasses import dataclass

from sapo_ray.config.spec import JobSpec
from sapo_ray.control.kube.template import GROUPS, ClusterTemplate
from sapo_ray.control.launcher import LaunchRefused


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Nodes of a job's cluster."""

    nodes: dict[str, int]
    """By group."""
    least: dict[str, int]
    """Those with which the driver can begin."""
    workers_per_node: int
    """Rollout workers that a rollout node has room for."""
    gpus: bool


def sizes_of(spec: JobSpec, workers: int, least_workers: int, template: ClusterTemplate) -> Sizes:
    """What a job needs of the clusters that a template makes.

    Raises:
        LaunchRefused: a worker, rank or verifier fits no node, or more nodes are needed than a job may have.
    """
    gpus = template.gpus("rollout") > 0
    if spec.transport == "ipc":
        _refuse("learner.transport ipc needs workers and ranks on the same GPUs; here each role has nodes of its own")
    room = {name: template.gpus(name) if gpus and name != "verifier" else template.cpus(name) for name in GROUPS}
    # One GPU worker takes as many GPUs as it has shards; on CPUs everything takes one logical CPU.
    asks = {"rollout": spec.rollout.tensor_parallel if gpus else 1, "learner": 1, "verifier": spec.verifier.processes}
    of_one = {
        "rollout": "rollout.tensor_parallel" if gpus else "a rollout worker",
        "learner": "a learner rank",
        "verifier": "verifier.processes",
    }
    for name in GROUPS:
        if asks[name] > room[name]:
            unit = "CPUs" if name == "verifier" or not gpus else "GPUs"
            _refuse(f"{of_one[name]} asks for {asks[name]} {unit}, and a {name} node has {room[name]}")
    wanted = {"rollout": workers, "learner": spec.learner.ranks, "verifier": spec.verifier.workers}
    nodes = {name: -(-wanted[name] // (room[name] // asks[name])) for name in GROUPS}
    per_node = room["rollout"] // asks["rollout"]
    least = nodes | {"rollout": -(-min(least_workers, workers) // per_node)}
    for name in GROUPS:
        if least[name] > template.most(name):
            _refuse(f"the job needs {least[name]} {name} nodes, and may have {template.most(name)} at most")
    nodes["rollout"] = min(nodes["rollout"], template.most("rollout"))
    return Sizes(nodes=nodes, least=least, workers_per_node=per_node, gpus=gpus)


def _refuse(why: str) -> None:
    raise LaunchRefused(why, told=f"the cluster cannot hold this job: {why}")
