"""Where each job has a cluster of its own: could one be made? Nothing is made for the answer."""

from __future__ import annotations

from sapo_ray.control.launcher import LauncherUnavailable
from sapo_ray.control.launchers import launchers
from sapo_ray.control.settings import Settings
from sapo_ray.doctor.findings import Finding
from sapo_ray.errors import ConfigError

PAGE = "docs/kubernetes.md"


def check_kubernetes(settings: Settings) -> Finding:
    """Settings, the clusters' template, and whether the Kubernetes API shows the service its clusters; bounded."""
    try:
        with launchers(settings, None) as using:
            using.launcher.ping()
    except ConfigError as error:
        remedy = f"{PAGE} has what a cluster for each job needs, and a template that works"
        return Finding(check="ray", status="failed", detail=str(error), remedy=remedy)
    except LauncherUnavailable as error:
        remedy = (
            f"the service's account needs the rights that {PAGE} lists, KubeRay must be installed, and NetworkPolicies "
            "let the service reach the API server (networkPolicy.kubeApi)"
        )
        return Finding(check="ray", status="failed", detail=str(error), remedy=remedy)
    detail = "the template is a RayCluster, and the Kubernetes API shows the service those that are its own"
    return Finding(check="ray", status="ok", detail=detail)
