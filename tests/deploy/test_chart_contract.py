"""What the chart's objects must be like beyond their schemas: KubeRay's rules, the service's settings, security."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from chart_rendering import (
    CASES,
    CHART,
    FEATURES,
    PER_JOB,
    WITH_RAY,
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
from prometheus_client import start_http_server

from sapo_ray.control.serve import _listen
from sapo_ray.control.settings import Settings, load_settings
from sapo_ray.doctor import cluster as doctor_cluster


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


def test_the_service_of_a_cluster_of_ipv6_alone_can_be_reached_there(monkeypatch: pytest.MonkeyPatch) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 on this machine")
    settings = settings_of({"control": {"bindAddress": "::"}}, monkeypatch)
    assert (settings.host, settings.metrics_host) == ("::", "::")
    with _listen(settings.model_copy(update={"port": 0})) as listening:
        port = listening.getsockname()[1]
        for address in ("::1", "127.0.0.1"):
            socket.create_connection((address, port), timeout=10).close()
    server, thread = start_http_server(0, settings.metrics_host)
    socket.create_connection(("::1", server.server_port), timeout=10).close()
    server.shutdown()
    server.server_close()
    thread.join(10)


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


@pytest.mark.parametrize("name", ["cluster-64gpu", "cluster-per-job"])
def test_a_pod_that_is_not_ready_holds_up_no_drain(name: str) -> None:
    budgets = [thing["spec"] for thing in render(CASES[name]) if thing["kind"] == "PodDisruptionBudget"]
    assert len(budgets) >= 2
    assert {spec.get("unhealthyPodEvictionPolicy") for spec in budgets} == {"AlwaysAllow"}


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
