"""`sapo-ray apply-cluster` beside others who write into the same RayCluster, Kueue above all: a merge of three."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server_stand_in import Kubernetes
from api_server_tools import Failure
from applied_cluster import CLUSTER, bring, in_the_services_pod, scale, sizes
from chart_rendering import FEATURES, Object, overlaid, ray_cluster, render

from sapo_ray.control.kube.client import Rejected
from sapo_ray.control.shared_cluster import WRITTEN

KUEUE = FEATURES["kueue"]


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    with in_the_services_pod(tmp_path, monkeypatch) as kube:
        yield kube


def templates(cluster: Object) -> list[Object]:
    spec = cluster["spec"]
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def admit(cluster: Object) -> None:
    """As Kueue does when it lets a cluster run: suspension off, the flavor's place in every pod template."""
    cluster["spec"]["suspend"] = False
    for pod in templates(cluster):
        pod["metadata"].setdefault("annotations", {})["kueue.x-k8s.io/workload"] = "raycluster-demo"
        pod["metadata"]["labels"]["kueue.x-k8s.io/podset"] = "main"
        pod["spec"].setdefault("nodeSelector", {})["flavor"] = "h200"
        pod["spec"].setdefault("tolerations", []).append({"key": "h200", "operator": "Exists"})
        pod["spec"]["schedulingGates"] = [{"name": "kueue.x-k8s.io/elastic-job"}]


def test_what_kueue_adds_to_pods_stays_when_the_manifest_changes(kube: Kubernetes) -> None:
    bring(KUEUE)
    kube.change("RayCluster", CLUSTER, admit)
    place = {"nodeSelector": {"pool": "a"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
    bring(overlaid(KUEUE, {"ray": {"groupDefaults": place, "extraEnv": [{"name": "A", "value": "1"}]}}))
    cluster = kube.get("RayCluster", CLUSTER)
    rollout = {one["groupName"]: one["template"] for one in cluster["spec"]["workerGroupSpecs"]}["rollout"]
    assert rollout["spec"]["nodeSelector"] == {"flavor": "h200", "pool": "a"}
    assert [one["key"] for one in rollout["spec"]["tolerations"]] == ["gpu", "h200"]
    assert cluster["spec"]["suspend"] is False
    bring(KUEUE)  # and what the manifest had goes from beside it
    for pod in templates(kube.get("RayCluster", CLUSTER)):
        assert pod["spec"]["nodeSelector"] == {"flavor": "h200"}
        assert pod["spec"]["tolerations"] == [{"key": "h200", "operator": "Exists"}]
        assert pod["spec"]["schedulingGates"] == [{"name": "kueue.x-k8s.io/elastic-job"}]
        assert pod["metadata"]["labels"]["kueue.x-k8s.io/podset"] == "main"
        assert pod["metadata"]["annotations"] == {"kueue.x-k8s.io/workload": "raycluster-demo"}
        assert "A" not in {one["name"] for one in pod["spec"]["containers"][0]["env"]}


@pytest.mark.parametrize("known", [True, False], ids=["manifest known", "made by an earlier release"])
def test_a_cluster_that_is_taken_from_its_queue_is_as_if_it_had_never_been_in_one(
    kube: Kubernetes, known: bool
) -> None:
    bring(KUEUE)

    def waits(cluster: Object) -> None:
        admit(cluster)
        cluster["spec"]["suspend"] = True
        cluster["metadata"]["labels"] |= {"kueue.x-k8s.io/multikueue-origin": "x", "somebody/else": "x"}
        if not known:
            cluster["metadata"]["annotations"][WRITTEN] = "0" * 32

    kube.change("RayCluster", CLUSTER, waits)
    assert bring() == "changed"
    cluster = kube.get("RayCluster", CLUSTER)
    assert "kueue" not in json.dumps(cluster)
    assert "suspend" not in cluster["spec"]
    assert templates(cluster) == templates(ray_cluster(render()))
    assert cluster["metadata"]["labels"]["somebody/else"] == "x"
    assert bring() == "unchanged"


def test_a_cluster_of_an_earlier_release_keeps_its_sizes_and_suspension_and_loses_what_the_manifest_has_not(
    kube: Kubernetes,
) -> None:
    bring(overlaid(KUEUE, {"ray": {"extraEnv": [{"name": "A", "value": "1"}]}}))
    scale(kube, "rollout", 3, ["pod-a"])

    def older(cluster: Object) -> None:
        cluster["metadata"]["annotations"][WRITTEN] = "0" * 32
        cluster["spec"]["suspend"] = True

    kube.change("RayCluster", CLUSTER, older)
    assert bring(KUEUE) == "changed"
    cluster = kube.get("RayCluster", CLUSTER)
    assert (sizes(kube)["rollout"], cluster["spec"]["suspend"]) == (3, True)
    assert templates(cluster) == templates(ray_cluster(render(KUEUE)))
    assert bring(KUEUE) == "unchanged"


def test_labels_that_the_manifest_had_go_and_those_of_others_stay(kube: Kubernetes) -> None:
    bring(overlaid(KUEUE, {"kueue": {"priorityClass": "research"}}))
    kube.change("RayCluster", CLUSTER, lambda cluster: cluster["metadata"]["labels"].update({"somebody/else": "x"}))
    bring(overlaid(KUEUE, {"kueue": {"priorityClass": ""}}))
    labels = kube.get("RayCluster", CLUSTER)["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "gpus"
    assert "kueue.x-k8s.io/priority-class" not in labels
    assert labels["somebody/else"] == "x"


def test_where_kueue_does_not_let_a_cluster_go_the_remedy_is_told(kube: Kubernetes) -> None:
    bring(KUEUE)

    def webhook(verb: str, name: str) -> None:
        raise Failure(
            403,
            "Forbidden",
            'admission webhook "vraycluster.kb.io" denied the request: metadata.annotations: immutable',
        )

    kube.before_write = webhook
    with pytest.raises(Rejected, match=f"immutable; Kueue.*kubectl -n rl delete raycluster {CLUSTER}"):
        bring()
    with pytest.raises(Rejected, match=r"immutable$"):  # another policy's, about something else
        bring(overlaid(KUEUE, {"ray": {"groups": {"rollout": {"max": 7}}}}))
