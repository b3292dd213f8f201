"""A RayCluster for each job, made through the Kubernetes API; see clusters.py. Names no package that computes."""

from sapo_ray.control.kube.client import KubeClient
from sapo_ray.control.kube.clusters import KubeClusters
from sapo_ray.control.kube.template import ClusterTemplate

__all__ = ["ClusterTemplate", "KubeClient", "KubeClusters"]
