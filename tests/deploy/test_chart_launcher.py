"""The launcher in the release that the chart makes: under the rights it grants, with what it sets and mounts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from api_server_stand_in import ADMIN, Kubernetes
from chart_rendering import JOB, Object, environment, request_of

from sapo_ray.control.kube import KubeClusters
from sapo_ray.control.launcher import LauncherUnavailable, NotStarted
from sapo_ray.control.launchers import launchers
from sapo_ray.control.settings import Settings, load_settings
from sapo_ray.doctor.own_clusters import check_kubernetes

OTHER = "job-" + "b" * 20


def settings_of(kube: Kubernetes, folder: Path) -> Settings:
    """What the service's pod would have, by the environment and the account that the chart gives it."""
    template = folder / "job-cluster.json"
    template.write_text(kube.get("ConfigMap", "demo-sapo-ray-job-cluster")["data"]["job-cluster.json"])
    deployment = kube.get("Deployment", "demo-sapo-ray-control")
    environ = environment(deployment["spec"]["template"]["spec"]["containers"][0])
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    return load_settings(
        **{"shared_cluster": False, "cluster_template": template, "ray_auth_token": "t" * 64, "kube_url": kube.url},
        **{"kube_account_dir": kube.account(folder / "account", account), "kube_owner": environ["SAPO_KUBE_OWNER"]},
        **{"cluster_network_policy": environ["SAPO_CLUSTER_NETWORK_POLICY"], "data_dir": folder / "data"},
    )


@contextmanager
def service(kube: Kubernetes, folder: Path) -> Iterator[KubeClusters]:
    with launchers(settings_of(kube, folder), None) as using:
        assert isinstance(using.launcher, KubeClusters)
        yield using.launcher


def test_under_the_rights_that_the_chart_grants_a_cluster_comes_is_sized_and_goes(
    kube: Kubernetes, tmp_path: Path
) -> None:
    with service(kube, tmp_path) as launcher:
        launcher.ping()
        with pytest.raises(NotStarted, match="head: 0 of 1 ready"):
            launcher.submit(request_of(JOB))
        cluster = kube.get("RayCluster", f"sapo-{JOB}-1")
        launcher.scale(f"sapo-{JOB}-1", 3, set())
        rollout = kube.get("RayCluster", f"sapo-{JOB}-1")["spec"]["workerGroupSpecs"][1]
        assert (rollout["groupName"], rollout["replicas"]) == ("rollout", 3)
        assert launcher.status(f"sapo-{JOB}-1").message == "its cluster's head is not ready"
        assert [one.job_id for one in launcher.clusters()] == [JOB]
        assert (tmp_path / "data" / "cache" / "research").is_dir()
        launcher.remove(f"sapo-{JOB}-1")
        assert launcher.clusters() == []
    assert cluster["metadata"]["ownerReferences"][0]["name"] == "demo-sapo-ray-control"
    mine = [(verb, what.partition("/")[0], code) for user, verb, what, code in kube.log if "control" in user]
    assert {code for *_, code in mine} <= {200, 201, 404}
    assert {(verb, what) for verb, what, _ in mine} >= {
        *((verb, "rayclusters") for verb in ("get", "list", "create", "patch", "delete")),
        *(("create", what) for what in ("secrets", "networkpolicies")),
        *(("list", what) for what in ("pods", "events")),
    }


def test_with_the_release_go_all_clusters_and_what_belongs_to_them(kube: Kubernetes, tmp_path: Path) -> None:
    with service(kube, tmp_path) as launcher:
        for job in (JOB, OTHER):
            with pytest.raises(NotStarted):
                launcher.submit(request_of(job))
        made = {kind for kind, _, name in kube.objects if name.startswith("sapo-job-")}
        assert made == {"rayclusters", "secrets", "networkpolicies"}
        kube.do(ADMIN, "delete", "deployments", "rl", "demo-sapo-ray-control")
        assert not [name for _, _, name in kube.objects if name.startswith("sapo-job-")]


def test_a_right_that_is_missing_is_named_by_verb_and_resource(kube: Kubernetes, tmp_path: Path) -> None:
    def without_secrets(role: Object) -> None:
        role["rules"] = [rule for rule in role["rules"] if rule["resources"] != ["secrets"]]

    kube.change("Role", "demo-sapo-ray-control", without_secrets)
    with (
        service(kube, tmp_path) as launcher,
        pytest.raises(LauncherUnavailable, match=r'cannot create resource "secrets" .*Role must grant this'),
    ):
        launcher.submit(request_of(JOB))


RIGHTS = {
    "rayclusters": ["get", "list", "create", "patch", "delete"],
    "pods": ["list"],
    "events": ["list"],
    "secrets": ["create"],
    "networkpolicies": ["create"],
    "deployments": ["get"],
}
SHOWN = {
    "rayclusters": "rayclusters.ray.io",
    "networkpolicies": "networkpolicies.networking.k8s.io",
    "deployments": "deployments.apps/demo-sapo-ray-control",
}


def test_the_doctor_is_content_with_the_rights_that_the_chart_grants_and_makes_nothing(
    kube: Kubernetes, tmp_path: Path
) -> None:
    settings, before = settings_of(kube, tmp_path), dict(kube.objects)
    found = check_kubernetes(settings)
    assert (found.status, found.remedy) == ("ok", "")
    assert kube.objects == before


@pytest.mark.parametrize(("kind", "verb"), [(kind, verb) for kind, verbs in RIGHTS.items() for verb in verbs])
def test_the_doctor_names_each_right_that_is_taken_from_the_charts_role(
    kube: Kubernetes, tmp_path: Path, kind: str, verb: str
) -> None:
    def without(role: Object) -> None:
        taken = [rule for rule in role["rules"] if kind in rule["resources"] and verb in rule["verbs"]]
        assert len(taken) == 1
        rest = [name for name in taken[0]["resources"] if name != kind]
        if rest:
            role["rules"].append(taken[0] | {"resources": rest})
        taken[0]["resources"] = [kind]
        taken[0]["verbs"] = [name for name in taken[0]["verbs"] if name != verb]

    kube.change("Role", "demo-sapo-ray-control", without)
    found = check_kubernetes(settings_of(kube, tmp_path))
    assert found.status == "failed"
    assert found.detail.endswith(f"namespace: {verb} {SHOWN.get(kind, kind)}")
    assert "docs/kubernetes.md" in found.remedy


def test_the_doctor_tells_missing_rights_from_a_missing_operator(kube: Kubernetes, tmp_path: Path) -> None:
    kube.unknown.add("rayclusters")
    found = check_kubernetes(settings_of(kube, tmp_path))
    assert found.status == "failed"
    assert "is the KubeRay operator installed" in found.detail
