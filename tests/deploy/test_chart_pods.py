"""What the chart's pods are like: rights, files, environment, shared memory and storage."""

from __future__ import annotations

import getpass
import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
from chart_rendering import (
    CASES,
    EXAMPLES,
    FEATURES,
    PER_JOB,
    WITH_RAY,
    Object,
    environment,
    example,
    one,
    overlaid,
    pod_templates,
    ray_cluster,
    render,
)

from sapo_ray.config.sections import VerifierSpec
from sapo_ray.control.embedded import STOP_WAIT_S
from sapo_ray.doctor.machine import check_shm


@pytest.mark.parametrize("name", WITH_RAY)
def test_ray_keeps_its_objects_in_shared_memory_and_the_doctor_finds_nothing_to_say(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ray's own choice of a place, which is a folder on disk where the object store does not fit into /dev/shm."""
    from ray._private import services

    spec = ray_cluster(render(CASES[name]))["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (shm,) = [one["emptyDir"]["sizeLimit"] for one in pod["volumes"] if one["name"] == "shm"]
        size = int(shm.removesuffix("Gi")) << 30
        memory = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
        store = int(group["rayStartParams"]["object-store-memory"])
        monkeypatch.setattr("ray._private.utils.get_shared_memory_bytes", lambda size=size: size)
        monkeypatch.setattr("ray._common.utils.get_system_memory", lambda memory=memory: memory)
        place, _, given = services.determine_plasma_store_config(store, "/tmp/ray", None, None)
        assert (place, given) == ("/dev/shm", store)
        monkeypatch.setattr(os, "statvfs", lambda _, size=size: SimpleNamespace(f_frsize=1, f_blocks=size, f_bavail=0))
        assert check_shm("node", store=store).status == "ok"
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("shm", "store"),
    [
        ("5Gi", 4294967296),
        ("1.5G", 1200000000),
        ("2048Mi", 1717986918),
        (4294967296, 3435973836),
        ("3000000k", 2400000000),
    ],
)
def test_the_object_store_is_eight_tenths_of_any_amount_of_shared_memory(shm: str | int, store: int) -> None:
    spec = ray_cluster(render({"ray": {"head": {"shm": shm}}}))["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["object-store-memory"] == str(store)


@pytest.mark.parametrize("name", CASES)
def test_no_container_is_root_writes_its_image_or_holds_a_kubernetes_token_it_does_not_need(name: str) -> None:
    for pod, template in pod_templates(render(CASES[name])):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False, "SAPO_PORT of a Service called sapo would be a setting"
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 1
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*spec.get("initContainers", []), *spec["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            }, (pod, container["name"])
            assert "memory" in container["resources"]["limits"]
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            asks = container["name"] == ("control" if name in PER_JOB else "apply-cluster")
            assert ("kube-account" in mounts) == asks


def test_every_container_of_the_service_and_of_its_test_has_the_resources_of_the_values() -> None:
    """A quota on limits.cpu admits no container without one."""
    resources = {"requests": {"cpu": "100m", "memory": "300Mi"}, "limits": {"cpu": "1", "memory": "600Mi"}}
    objects = [one for one in render({"control": {"resources": resources}}) if one["kind"] in ("Deployment", "Pod")]
    assert len(objects) == 2
    for thing in objects:
        spec = thing["spec"]["template"]["spec"] if thing["kind"] == "Deployment" else thing["spec"]
        for container in (*spec["initContainers"], *spec["containers"]):
            assert container["resources"] == resources, (thing["metadata"]["name"], container["name"])


def test_the_autoscaler_alone_has_the_heads_account_and_jobs_code_beside_it_has_not() -> None:
    spec = ray_cluster(render())["spec"]
    sidecar = spec["autoscalerOptions"]
    assert sidecar["securityContext"]["readOnlyRootFilesystem"] is True
    account = {"name": "kube-account", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True}
    assert account in sidecar["volumeMounts"]
    pod = spec["headGroupSpec"]["template"]["spec"]
    assert [volume["name"] for volume in pod["volumes"] if "projected" in volume] == ["kube-account"]
    assert "kube-account" not in {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}


@pytest.mark.parametrize("name", sorted({*WITH_RAY} - {*PER_JOB}))
def test_the_service_its_test_and_all_ray_pods_see_one_storage_at_one_path(name: str) -> None:
    objects = render(CASES[name])
    seen = set()
    for _, template in pod_templates(objects):
        (volume,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "data"]
        mounts = template["spec"]["containers"][0]["volumeMounts"]
        paths = [mount["mountPath"] for mount in mounts if mount["name"] == "data"]
        seen.add((json.dumps(volume, sort_keys=True), *paths))
    assert len(seen) == 1, seen


def test_drivers_learn_of_node_roles_on_the_head() -> None:
    spec = ray_cluster(render(example("laptop")))["spec"]
    head = environment(spec["headGroupSpec"]["template"]["spec"]["containers"][0])
    assert (head["SAPO_ROLE_LABEL"], head["SAPO_ACCELERATOR"]) == ("sapo-ray.io/role", "cpu")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert head["RAY_JOB_STOP_WAIT_TIME_S"] == str(STOP_WAIT_S)
    roles = {group["groupName"]: group["labels"]["sapo-ray.io/role"] for group in spec["workerGroupSpecs"]}
    assert roles == {"rollout": "rollout", "learner": "learner", "verifier": "verifier"}


def test_further_files_and_variables_reach_whoever_asks_the_database_and_every_ray_pod() -> None:
    """A database that wants its authority checked is asked by the migration before the service, and by nobody else."""
    for name, template in pod_templates(render(FEATURES["extras"])):
        spec = template["spec"]
        asked = {"demo-sapo-ray-control": ["migrate", "control"], "demo-sapo-ray-test": ["doctor"]}.get(name)
        volume = "hub" if asked is None else "authorities"
        assert volume in {one["name"] for one in spec["volumes"]}, name
        for container in (*spec.get("initContainers", []), *spec["containers"]):
            mounted = volume in {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted == (asked is None or container["name"] in asked), (name, container["name"])
            assert ("HTTPS_PROXY" in environment(container)) == (mounted and asked is not None)


def test_a_cluster_without_tokens_overrules_its_images_which_want_one() -> None:
    def modes(values: Object) -> list[Any]:
        spec = ray_cluster(render(values))["spec"]
        pods = [one["template"]["spec"]["containers"][0] for one in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
        return [environment(one).get("RAY_AUTH_MODE") for one in (*pods, spec["autoscalerOptions"])]

    assert modes(FEATURES["no_token"]) == ["disabled"] * 5
    assert modes({}) == [None] * 5


def test_a_pod_without_gpus_sees_none_whatever_the_nodes_runtime_is() -> None:
    spec = ray_cluster(render(example("node-8gpu")))["spec"]
    seen = {
        one.get("groupName", "head"): environment(one["template"]["spec"]["containers"][0]).get(
            "NVIDIA_VISIBLE_DEVICES"
        )
        for one in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    }
    assert seen == {"head": "void", "verifier": "void", "rollout": None, "learner": None}


def test_a_user_that_the_image_does_not_know_has_a_name_and_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a line in /etc/passwd, as with podSecurity.runAsUser; torch and vLLM ask for both."""
    spec = ray_cluster(render({"podSecurity": {"runAsUser": 4711}}))["spec"]

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KeyError):
        getpass.getuser()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for name, value in environment(group["template"]["spec"]["containers"][0]).items():
            if name in ("USER", "HOME"):
                monkeypatch.setenv(name, value)
        assert (getpass.getuser(), os.path.expanduser("~")) == ("sapo", "/tmp")


def test_a_verifier_of_the_default_job_fits_a_node_of_every_example() -> None:
    """It asks for as many CPUs as it has grading processes."""
    asked = VerifierSpec().processes
    for name in EXAMPLES:
        groups = {one["groupName"]: one for one in ray_cluster(render(example(name)))["spec"]["workerGroupSpecs"]}
        limits = groups["verifier"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["cpu"]) >= asked, name


def test_several_replicas_of_the_service_are_spread_over_nodes_unless_the_values_say_otherwise() -> None:
    def spread(values: Object) -> Any:
        return one(render(values), "Deployment")["spec"]["template"]["spec"].get("topologySpreadConstraints")

    (constraint,) = spread(FEATURES["postgresql"])
    assert (constraint["topologyKey"], constraint["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    labels = one(render(FEATURES["postgresql"]), "Deployment")["spec"]["selector"]["matchLabels"]
    assert constraint["labelSelector"]["matchLabels"] == labels
    assert spread({}) is None
    mine = [{"maxSkew": 2, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}]
    assert spread(overlaid(FEATURES["postgresql"], {"control": {"topologySpreadConstraints": mine}})) == mine
