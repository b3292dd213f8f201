"""Where each job has a cluster of its own: could one be made? Nothing is made for the answer."""

from __future__ import annotations

from sapo_ray.control.launcher import LauncherUnavailable
from sapo_ray.control.launchers import launchers
from sapo_ray.control.settings import Settings
from sapo_ray.doctor.findings import Finding
from sapo_ray.errors import ConfigError

PAGE = "docs/kubernetes.md"


def check_kubernetes(settings: Settings) -> Finding:
    """Settings, the clusters' template, every right that the launcher uses, and whether there is KubeRay; bounded."""
    try:
        with launchers(settings, None) as using:
            lacking = using.clusters.lacking() if using.clusters else []
            if lacking:
                remedy = (
                    f"the Role of the service's account needs the rules that {PAGE} lists (the chart makes it, with "
                    "ray.mode: perJob); `kubectl auth can-i VERB RESOURCE --as "
                    "system:serviceaccount:NAMESPACE:ACCOUNT` tells whether it has them"
                )
                detail = f"the service's account lacks rights in its clusters' namespace: {', '.join(lacking)}"
                return Finding(check="ray", status="failed", detail=detail, remedy=remedy)
            using.launcher.ping()
    except ConfigError as error:
        remedy = f"{PAGE} has what a cluster for each job needs, and a template that works"
        return Finding(check="ray", status="failed", detail=str(error), remedy=remedy)
    except LauncherUnavailable as error:
        remedy = (
            "KubeRay must be installed, the service's account mounted, and NetworkPolicies must let the service reach "
            f"the API server (networkPolicy.kubeApi); {PAGE} has more"
        )
        return Finding(check="ray", status="failed", detail=str(error), remedy=remedy)
    detail = "the template is a RayCluster, and Kubernetes knows such clusters and grants all rights that they need"
    return Finding(check="ray", status="ok", detail=detail)
