"""What the chart's objects must be like beyond their schemas: KubeRay's rules, the service's settings, security."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chart_rendering import (
    ALL_ON,
    ALL_ON_PER_JOB,
    CHART,
    EXAMPLES,
    FEATURES,
    Object,
    environment,
    example,
    helm,
    one,
    overlaid,
    pod_templates,
    ray_cluster,
    render,
)

from sapo_ray.config.sections import VerifierSpec
from sapo_ray.control.settings import Settings, load_settings
from sapo_ray.doctor import cluster as doctor_cluster
from sapo_ray.doctor.machine import check_shm

CASES: dict[str, Object] = {
    "defaults": {},
    **{name: example(name) for name in EXAMPLES},
    **FEATURES,
    "all on": overlaid(*(FEATURES[name] for name in ALL_ON)),
    "all on per job": overlaid(*(FEATURES[name] for name in ALL_ON_PER_JOB)),
}
WITH_RAY = [name for name in CASES if name != "external"]
PER_JOB = [name for name in CASES if CASES[name].get("ray", {}).get("mode") == "perJob"]


@pytest.mark.parametrize("name", WITH_RAY)
def test_kuberay_takes_the_cluster(name: str) -> None:
    """Its webhook's rules (validation.go), which no schema holds."""
    objects = render(CASES[name])
    cluster = ray_cluster(objects)
    spec, meta = cluster["spec"], cluster["metadata"]
    assert len(meta["name"]) <= 53
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", meta["name"])
    own = {"Role", "RoleBinding", "ServiceAccount", "Secret"}
    assert meta["name"] not in {thing["metadata"]["name"] for thing in objects if thing["kind"] in own}
    assert spec["authOptions"]["mode"] in ("token", "disabled")
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)
    scales = spec["enableInTreeAutoscaling"]
    assert not scales or spec["autoscalerOptions"]["version"] == "v2"
    assert scales or not any({"idleTimeoutSeconds", "priority"} & set(group) for group in spec["workerGroupSpecs"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert "resources" not in group
        assert "labels" not in group["rayStartParams"]
        assert "restartPolicy" not in group["template"]["spec"]
        names = {entry["name"] for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert not names & {"RAY_enable_autoscaler_v2", "RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_AUTH_TOKEN"}
    assert spec["upgradeStrategy"]["type"] in ("Recreate", "None")


def test_rays_autoscaler_reads_from_the_cluster_what_the_values_say() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as read

    types = read(ray_cluster(render(example("cluster-64gpu"))))["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    rollout, learner, verifier = types["rollout"], types["learner"], types["verifier"]
    assert (rollout["min_workers"], rollout["max_workers"], rollout["idle_timeout_s"]) == (0, 48, 600.0)
    assert rollout["resources"] == {"CPU": 12, "GPU": 1, "memory": 160 * 2**30}
    assert rollout["labels"] == {"sapo-ray.io/role": "rollout"}
    assert (learner["max_workers"], learner["resources"]["GPU"], learner["resources"]["CPU"]) == (2, 8, 96)
    assert (verifier["min_workers"], verifier["max_workers"]) == (2, 16)
    assert verifier["resources"] == {"CPU": 16, "memory": 32 * 2**30}


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


def test_the_autoscaler_alone_has_the_heads_account_and_jobs_code_beside_it_has_not() -> None:
    spec = ray_cluster(render())["spec"]
    sidecar = spec["autoscalerOptions"]
    assert sidecar["securityContext"]["readOnlyRootFilesystem"] is True
    account = {"name": "kube-account", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True}
    assert account in sidecar["volumeMounts"]
    pod = spec["headGroupSpec"]["template"]["spec"]
    assert [volume["name"] for volume in pod["volumes"] if "projected" in volume] == ["kube-account"]
    assert "kube-account" not in {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}


@pytest.mark.parametrize("name", CASES)
def test_no_secret_is_in_the_release(name: str) -> None:
    objects = render(CASES[name])
    assert "Secret" not in {thing["kind"] for thing in objects}
    for container in one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]:
        for key, value in environment(container).items():
            if key.endswith(("_TOKEN", "_ADMIN_KEY")) or (key == "SAPO_DATABASE_URL" and "sqlite" not in value):
                assert list(value) == ["secretKeyRef"], key


def settings_of(values: Object, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The service's settings, from the environment that the chart gives it."""
    (container,) = one(render(values), "Deployment")["spec"]["template"]["spec"]["containers"]
    known = {f"SAPO_{name.upper()}" for name in Settings.model_fields}
    for name, value in environment(container).items():
        assert not name.startswith("SAPO_") or name in known, name
        secret = "postgresql+psycopg://u:p@h/d" if name == "SAPO_DATABASE_URL" else "x" * 32
        monkeypatch.setenv(name, value if isinstance(value, str) else secret)
    return load_settings()


def test_the_service_reads_its_settings_from_what_the_chart_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "control": {
            "settings": {
                "max_upload_bytes": 21474836480,
                "rate_per_s": 0.5,
                "allow_models": ["builtin:*", "Qwen/*"],
                "allow_trust_remote_code": True,
                "log_level": "debug",
            },
            "tenantSecrets": {"research": "tokens"},
        }
    }
    settings = settings_of(overlaid(values, FEATURES["postgresql"]), monkeypatch)
    assert settings.max_upload_bytes == 21474836480
    assert settings.rate_per_s == 0.5
    assert settings.allow_models == ["builtin:*", "Qwen/*"]
    assert settings.allow_trust_remote_code is True
    assert settings.control_url == "http://demo-sapo-ray-control.rl.svc:8800"
    assert settings.ray_jobs_url == "http://demo-sapo-ray-cluster-head-svc.rl.svc:8265"
    assert settings.database_url.startswith("postgresql+psycopg://")
    assert settings.data_dir == Path("/data")
    assert settings.secrets_dir == Path("/etc/sapo-ray-secrets")
    assert (settings.host, settings.port, settings.metrics_host, settings.metrics_port) == (
        *("0.0.0.0", 8800),
        *("0.0.0.0", 8801),
    )


def test_the_file_of_sqlite_lies_on_a_volume_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = render()
    assert settings_of({}, monkeypatch).database_url == "sqlite:////var/lib/sapo-ray/control.db"
    deployment = one(objects, "Deployment")["spec"]
    assert deployment["strategy"] == {"type": "Recreate"}
    spec = deployment["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["database"]["persistentVolumeClaim"]["claimName"] == "demo-sapo-ray-database"
    for container in (spec["initContainers"][0], spec["containers"][0]):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["database"] == "/var/lib/sapo-ray"
    claim = one(objects, "PersistentVolumeClaim", "-database")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


@pytest.mark.parametrize("name", CASES)
def test_helms_test_looks_with_the_eyes_of_the_service(name: str) -> None:
    """The same image, user, nodes, environment and storage, so that what is found is so for the service."""
    objects = render(CASES[name])
    test, service = one(objects, "Pod")["spec"], one(objects, "Deployment")["spec"]["template"]["spec"]
    (doctor,), (control,) = test["containers"], service["containers"]
    asked = ["--only", "dns", "--only", "storage"] if name in PER_JOB else ["--cluster"]
    assert doctor["command"] == ["sapo-ray", "doctor", *asked]
    assert (doctor["image"], doctor["env"]) == (control["image"], control["env"])
    assert test["securityContext"] == service["securityContext"]
    for key in ("nodeSelector", "tolerations", "affinity", "priorityClassName"):
        assert test.get(key) == service.get(key)
    assert [container["name"] for container in test["initContainers"]] == ["ready"]
    assert test["activeDeadlineSeconds"] > 240 + doctor_cluster.BOUND_S


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


def test_what_concerns_the_service_alone_restarts_no_ray_pod(tmp_path: Path) -> None:
    before = ray_cluster(render())["spec"]
    for name in ("postgresql", "ingress", "monitoring", "internet", "no_budgets", "load_balancer"):
        assert ray_cluster(render(FEATURES[name]))["spec"] == before, name
    newer = tmp_path / "sapo-ray"
    shutil.copytree(CHART, newer)
    text = (newer / "Chart.yaml").read_text()
    (newer / "Chart.yaml").write_text(re.sub(r"(?m)^version: .*$", "version: 9.9.9", text))
    with helm.Chart.load(newer) as chart:
        texts = chart.render({}, name="demo", namespace="rl")
    manifest = json.loads(texts["sapo-ray/templates/raycluster.yaml"].split("raycluster.json: |", 1)[1])
    assert manifest["spec"] == before


def test_a_change_of_the_cluster_starts_the_service_anew_which_applies_it() -> None:
    def seen(values: Object) -> str:
        annotations = one(render(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["sapo-ray.io/raycluster"])

    assert seen({"ray": {"groups": {"rollout": {"max": 9}}}}) != seen({})


def test_rights_are_those_for_one_cluster() -> None:
    objects = render()
    control = one(objects, "Role", "-control")["rules"]
    head = one(objects, "Role", "-ray-head")["rules"]
    for rule in (*control, *head):
        assert "*" not in (*rule["verbs"], *rule["resources"], *rule["apiGroups"])
        if rule["resources"] == ["rayclusters"] and rule["verbs"] != ["create"]:
            assert rule["resourceNames"] == ["demo-sapo-ray-cluster"]
    assert {verb for rule in head for verb in rule["verbs"]} == {"get", "list", "watch", "patch"}
    for template in (pod for _, pod in pod_templates(objects)):
        account = template["spec"].get("serviceAccountName")
        assert account in {None, *(one["metadata"]["name"] for one in objects if one["kind"] == "ServiceAccount")}


def test_budgets_keep_one_replica_the_head_and_all_learners() -> None:
    budgets: dict[str, Any] = {
        thing["metadata"]["name"]: thing["spec"]
        for thing in render(CASES["cluster-64gpu"])
        if thing["kind"] == "PodDisruptionBudget"
    }
    least = {name.removeprefix("demo-sapo-ray-"): spec["minAvailable"] for name, spec in budgets.items()}
    assert least == {"control": 1, "cluster-head": 1, "cluster-learner": 2}
    assert budgets["demo-sapo-ray-cluster-learner"]["selector"]["matchLabels"] == {
        "ray.io/cluster": "demo-sapo-ray-cluster",
        "ray.io/group": "learner",
    }
