"""Which launcher a service has: drivers in one cluster, or a cluster for each. The one place that knows both."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sapo_ray.control.embedded import EmbeddedRay
from sapo_ray.control.kube.client import KubeClient, in_cluster_url
from sapo_ray.control.kube.clusters import KubeClusters
from sapo_ray.control.kube.making import Options
from sapo_ray.control.launcher import ClusterLauncher, Launcher, RayJobs
from sapo_ray.control.settings import Settings
from sapo_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Launchers:
    """`clusters` is the launcher again, where it makes clusters."""

    launcher: Launcher
    clusters: ClusterLauncher | None = None


def wants_own_ray(settings: Settings) -> bool:
    """Whether the service starts a Ray on its own machine: no other is named, and none is made for each job."""
    return settings.shared_cluster and "ray_jobs_url" not in settings.model_fields_set


@contextmanager
def launchers(settings: Settings, embedded: EmbeddedRay | None) -> Iterator[Launchers]:
    """By the settings; `embedded` is the Ray that the service has started for itself. Raises ConfigError."""
    if settings.shared_cluster:
        token = settings.ray_auth_token.get_secret_value() if settings.ray_auth_token else None
        url, token = (embedded.url, embedded.token) if embedded else (settings.ray_jobs_url, token)
        python = settings.driver_python or (sys.executable if embedded else "python")
        with RayJobs(url, python=python, token=token) as jobs:
            yield Launchers(launcher=jobs)
        return
    options = _options(settings)
    url = settings.kube_url or in_cluster_url()
    with (
        KubeClient(url, settings.kube_account_dir, settings.kube_namespace) as api,
        KubeClusters(api, options) as clusters,
    ):
        yield Launchers(launcher=clusters, clusters=clusters)


def _options(settings: Settings) -> Options:
    if settings.cluster_template is None:
        raise ConfigError(
            "SAPO_SHARED_CLUSTER=false needs SAPO_CLUSTER_TEMPLATE, the RayCluster from which each job's own is made"
        )
    if settings.ray_auth_token is None:
        raise ConfigError(
            "SAPO_SHARED_CLUSTER=false needs SAPO_RAY_AUTH_TOKEN: from it the token of each cluster is derived, "
            "without which whoever reaches a cluster can run code in it; make one with `openssl rand -hex 32`"
        )
    return Options(
        template=settings.cluster_template,
        secret=settings.ray_auth_token.get_secret_value(),
        owner=settings.kube_owner,
        python=settings.driver_python or "python",
        deadline_s=settings.cluster_deadline_s,
        network_policy=settings.cluster_network_policy,
        tenant_folders=(settings.datasets_dir, settings.cache_dir),
    )
