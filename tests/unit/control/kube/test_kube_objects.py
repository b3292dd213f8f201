"""What is made for a job: its cluster, and what belongs to that."""

from __future__ import annotations

import base64
import re

import pytest
from fake_operator import SECRETS
from kube_world import JOB, KubeWorld, request
from test_kube_launch import NAME, start, waits

from sapo_ray.control.kube.client import NETWORKPOLICIES


def test_a_cluster_is_the_template_with_what_the_service_knows(kube: KubeWorld) -> None:
    waits(kube.launcher())
    body = kube.clusters()[NAME]
    labels = {"sapo-ray.io/job": JOB, "sapo-ray.io/attempt": "1", "sapo-ray.io/service": "sapo"}
    assert body["metadata"]["labels"] == labels | {"sapo-ray.io/tenant": "team-a"}
    assert body["metadata"]["ownerReferences"] == [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": "sapo",
            "uid": "uid-of-the-deployment",
            "blockOwnerDeletion": False,
        }
    ]
    assert body["spec"]["authOptions"] == {"mode": "token", "secretName": f"{NAME}-auth"}
    groups = {one["groupName"]: one for one in body["spec"]["workerGroupSpecs"]}
    # Nodes of 4 CPUs: 8 workers take two, 2 ranks one, and a verifier with 2 processes one.
    counts = {name: (one["minReplicas"], one["replicas"], one["maxReplicas"]) for name, one in groups.items()}
    assert counts == {"rollout": (0, 2, 8), "learner": (0, 1, 4), "verifier": (0, 1, 2)}
    assert groups["learner"]["labels"] == {"sapo-ray.io/role": "learner"}
    environment = [
        {"name": "SAPO_JOB_ID", "value": JOB},
        {"name": "SAPO_TENANT", "value": "team-a"},
        {"name": "SAPO_ROLE_LABEL", "value": "sapo-ray.io/role"},
        {"name": "SAPO_ACCELERATOR", "value": "cpu"},
    ]
    assert body["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"] == environment
    assert groups["rollout"]["template"]["metadata"]["labels"].items() >= labels.items()
    run, data = groups["rollout"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert (run["mountPath"], run["subPath"]) == (f"/data/runs/{JOB}", f"runs/{JOB}")
    assert (data["mountPath"], data["subPath"]) == ("/data/datasets/team-a", "datasets/team-a")


def test_each_cluster_has_a_token_that_tells_nothing_of_another(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    waits(launcher)
    waits(launcher, job="job-" + "b" * 20)
    tokens = [base64.b64decode(one["data"]["auth_token"]).decode() for one in kube.kube.of(SECRETS).values()]
    assert len(set(tokens)) == 2
    assert all(re.fullmatch(r"[0-9a-f]{64}", token) for token in tokens)
    (first, _) = kube.kube.of(SECRETS).values()
    assert first["metadata"]["ownerReferences"][0]["uid"] == kube.clusters()[NAME]["metadata"]["uid"]


def test_the_pods_of_a_cluster_reach_each_other_by_a_policy_that_was_there_before_them(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    waits(launcher)
    posts = [one.rpartition("/")[2] for one in kube.kube.requests if one.startswith("POST")]
    assert posts == ["rayclusters", "networkpolicies", "secrets"]
    policy = kube.kube.of(NETWORKPOLICIES)[NAME]
    pods = {"podSelector": {"matchLabels": {"ray.io/cluster": NAME}}}
    assert policy["spec"] == {
        **pods,
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [pods]}],
        "egress": [{"to": [pods]}],
    }
    launcher.remove(NAME)
    assert kube.kube.of(NETWORKPOLICIES) == {}


def test_where_nothing_is_denied_no_policy_is_made(kube: KubeWorld) -> None:
    start(kube, kube.launcher(network_policy=False))
    assert kube.kube.of(NETWORKPOLICIES) == {}


def test_the_tenants_folders_are_there_before_a_pod_could_mount_them(kube: KubeWorld) -> None:
    waits(kube.launcher())
    assert [(folder / "team-a").is_dir() for folder in kube.folders] == [True, True]
    blocked = kube.folders[0] / "team-b"
    blocked.write_text("not a folder")
    with pytest.raises(FileExistsError):
        kube.launcher().submit(request(tenant="team-b", job="job-" + "b" * 20))
    assert list(kube.clusters()) == [NAME]


def test_a_tenant_whose_name_is_no_label_has_none(kube: KubeWorld) -> None:
    waits(kube.launcher(), tenant="team.")
    assert "sapo-ray.io/tenant" not in kube.clusters()[NAME]["metadata"]["labels"]
