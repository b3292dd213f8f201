"""A cluster for each job: what the chart gives the service for it, and what the service makes of that."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import kube_schemas
import pytest
import yaml
from chart_rendering import (
    FEATURES,
    JOB,
    ROOT,
    Object,
    environment,
    example,
    job_cluster,
    one,
    overlaid,
    ray_cluster,
    render,
    service_identity,
)
from network_rules import Place, passes

from sapo_ray.control.settings import Settings, load_settings

PER_JOB = FEATURES["per_job"]
OTHER = "job-" + "b" * 20


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return render(PER_JOB)


def container_of(objects: list[Object]) -> Object:
    (found,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_the_service_is_told_where_its_template_and_its_token_are(
    objects: list[Object], monkeypatch: pytest.MonkeyPatch
) -> None:
    container = container_of(objects)
    known = {f"SAPO_{name.upper()}" for name in Settings.model_fields}
    said = {name: value for name, value in environment(container).items() if name.startswith("SAPO_")}
    assert said.keys() <= known
    assert said.pop("SAPO_RAY_AUTH_TOKEN") == {"secretKeyRef": {"name": "ray-token", "key": "auth_token"}}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.shared_cluster, settings.cluster_network_policy) == (False, True)
    assert settings.kube_owner == one(objects, "Deployment")["metadata"]["name"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert settings.cluster_template == Path(mounts["job-cluster"]) / "job-cluster.json"
    assert settings.kube_account_dir == Path(mounts["kube-account"])
    assert "SAPO_RAY_JOBS_URL" not in environment(container)
    assert [one["name"] for one in one(objects, "Deployment")["spec"]["template"]["spec"]["initContainers"]] == [
        "migrate"
    ]


def test_a_jobs_cluster_is_the_shared_one_but_for_what_concerns_jobs(objects: list[Object]) -> None:
    """One helper renders both; whatever differs is listed here."""
    own, shared = job_cluster(objects)["spec"], ray_cluster(render())["spec"]
    assert own.pop("authOptions") == {"mode": "token", "secretName": f"sapo-{JOB}-1-auth"}
    assert own.pop("upgradeStrategy") == {"type": "None"}
    assert own.pop("enableInTreeAutoscaling") is False
    for name in ("authOptions", "upgradeStrategy", "enableInTreeAutoscaling", "autoscalerOptions"):
        del shared[name]
    for cluster in (own, shared):
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            for key in ("replicas", "minReplicas", "idleTimeoutSeconds"):
                group.pop(key, None)
            del group["template"]["metadata"]["labels"]
            pod = group["template"]["spec"]
            del pod["containers"][0]["env"]
            pod["volumes"] = [one for one in pod["volumes"] if one["name"] != "kube-account"]
            mounts = pod["containers"][0]["volumeMounts"]
            pod["containers"][0]["volumeMounts"] = [one for one in mounts if one["name"] != "data"]
    assert own == shared


def test_a_jobs_pods_see_its_run_and_its_tenants_files_alone(objects: list[Object]) -> None:
    cluster = job_cluster(objects)["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        container = group["template"]["spec"]["containers"][0]
        seen = {
            mount["mountPath"]: (mount["subPath"], mount.get("readOnly", False))
            for mount in container["volumeMounts"]
            if mount["name"] == "data"
        }
        assert seen == {
            f"/data/runs/{JOB}": (f"runs/{JOB}", False),
            "/data/datasets/research": ("datasets/research", True),
            "/data/cache/research": ("cache/research", False),
            "/data/models": ("models", True),
        }
        said = [entry["name"] for entry in container["env"]]
        assert said.index("SAPO_TENANT") < said.index("HF_HOME"), "a value may name variables before it only"
        assert environment(container)["HF_HOME"] == "/data/cache/$(SAPO_TENANT)/huggingface"


def test_the_rights_are_the_documented_ones_in_this_mode_alone(objects: list[Object]) -> None:
    def rights(rules: list[Object]) -> set[tuple[str, str, str]]:
        return {
            (group, resource, verb)
            for rule in rules
            for group, resource, verb in itertools.product(rule["apiGroups"], rule["resources"], rule["verbs"])
        }

    page = (ROOT / "docs" / "kubernetes.md").read_text()
    documented = yaml.safe_load(page[page.index("rules:\n") :].split("```")[0])["rules"]
    role = one(objects, "Role")
    assert rights(role["rules"]) == rights(documented)
    (deployments,) = [rule for rule in role["rules"] if rule["resources"] == ["deployments"]]
    assert deployments["resourceNames"] == ["demo-sapo-ray-control"]
    assert one(objects, "RoleBinding")["subjects"] == [
        {"kind": "ServiceAccount", "name": "demo-sapo-ray-control", "namespace": "rl"}
    ]
    assert not rights(one(render(), "Role", "-control")["rules"]) & {("", "pods", "list"), ("", "secrets", "create")}


def places(values: Object) -> tuple[list[Object], dict[str, Place]]:
    """All policies, those that the service makes too, and the pods of the service and of two jobs."""
    objects = render(overlaid(PER_JOB, values))
    policies = [thing for thing in objects if thing["kind"] == "NetworkPolicy"]
    found = {
        "control": Place(name="control", labels=one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"])
    }
    for job, short in ((JOB, "a"), (OTHER, "b")):
        cluster = job_cluster(objects, job)
        cluster["metadata"] |= {"uid": "u", "namespace": "rl"}
        policy = service_identity(objects).policy_of(cluster)
        assert not kube_schemas.problems(policy)
        policy["metadata"]["namespace"] = "rl"
        policies.append(policy)
        made = {"ray.io/cluster": cluster["metadata"]["name"]}
        head = cluster["spec"]["headGroupSpec"]["template"]["metadata"]["labels"]
        found[f"{short}-head"] = Place(name=f"{short}-head", labels=head | made | {"ray.io/node-type": "head"})
        for group in cluster["spec"]["workerGroupSpecs"]:
            name = f"{short}-{group['groupName']}"
            labels = group["template"]["metadata"]["labels"] | group["labels"] | made
            found[name] = Place(name=name, labels=labels | {"ray.io/node-type": "worker"})
    return policies, found


def test_pods_of_a_job_reach_each_other_and_the_service_and_nobody_elses() -> None:
    policies, pods = places({"networkPolicy": {"kubeApi": {"cidrs": ["10.0.0.1/32"]}}})
    others = {
        "dns": Place(name="dns", labels={"k8s-app": "kube-dns"}, namespace="kube-system"),
        "api": Place(name="api", address="10.0.0.1"),
        "hub": Place(name="hub", address="1.2.3.4"),
        "neighbour": Place(name="neighbour", labels={"app": "notebook"}),
    }
    everybody = pods | others
    ports = (53, 443, 6379, 8265, 8800, 29500)
    seen = {
        (source, target, port)
        for source, target in itertools.permutations(everybody, 2)
        for port in ports
        if (source in pods or target in pods) and passes(policies, everybody[source], everybody[target], port)
    }
    jobs = [[name for name in pods if name.startswith(letter)] for letter in ("a-", "b-")]
    assert seen == {
        *((a, b, port) for job in jobs for a, b in itertools.permutations(job, 2) for port in ports),
        *((pod, "dns", 53) for pod in pods),
        ("control", "api", 443),
        *(("control", head, 8265) for head in ("a-head", "b-head")),
        *((head, "control", 8800) for head in ("a-head", "b-head")),
        ("neighbour", "control", 8800),
    }


def test_only_the_named_roles_of_every_job_reach_the_internet() -> None:
    quiet: dict[str, Any] = {"networkPolicy": {"internetFor": ["learner"], "kubeApi": {"cidrs": ["10.0.0.1/32"]}}}
    policies, pods = places(quiet)
    hub = Place(name="hub", address="1.2.3.4")
    assert {name for name, pod in pods.items() if passes(policies, pod, hub, 443)} == {"a-learner", "b-learner"}


def test_no_head_and_no_learner_of_any_job_is_evicted() -> None:
    budgets = {
        thing["metadata"]["name"]: thing["spec"] for thing in render(PER_JOB) if thing["kind"] == "PodDisruptionBudget"
    }
    assert {name: spec["minAvailable"] for name, spec in budgets.items()} == {
        "demo-sapo-ray-job-cluster-head": 1000000,
        "demo-sapo-ray-job-cluster-learner": 1000000,
    }
    labels = job_cluster(render(PER_JOB))["spec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    chosen = budgets["demo-sapo-ray-job-cluster-head"]["selector"]["matchLabels"]
    assert chosen.items() <= (labels | {"ray.io/node-type": "head"}).items()


def test_what_the_operator_reads_alone_is_not_in_the_template() -> None:
    values = overlaid(PER_JOB, {"kueue": {"queue": "gpus", "elastic": True}})
    template = json.loads(one(render(values), "ConfigMap", "-job-cluster")["data"]["job-cluster.json"])
    assert {"name", "namespace"} & template["metadata"].keys() == set()
    cluster = job_cluster(render(values))
    assert cluster["metadata"]["name"] == f"sapo-{JOB}-1"
    assert cluster["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert cluster["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"


def test_a_release_that_changes_its_mode_leaves_no_shared_cluster_behind() -> None:
    """That one goes with the ConfigMap of its manifest, which Helm deletes."""
    names = {thing["metadata"]["name"] for thing in render(PER_JOB) if thing["kind"] == "ConfigMap"}
    assert names == {"demo-sapo-ray-job-cluster"}
    assert one(render(), "ConfigMap", "-raycluster")["metadata"]["name"] not in names


def test_the_example_gives_a_job_what_its_comment_says() -> None:
    spec = job_cluster(render(example("cluster-per-job")))["spec"]
    most = {}
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        most[group["groupName"]] = group["maxReplicas"] * limits.get("nvidia.com/gpu", 0)
    assert most == {"rollout": 8, "learner": 8, "verifier": 0}
