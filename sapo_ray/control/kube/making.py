"""Making a job's cluster: its object, and what belongs to it beside pods. Every step may be taken again at any time.

    tenant's folders --> RayCluster --> NetworkPolicy --> Secret --> its pods start, which wait for the Secret

What belongs to a cluster is owned by it and goes with it. So it comes after the cluster, and the Secret last: no pod
runs before everything is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from sapo_ray.config.spec import JobSpec
from sapo_ray.control.kube.client import (
    DEPLOYMENTS,
    NETWORKPOLICIES,
    RAYCLUSTERS,
    SECRETS,
    Conflict,
    KubeClient,
    Object,
    QuotaUsedUp,
    Rejected,
)
from sapo_ray.control.kube.identity import Identity
from sapo_ray.control.kube.pods import QUOTA
from sapo_ray.control.kube.sizes import Sizes, sizes_of
from sapo_ray.control.kube.template import ClusterTemplate
from sapo_ray.control.launcher import ClusterUnavailable, LaunchRefused, LaunchRequest, NotStarted
from sapo_ray.errors import ConfigError

log = structlog.get_logger("sapo_ray.control.kube")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the operator decided."""

    template: Path
    secret: str
    """From which each cluster's token is derived."""
    owner: str = ""
    """Deployment of this service."""
    python: str = "python"
    deadline_s: float = 1800.0
    """Time in which a cluster's nodes are to be ready."""
    look_every_s: float = 5.0
    """Pause between two looks at a cluster that is not ready."""
    network_policy: bool = False
    """Whether each cluster has a NetworkPolicy, where everything is denied that no policy allows."""
    tenant_folders: tuple[Path, ...] = ()
    """In each of them a tenant has a folder, which its clusters may mount: the kubelet would make it root's."""


class Making:
    """Makes the clusters of one service."""

    def __init__(self, api: KubeClient, options: Options, identity: Identity) -> None:
        self._api, self._options, self._identity = api, options, identity

    def cluster(self, request: LaunchRequest) -> Object:
        """A driver's cluster, made or found. Raises LaunchRefused, NotStarted, LauncherUnavailable, OSError."""
        sizes = self._sizes(request)
        body = self._template().fill(self._identity.filling(request, sizes, self._owners()))
        for folder in self._options.tenant_folders:
            (folder / request.tenant).mkdir(parents=True, exist_ok=True)
        try:
            made = self._api.create(RAYCLUSTERS, body)
        except Conflict:  # another replica was quicker, or this one before it died
            found = self._api.get(RAYCLUSTERS, request.submission_id)
            if found is None:
                raise NotStarted("the cluster is being made") from None
            return found
        except QuotaUsedUp as error:
            log.warning("quota_used_up", cluster=request.submission_id, reason=str(error))
            raise NotStarted(f"{QUOTA}; the job's cluster is made when there is room") from error
        except Rejected as error:
            raise LaunchRefused(str(error)) from error
        log.info("cluster_made", cluster=request.submission_id, nodes=sizes.nodes)
        return made

    def belongings(self, cluster: Object) -> None:
        """What a cluster's pods need beside themselves: to reach each other, and their token."""
        if self._options.network_policy:
            self._make(NETWORKPOLICIES, self._identity.policy_of(cluster))
        self._make(SECRETS, self._identity.secret_of(cluster))

    def _make(self, resource: str, body: Object) -> None:
        try:
            self._api.create(resource, body)
        except Conflict:
            pass  # it is there; one that is only left of an earlier cluster goes, and is made again in the next round
        except Rejected as error:
            raise ClusterUnavailable(str(error)) from error

    def _sizes(self, request: LaunchRequest) -> Sizes:
        try:
            spec = JobSpec.model_validate(dict(request.spec))
        except ValidationError as error:
            raise LaunchRefused(f"{request.job_id}: its stored job cannot be read: {error}") from error
        return sizes_of(spec, request.workers, request.least_workers, self._template())

    def _template(self) -> ClusterTemplate:
        """As it is now: Kubernetes renews a mounted ConfigMap."""
        try:
            return ClusterTemplate.load(self._options.template)
        except ConfigError as error:
            raise ClusterUnavailable(str(error)) from error

    def _owners(self) -> list[dict[str, Any]]:
        if not self._options.owner:
            return []
        found = self._api.get(DEPLOYMENTS, self._options.owner)
        if found is None:
            raise ClusterUnavailable(f"there is no Deployment {self._options.owner}; is SAPO_KUBE_OWNER right?")
        kind = {"apiVersion": "apps/v1", "kind": "Deployment", "name": self._options.owner}
        return [kind | {"uid": found["metadata"]["uid"], "blockOwnerDeletion": False}]
