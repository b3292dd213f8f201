"""Ray's own KubeRay autoscaler on the RayCluster that the chart renders, under the rights that the chart grants.

The service applies the cluster, the autoscaler sizes it, the service changes it meanwhile. The API server is a stand-in
(api_server_stand_in.py), and so is the operator; head, raylets, autoscaler and actors are Ray's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server_stand_in import Kubernetes
from autoscaler_parts import Cluster
from chart_rendering import Object, overlaid, ray_cluster, render

from sapo_ray.control.kube import KubeClient
from sapo_ray.control.shared_cluster import apply

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

NAME, OWNER = "demo-sapo-ray-cluster", "demo-sapo-ray-raycluster"
VALUES: Object = {
    "ray": {
        "groupDefaults": {"cpu": "1"},
        "groups": {
            "rollout": {"cpu": "1", "gpus": 1, "min": 0, "max": 2, "idleTimeoutSeconds": 12},
            "learner": {"cpu": "1", "min": 1, "max": 1},
            "verifier": {"cpu": "2", "min": 1, "max": 1},
        },
    }
}


@pytest.fixture
def kube(tmp_path: Path) -> Iterator[Kubernetes]:
    kube = Kubernetes(tmp_path)
    kube.install(render(VALUES))
    yield kube
    kube.close()


def bring(kube: Kubernetes, folder: Path, values: Object) -> None:
    """As the service's pod does."""
    account = kube.account(folder / "service", "demo-sapo-ray-control")
    with KubeClient(kube.url, account) as api:
        apply(api, ray_cluster(render(values)), OWNER)


def test_the_autoscaler_sizes_the_rollout_group_by_demand_and_a_change_by_the_service_disturbs_nothing(
    kube: Kubernetes, tmp_path: Path
) -> None:
    bring(kube, tmp_path, VALUES)
    cluster = Cluster(kube, NAME, kube.account(tmp_path / "head", "demo-sapo-ray-ray-head"), tmp_path)
    try:
        check(kube, cluster, tmp_path)
    finally:
        cluster.close()
    of_the_autoscaler = [entry for entry in kube.log if entry[0] == "sa:rl:demo-sapo-ray-ray-head"]
    assert {code for *_, code in of_the_autoscaler} == {200}
    assert {(verb, what.partition("/")[0]) for _, verb, what, _ in of_the_autoscaler} >= {
        ("get", "rayclusters"),
        ("patch", "rayclusters"),
        ("list", "pods"),
    }


def check(kube: Kubernetes, cluster: Cluster, folder: Path) -> None:
    driver = cluster.driver()
    try:
        cluster.until("learner and verifier", lambda: len(standing_of(cluster)) == 2, 240)
        standing = standing_of(cluster)
        assert cluster.pods("rollout") == []

        driver.do("make", 3)
        cluster.until(
            "two rollout nodes for three workers, as max says", lambda: len(cluster.pods("rollout")) == 2, 240
        )

        more = overlaid(VALUES, {"ray": {"groups": {"rollout": {"max": 3}}}})
        bring(kube, folder, more)
        cluster.until("a third, after the service raised max", lambda: len(cluster.pods("rollout")) == 3, 240)
        assert driver.do("answering", 240) == "3"
        assert cluster.removed == [], "a change of the service's ended a node"

        driver.do("end", 2)
        cluster.until("the end of two idle nodes", lambda: len(cluster.pods("rollout")) == 1, 240)
        assert driver.do("answering", 120) == "1", "a node that was at work was taken"
        driver.do("end", 1)
        cluster.until("the end of the last", lambda: cluster.pods("rollout") == [], 240)
        assert len(cluster.removed) == 3
        assert standing_of(cluster) == standing
    finally:
        driver.close()


def standing_of(cluster: Cluster) -> list[str]:
    return cluster.pods("learner") + cluster.pods("verifier")
