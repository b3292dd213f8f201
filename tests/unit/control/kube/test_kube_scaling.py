"""Rollout nodes follow a driver's workers; the operator never has to choose which one goes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from kube_world import KubeWorld
from test_kube_launch import NAME, start

from sapo_ray.control.kube import KubeClusters
from sapo_ray.control.kube.scaling import Change, plan
from sapo_ray.control.launcher import LauncherUnavailable


@pytest.fixture
def launcher(kube: KubeWorld) -> KubeClusters:
    """Of a driver that began with 8 workers, 4 on each of two nodes."""
    launcher = kube.launcher()
    start(kube, launcher)
    return launcher


def nodes(kube: KubeWorld) -> list[str]:
    return sorted(kube.operator.pods(NAME, "rollout"))


def test_more_workers_bring_nodes_up_to_the_most_that_a_job_may_have(kube: KubeWorld, launcher: KubeClusters) -> None:
    first = nodes(kube)
    launcher.scale(NAME, 17, None)
    assert kube.group(NAME, "rollout")["replicas"] == 5
    told = launcher.scale(NAME, 17, None)
    assert told == "rollout: 2 of 5 ready, no pod yet for the others"
    kube.operator.nodes = 6
    kube.operator.work()
    assert "2 Unschedulable: 0/3 nodes are available" in str(launcher.scale(NAME, 17, None))
    kube.operator.nodes = 100
    kube.operator.work()
    assert launcher.scale(NAME, 17, None) is None
    assert len(nodes(kube)) == 5
    assert set(first) < set(nodes(kube))
    launcher.scale(NAME, 1000, None)
    assert kube.group(NAME, "rollout")["replicas"] == 8
    assert [kube.group(NAME, name)["replicas"] for name in ("learner", "verifier")] == [1, 1]


def test_only_nodes_without_workers_are_given_back_and_each_is_named(kube: KubeWorld, launcher: KubeClusters) -> None:
    launcher.scale(NAME, 20, None)
    kube.operator.work()
    busy = set(nodes(kube)[2:4])
    kube.operator.busy = busy
    launcher.scale(NAME, 4, busy)
    group = kube.group(NAME, "rollout")
    assert group["replicas"] == 2  # the second busy one stays as long as it is busy
    assert sorted(group["scaleStrategy"]["workersToDelete"]) == sorted(set(nodes(kube)) - busy)
    kube.operator.work()
    assert set(nodes(kube)) == busy
    launcher.scale(NAME, 4, busy)
    kube.operator.work()
    assert set(nodes(kube)) == busy
    launcher.scale(NAME, 4, {min(busy)})
    kube.operator.work()
    assert nodes(kube) == [min(busy)]
    assert kube.operator.chosen_by_itself == []


def test_as_long_as_it_is_not_known_where_workers_are_no_node_goes(kube: KubeWorld, launcher: KubeClusters) -> None:
    launcher.scale(NAME, 1, None)
    kube.operator.work()
    assert len(nodes(kube)) == 2


def test_a_worker_may_name_its_host_by_address_too(kube: KubeWorld, launcher: KubeClusters) -> None:
    kept, gone = nodes(kube)
    launcher.scale(NAME, 1, {kube.operator.pods(NAME, "rollout")[kept]["status"]["podIP"]})
    assert kube.group(NAME, "rollout")["scaleStrategy"]["workersToDelete"] == [gone]


def test_a_change_by_somebody_else_meanwhile_is_not_undone(kube: KubeWorld, launcher: KubeClusters) -> None:
    def meanwhile(method: str, path: str) -> None:
        if method == "PATCH":
            with kube.kube.lock:
                kube.group(NAME, "verifier")["maxReplicas"] = 9
                kube.kube.put("ray.io/v1/rayclusters", kube.clusters()[NAME])
            kube.kube.fault = lambda method, path: None

    kube.kube.fault = meanwhile
    launcher.scale(NAME, 12, None)
    assert kube.group(NAME, "rollout")["replicas"] == 2
    launcher.scale(NAME, 12, None)
    assert kube.group(NAME, "rollout")["replicas"] == 3
    assert kube.group(NAME, "verifier")["maxReplicas"] == 9


def test_a_patch_whose_answer_is_lost_is_found_done(kube: KubeWorld, launcher: KubeClusters) -> None:
    kube.kube.fault = lambda method, path: "unanswered" if method == "PATCH" else None
    with pytest.raises(LauncherUnavailable):
        launcher.scale(NAME, 12, None)
    kube.kube.fault = lambda method, path: None
    kube.operator.work()
    assert launcher.scale(NAME, 12, None) is None
    assert len(nodes(kube)) == 3


def test_a_cluster_that_is_gone_needs_nothing(kube: KubeWorld, launcher: KubeClusters) -> None:
    launcher.remove(NAME)
    assert launcher.scale(NAME, 12, set()) is None


def group(replicas: int, *named: str) -> dict[str, Any]:
    return {"replicas": replicas, "maxReplicas": 8, "scaleStrategy": {"workersToDelete": list(named)}}


def pods(*names: str, ready: bool = True) -> list[dict[str, Any]]:
    status = {"conditions": [{"type": "Ready", "status": "True"}] if ready else []}
    return [{"metadata": {"name": name}, "status": status} for name in names]


def test_a_node_that_is_only_starting_goes_first() -> None:
    assert plan(group(2), pods("a") + pods("b", ready=False), 1, set()) == Change(replicas=1, delete=["b"])


def test_a_node_that_the_operator_has_not_deleted_yet_is_named_again() -> None:
    there = pods("a", "b", "c", "d")
    assert plan(group(3, "a"), there, 2, {"c", "d"}) == Change(replicas=2, delete=["a", "b"])


def test_a_node_that_is_wanted_again_before_the_operator_deleted_it_stays() -> None:
    there = pods("a", "b", "c", "d")
    assert plan(group(2, "a", "b"), there, 4, None) == Change(replicas=4, delete=[])
    assert plan(group(2, "a", "b"), there, 3, None) == Change(replicas=3, delete=["a"])


def test_a_node_that_was_not_made_yet_is_never_counted_off() -> None:
    assert plan(group(4), pods("a", "b"), 2, {"a", "b"}) is None
    assert plan(group(4), pods("a", "b"), 2, {"a"}) == Change(replicas=3, delete=["b"])


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_order_of_changes_no_busy_node_is_deleted(
    kube: KubeWorld, launcher: KubeClusters, seed: int
) -> None:
    chance = random.Random(seed)
    for _ in range(12):
        workers = chance.randint(1, 30)
        named = (kube.group(NAME, "rollout").get("scaleStrategy") or {}).get("workersToDelete") or []
        there = [node for node in nodes(kube) if node not in named]
        kube.operator.busy = set(chance.sample(there, chance.randint(0, len(there))))
        launcher.scale(NAME, workers, kube.operator.busy if chance.random() < 0.7 else None)
        if chance.random() < 0.6:  # it may see several changes at once
            kube.operator.work()
            assert kube.operator.busy <= set(nodes(kube))
    assert kube.operator.chosen_by_itself == []
