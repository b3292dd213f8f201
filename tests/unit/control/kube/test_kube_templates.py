"""What a template may hold, and how many nodes a job takes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from kube_world import SPEC, documented

from sapo_ray.config.spec import JobSpec
from sapo_ray.control.kube import ClusterTemplate
from sapo_ray.control.kube.sizes import sizes_of
from sapo_ray.control.launcher import LaunchRefused
from sapo_ray.errors import ConfigError

Body = dict[str, Any]


def changed(change: Callable[[Body], object]) -> Body:
    """The documented template, with groups that share nothing, and one change."""
    body = copy.deepcopy(documented("apiVersion"))
    body["spec"]["workerGroupSpecs"] = [copy.deepcopy(group) for group in body["spec"]["workerGroupSpecs"]]
    change(body["spec"])
    return body


def rollout(spec: Body) -> Body:
    return spec["workerGroupSpecs"][0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("headGroupSpec"), "spec.headGroupSpec is missing"),
        (lambda s: s.update(enableInTreeAutoscaling=True), "spec.enableInTreeAutoscaling must be false"),
        (lambda s: s.update(authOptions={"mode": "disabled"}), "spec.authOptions must be left out"),
        (lambda s: s.update(authOptions={"secretName": "x"}), "spec.authOptions must be left out"),
        (lambda s: s.update(rayVersion="2.51.0"), "spec.rayVersion must be 2.52 or later, .* got '2.51.0'"),
        (lambda s: s.pop("rayVersion"), "spec.rayVersion must be 2.52 or later, .* got None"),
        (lambda s: s.pop("workerGroupSpecs"), "groupName learner, it has 0"),
        (lambda s: s["workerGroupSpecs"].append(rollout(s)), "groupName rollout, it has 2"),
        (lambda s: rollout(s).pop("maxReplicas"), r"\[rollout\].maxReplicas must say how many nodes .* got None"),
        (lambda s: rollout(s).update(numOfHosts=2), r"\[rollout\].numOfHosts must be 1"),
        (lambda s: rollout(s).update(idleTimeoutSeconds=60), "idleTimeoutSeconds is for Ray's autoscaler"),
        (lambda s: rollout(s).update(rayStartParams={"labels": "a=b"}), r"rayStartParams.labels must be .*\.labels"),
        (
            lambda s: rollout(s).update(rayStartParams={"num-gpus": "1"}, resources={"GPU": "1"}),
            "has resources in both `resources` and `rayStartParams`",
        ),
        (lambda s: rollout(s)["template"]["spec"].update(containers=[]), "containers needs the Ray container"),
    ],
)
def test_a_template_that_could_not_work_is_refused_with_its_key(change: Callable[[Body], object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ClusterTemplate(changed(change))


def test_a_template_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it must be a RayCluster of ray.io/v1"):
        ClusterTemplate({"apiVersion": "v1", "kind": "ConfigMap"})


def gpu_template(gpus: int, most: int = 8) -> ClusterTemplate:
    def change(spec: Body) -> None:
        for group in spec["workerGroupSpecs"]:
            if group["groupName"] != "verifier":
                container = group["template"]["spec"]["containers"][0]
                container["resources"]["limits"]["nvidia.com/gpu"] = gpus
                group["maxReplicas"] = most

    return ClusterTemplate(changed(change))


def job(**over: Any) -> JobSpec:
    spec = copy.deepcopy(SPEC)
    for key, value in over.items():
        section, _, name = key.partition("__")
        spec[section][name] = value
    return JobSpec.model_validate(spec)


def test_gpu_nodes_hold_as_many_workers_as_their_gpus_have_shards() -> None:
    spec = job(rollout__tensor_parallel=2, learner__ranks=16, verifier__workers=3, verifier__processes=2)
    sizes = sizes_of(spec, 9, 2, gpu_template(8))
    # 4 workers a node; 16 ranks on two nodes; two verifiers of 2 processes on a node of 4 CPUs.
    assert sizes.nodes == {"rollout": 3, "learner": 2, "verifier": 2}
    assert sizes.least == {"rollout": 1, "learner": 2, "verifier": 2}
    assert (sizes.workers_per_node, sizes.gpus) == (4, True)


def test_more_workers_than_a_job_may_have_nodes_for_begin_with_those() -> None:
    assert sizes_of(job(learner__ranks=1), 40, 1, gpu_template(1, most=6)).nodes["rollout"] == 6


@pytest.mark.parametrize(
    ("spec", "least", "told"),
    [
        ({"rollout__tensor_parallel": 8}, 1, "rollout.tensor_parallel asks for 8 GPUs, and a rollout node has 4"),
        ({"verifier__processes": 5}, 1, "verifier.processes asks for 5 CPUs, and a verifier node has 4"),
        ({"learner__ranks": 9}, 1, "the job needs 3 learner nodes, and may have 2 at most"),
        ({}, 12, "the job needs 3 rollout nodes, and may have 2 at most"),
        ({"learner__transport": "ipc"}, 1, "learner.transport ipc needs workers and ranks on the same GPUs"),
    ],
)
def test_a_job_that_no_such_cluster_could_hold_is_refused_with_the_reason(spec: Body, least: int, told: str) -> None:
    with pytest.raises(LaunchRefused) as caught:
        sizes_of(job(**spec), 12, least, gpu_template(4, most=2))
    assert caught.value.told.startswith(f"the cluster cannot hold this job: {told}")


@pytest.mark.parametrize(("cpu", "logical"), [("4", 4), (4, 4), ("3500m", 4), ("0.5", 1), ("1000m", 1)])
def test_cpus_are_counted_as_ray_will_count_them(cpu: object, logical: int) -> None:
    body = changed(lambda s: rollout(s)["template"]["spec"]["containers"][0]["resources"].update(limits={"cpu": cpu}))
    assert ClusterTemplate(body).cpus("rollout") == logical


def test_what_rays_start_is_told_goes_before_the_containers_limits() -> None:
    body = changed(lambda s: rollout(s).update(rayStartParams={"num-cpus": "7", "num-gpus": "2"}))
    assert (ClusterTemplate(body).cpus("rollout"), ClusterTemplate(body).gpus("rollout")) == (7, 2)
    body = changed(lambda s: rollout(s).update(resources={"CPU": "5", "GPU": "3"}))
    assert (ClusterTemplate(body).cpus("rollout"), ClusterTemplate(body).gpus("rollout")) == (5, 3)
