"""`sapo-ray apply-cluster`: the service makes and changes the RayCluster, under the rights that the chart grants it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server_stand_in import Kubernetes
from applied_cluster import CLUSTER, OWNER, bring, client, in_the_services_pod, scale, sizes
from chart_rendering import FEATURES, one, overlaid, ray_cluster, render
from click.testing import Result
from typer.testing import CliRunner

from sapo_ray.cli.main import app
from sapo_ray.control.kube.client import Rejected
from sapo_ray.control.launcher import LauncherUnavailable
from sapo_ray.control.shared_cluster import WRITTEN, apply, merged, stamped
from sapo_ray.errors import ResourceError


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    with in_the_services_pod(tmp_path, monkeypatch) as kube:
        yield kube


def words(text: str) -> str:
    return " ".join(text.split())


def command(name: str = OWNER) -> Result:
    return CliRunner().invoke(app, ["apply-cluster", name])


def test_the_command_makes_the_cluster_from_the_charts_manifest_and_the_cluster_goes_with_it(kube: Kubernetes) -> None:
    done = command()
    assert (done.exit_code, done.output) == (0, f"RayCluster {CLUSTER}: created\n")
    assert command().output == f"RayCluster {CLUSTER}: unchanged\n"
    assert {code for user, _, _, code in kube.log if user != "admin"} == {200, 201, 404}
    kube.do("admin", "delete", "configmaps", "rl", OWNER)
    assert ("rayclusters", "rl", CLUSTER) not in kube.objects


def test_the_manifest_is_the_one_that_the_api_server_has_not_one_that_a_node_mounted_before(kube: Kubernetes) -> None:
    """The chart's own command, with no file in its container but the account's."""
    command()
    newer = one(render({"ray": {"groups": {"rollout": {"max": 9}}}}), "ConfigMap", "-raycluster")
    kube.change("ConfigMap", OWNER, lambda config: config.update(data=newer["data"]))
    pod = one(render(), "Deployment")["spec"]["template"]["spec"]
    (container,) = [one for one in pod["initContainers"] if one["name"] == "apply-cluster"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {"tmp", "kube-account"}
    assert container["command"][0] == "sapo-ray"
    assert CliRunner().invoke(app, container["command"][1:]).output == f"RayCluster {CLUSTER}: changed\n"
    groups = {group["groupName"]: group for group in kube.get("RayCluster", CLUSTER)["spec"]["workerGroupSpecs"]}
    assert groups["rollout"]["maxReplicas"] == 9


def test_a_change_leaves_to_the_autoscaler_what_it_decided(kube: Kubernetes) -> None:
    assert bring() == "created"
    scale(kube, "rollout", 3, ["pod-a"])
    assert bring() == "unchanged"
    assert bring({"ray": {"groups": {"rollout": {"max": 9}, "verifier": {"cpu": "6"}}}}) == "changed"
    cluster = kube.get("RayCluster", CLUSTER)
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    assert (groups["rollout"]["replicas"], groups["rollout"]["maxReplicas"]) == (3, 9)
    assert groups["rollout"]["scaleStrategy"] == {"workersToDelete": ["pod-a"]}
    assert groups["verifier"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == "6"
    assert cluster["metadata"]["ownerReferences"][0]["name"] == OWNER


def test_sizes_are_brought_within_new_bounds(kube: Kubernetes) -> None:
    bring()
    scale(kube, "rollout", 4, [])
    bring({"ray": {"groups": {"rollout": {"max": 2}, "learner": {"min": 1}}}})
    assert sizes(kube) == {"rollout": 2, "learner": 1, "verifier": 1}


def test_a_cluster_of_fixed_size_has_the_size_that_the_values_say(kube: Kubernetes) -> None:
    bring(FEATURES["fixed_size"])
    assert sizes(kube) == {"rollout": 2, "learner": 1, "verifier": 1}
    bring(overlaid(FEATURES["fixed_size"], {"ray": {"groups": {"rollout": {"min": 4}}}}))
    assert sizes(kube)["rollout"] == 4


def test_whoever_was_quicker_is_read_again(kube: Kubernetes) -> None:
    bring()
    writes = []

    def somebody(verb: str, name: str) -> None:
        if verb == "update" and len(writes) < 3:
            writes.append(verb)
            scale(kube, "rollout", len(writes), [])

    kube.before_write = somebody
    assert bring({"ray": {"groups": {"rollout": {"max": 7}}}}) == "changed"
    assert [code for _, verb, _, code in kube.log if verb == "update"] == [409, 409, 409, 200]
    assert sizes(kube)["rollout"] == 3


def test_two_replicas_that_start_at_once_make_one_cluster(kube: Kubernetes) -> None:
    def quicker(verb: str, name: str) -> None:
        kube.before_write = lambda verb, name: None
        bring()

    kube.before_write = quicker
    assert bring() == "unchanged"
    assert [code for _, verb, _, code in kube.log if verb == "create" and code != 200] == [201, 409]


def test_somebody_who_writes_all_the_time_is_not_waited_for_for_ever(kube: Kubernetes) -> None:
    bring()
    kube.before_write = lambda verb, name: scale(kube, "rollout", 1, []) if verb == "update" else None
    with pytest.raises(ResourceError, match="at each of 8 tries"):
        bring({"ray": {"groups": {"rollout": {"max": 7}}}})


def test_groups_that_are_gone_go_and_suspension_and_finalizers_stay() -> None:
    live = ray_cluster(render(FEATURES["more_groups"]))
    live["spec"]["suspend"] = True
    live["metadata"] |= {"finalizers": ["somebody/else"], "resourceVersion": "7", "uid": "u"}
    live = stamped(live)
    live["metadata"]["annotations"]["somebody/else"] = "x"
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": OWNER, "uid": "o"}
    body = merged(ray_cluster(render()), live, [owner])
    assert [group["groupName"] for group in body["spec"]["workerGroupSpecs"]] == ["learner", "rollout", "verifier"]
    assert body["spec"]["suspend"] is True
    assert body["metadata"]["finalizers"] == ["somebody/else"]
    assert body["metadata"]["annotations"].keys() == {"somebody/else", WRITTEN}
    assert body["metadata"]["resourceVersion"] == "7"
    assert body["metadata"]["ownerReferences"] == [owner]


def test_without_fault_tolerance_the_finalizer_that_kuberay_would_not_remove_goes(kube: Kubernetes) -> None:
    """KubeRay looks at it only in clusters with gcsFaultToleranceOptions: any other could never be deleted."""
    redis = "ray.io/gcs-ft-redis-cleanup-finalizer"
    bring(FEATURES["redis"])
    kube.change("RayCluster", CLUSTER, lambda cluster: cluster["metadata"].update(finalizers=[redis, "somebody/else"]))
    bring(overlaid(FEATURES["redis"], {"ray": {"groups": {"rollout": {"max": 7}}}}))
    assert kube.get("RayCluster", CLUSTER)["metadata"]["finalizers"] == [redis, "somebody/else"]
    bring()
    assert kube.get("RayCluster", CLUSTER)["metadata"]["finalizers"] == ["somebody/else"]


def test_a_cluster_that_an_uninstalled_release_left_does_not_go_with_it(kube: Kubernetes) -> None:
    bring()
    left = kube.get("RayCluster", CLUSTER)
    kube.do("admin", "delete", "configmaps", "rl", OWNER)
    kube.install([one for one in render() if one["kind"] == "ConfigMap"])  # installed anew, of the same values
    kube.do("admin", "create", "rayclusters", "rl", "", body=left)  # the collector has not come to it yet
    assert bring() == "changed"
    (owner,) = kube.get("RayCluster", CLUSTER)["metadata"]["ownerReferences"]
    assert owner["uid"] == kube.get("ConfigMap", OWNER)["metadata"]["uid"]
    assert bring() == "unchanged"


def test_a_cluster_that_is_being_deleted_is_not_taken_for_one_that_is_there(kube: Kubernetes) -> None:
    bring()
    going = {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["ray.io/gcs-ft-redis-cleanup-finalizer"]}
    kube.change("RayCluster", CLUSTER, lambda cluster: cluster["metadata"].update(going))
    with pytest.raises(ResourceError, match=f"{CLUSTER} is being deleted, .*try again"):
        bring()
    kube.do("admin", "delete", "rayclusters", "rl", CLUSTER)
    assert bring() == "created"


def test_the_service_may_touch_no_other_cluster(kube: Kubernetes) -> None:
    other = ray_cluster(render(name="other"))
    kube.do("admin", "create", "rayclusters", "rl", "", body=other)
    with client() as api, pytest.raises(LauncherUnavailable, match=r"403.*cannot get resource"):
        apply(api, other, OWNER)


def test_without_the_operators_definitions_it_says_so(kube: Kubernetes) -> None:
    kube.unknown.add("rayclusters")
    with pytest.raises(LauncherUnavailable, match="is the KubeRay operator installed"):
        bring()


def test_an_api_server_that_is_away_is_named_with_what_may_stop_it(kube: Kubernetes) -> None:
    kube.close()
    with pytest.raises(LauncherUnavailable, match=r"cannot be asked.*networkPolicy\.kubeApi"):
        bring()


def test_outside_a_pod_the_command_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    done = command()
    assert done.exit_code == 1
    assert "SAPO_KUBE_URL must name the Kubernetes API" in words(done.stderr)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"kind": "Pod"}', '{"kind": "RayCluster", "metadata": {"name": "a"}}', "[]"]
)
def test_a_manifest_that_is_none_is_refused(kube: Kubernetes, text: str) -> None:
    kube.change("ConfigMap", OWNER, lambda config: config.update(data={"raycluster.json": text}))
    done = command()
    assert done.exit_code == 1
    assert f"raycluster.json in ConfigMap {OWNER} is not the JSON manifest of a RayCluster" in words(done.stderr)


def test_a_manifest_that_is_not_there_is_named(kube: Kubernetes) -> None:
    kube.do("admin", "delete", "configmaps", "rl", OWNER)
    assert f"there is no ConfigMap {OWNER} in namespace rl" in words(command().stderr)


def test_a_manifest_that_the_api_server_refuses_is_told_with_its_reason(kube: Kubernetes) -> None:
    wrong: dict[str, Any] = json.loads(json.dumps(ray_cluster(render())))
    wrong["kind"] = "Pod"
    with client() as api, pytest.raises(Rejected, match="answered 400 BadRequest: Pod is not RayCluster"):
        apply(api, wrong, OWNER)
