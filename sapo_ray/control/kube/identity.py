"""How a job's cluster is named, marked and secured, so that its object alone tells whose it is."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sapo_ray.control.kube.client import Object
from sapo_ray.control.kube.pods import CLUSTER
from sapo_ray.control.kube.sizes import Sizes
from sapo_ray.control.kube.template import GROUPS, Filling
from sapo_ray.control.launcher import LaunchRequest, OwnCluster

PREFIX = "sapo-ray.io/"
JOB, ATTEMPT, TENANT = PREFIX + "job", PREFIX + "attempt", PREFIX + "tenant"
SERVICE = PREFIX + "service"
WORKERS_PER_NODE, LEAST_NODES = PREFIX + "workers-per-node", PREFIX + "least-rollout-nodes"
TOKEN_OF = PREFIX + "token-of"
ROLE_LABEL = PREFIX + "role"
DASHBOARD_PORT = 8265
MOST_NAME = 53
"""Longest name of a RayCluster that the operator takes."""
_LABEL = re.compile(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Of one service; its clusters are those that bear its name."""

    service: str
    secret: str
    """From which each cluster's token is derived."""

    def selector(self, job_id: str = "") -> str:
        """Of all clusters, or of those of one job."""
        return f"{SERVICE}={self.service}" + (f",{JOB}={job_id}" if job_id else "")

    def filling(self, request: LaunchRequest, sizes: Sizes, owners: list[dict[str, Any]]) -> Filling:
        """What a driver's cluster has beside the template."""
        assert len(request.submission_id) <= MOST_NAME, request.submission_id
        labels = {JOB: request.job_id, ATTEMPT: str(request.attempt), SERVICE: self.service}
        if _LABEL.fullmatch(request.tenant):
            labels[TENANT] = request.tenant
        return Filling(
            name=request.submission_id,
            labels=labels,
            annotations={
                WORKERS_PER_NODE: str(sizes.workers_per_node),
                LEAST_NODES: str(sizes.least["rollout"]),
                TOKEN_OF: self._mark(),
            },
            owners=owners,
            replicas=sizes.nodes,
            environment={
                "SAPO_JOB_ID": request.job_id,
                "SAPO_TENANT": request.tenant,
                "SAPO_ROLE_LABEL": ROLE_LABEL,
                "SAPO_ACCELERATOR": "gpu" if sizes.gpus else "cpu",
            },
            role_label=ROLE_LABEL,
            secret=_secret_name(request.submission_id),
        )

    def token(self, name: str) -> str:
        """Of one cluster. Who has it, as its job's code may, cannot tell another's."""
        return hmac.new(self.secret.encode(), name.encode(), hashlib.sha256).hexdigest()

    def secret_of(self, cluster: Object) -> Object:
        """The Secret from which a cluster's pods have their token; it goes with the cluster."""
        name = cluster["metadata"]["name"]
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "metadata": _belonging(cluster, _secret_name(name)),
            "data": {"auth_token": base64.b64encode(self.token(name).encode()).decode()},
        }

    def policy_of(self, cluster: Object) -> Object:
        """By this NetworkPolicy a cluster's pods reach each other, by any port, and nobody else's do."""
        name = cluster["metadata"]["name"]
        among = {"podSelector": {"matchLabels": {CLUSTER: name}}}
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": _belonging(cluster, name),
            "spec": among
            | {"policyTypes": ["Ingress", "Egress"], "ingress": [{"from": [among]}], "egress": [{"to": [among]}]},
        }

    def knows_token(self, cluster: Object) -> bool:
        """Whether a cluster's token was derived from the secret that the service has now."""
        return annotation(cluster, TOKEN_OF) == self._mark()

    def _mark(self) -> str:
        return self.token("mark")[:8]


def is_of(cluster: Object, job_id: str) -> bool:
    """Whether a cluster was made for a job."""
    return (cluster["metadata"].get("labels") or {}).get(JOB) == job_id


def own(cluster: Object) -> OwnCluster:
    """Whose a cluster is."""
    labels = cluster["metadata"]["labels"]
    return OwnCluster(submission_id=cluster["metadata"]["name"], job_id=labels[JOB], attempt=int(labels[ATTEMPT]))


def annotation(cluster: Object, name: str) -> str:
    """An annotation's value; empty if it is not there."""
    return str((cluster["metadata"].get("annotations") or {}).get(name, ""))


def is_going(cluster: Object) -> bool:
    """Whether it is being deleted."""
    return "deletionTimestamp" in cluster["metadata"]


def address(cluster: Object) -> str:
    """Where the dashboard of a cluster answers within Kubernetes; empty as long as the operator has not said."""
    service = ((cluster.get("status") or {}).get("head") or {}).get("serviceName")
    return f"http://{service}.{cluster['metadata']['namespace']}.svc:{DASHBOARD_PORT}" if service else ""


def began(cluster: Object) -> float:
    """Unix seconds when its nodes were asked for: it was made, or left the queue of Kubernetes."""
    conditions = (cluster.get("status") or {}).get("conditions") or []
    left = [one for one in conditions if one.get("type") == "RayClusterSuspended" and one.get("status") == "False"]
    times = [cluster["metadata"]["creationTimestamp"], *(one["lastTransitionTime"] for one in left)]
    return max(datetime.fromisoformat(time).timestamp() for time in times)


def needed(cluster: Object) -> dict[str, int]:
    """Nodes with which its driver can begin, by group."""
    groups = {one["groupName"]: int(one.get("replicas") or 0) for one in cluster["spec"]["workerGroupSpecs"]}
    return {name: groups[name] for name in GROUPS} | {"rollout": int(annotation(cluster, LEAST_NODES))}


def _belonging(cluster: Object, name: str) -> Object:
    """Metadata of what a cluster owns."""
    metadata = cluster["metadata"]
    owner = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": metadata["name"], "uid": metadata["uid"]}
    labels = {key: metadata["labels"][key] for key in (JOB, ATTEMPT, SERVICE)}
    return {"name": name, "labels": labels, "ownerReferences": [owner]}


def _secret_name(cluster: str) -> str:
    return f"{cluster}-auth"
