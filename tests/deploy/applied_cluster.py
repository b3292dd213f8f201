"""The service's pod, in which `sapo-ray apply-cluster` runs: the chart's objects, its account, changed values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from api_server_stand_in import Kubernetes
from chart_rendering import Object, ray_cluster, render

from sapo_ray.control.kube import KubeClient
from sapo_ray.control.kube.client import in_cluster_url
from sapo_ray.control.shared_cluster import Outcome, apply

CLUSTER, OWNER = "demo-sapo-ray-cluster", "demo-sapo-ray-raycluster"


@contextmanager
def in_the_services_pod(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    """With the chart's objects in the API server, and this process as the service's pod."""
    kube = Kubernetes(folder)
    kube.install(render())
    account = kube.account(folder / "account", "demo-sapo-ray-control")
    monkeypatch.setenv("SAPO_KUBE_ACCOUNT_DIR", str(account))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(kube.port))
    yield kube
    kube.close()


def client() -> KubeClient:
    return KubeClient(in_cluster_url(), Path(os.environ["SAPO_KUBE_ACCOUNT_DIR"]))


def bring(values: Object | None = None) -> Outcome:
    with client() as api:
        return apply(api, ray_cluster(render(values)), OWNER)


def sizes(kube: Kubernetes) -> dict[str, int]:
    return {
        group["groupName"]: group["replicas"] for group in kube.get("RayCluster", CLUSTER)["spec"]["workerGroupSpecs"]
    }


def scale(kube: Kubernetes, name: str, replicas: int, victims: list[str]) -> None:
    """As the autoscaler does."""

    def change(cluster: Object) -> None:
        for group in cluster["spec"]["workerGroupSpecs"]:
            if group["groupName"] == name:
                group |= {"replicas": replicas, "scaleStrategy": {"workersToDelete": victims}}

    kube.change("RayCluster", CLUSTER, change)
