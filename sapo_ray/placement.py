"""Which nodes of a cluster the actors of a role run on.

A cluster may have nodes for each role, so that each kind is sized, and scaled by Ray's autoscaler, on its own. Its
nodes then bear a label whose value is the role, and the operator names that label in the drivers' environment:

    ray start ... --labels sapo-ray.io/role=rollout        SAPO_ROLE_LABEL=sapo-ray.io/role

Without it, actors run wherever there is room.
"""

from __future__ import annotations

import os
from typing import Literal

Role = Literal["rollout", "learner", "verifier"]

ROLE_LABEL = "SAPO_ROLE_LABEL"
"""Environment variable of drivers: name of the label that nodes bear."""
ACCELERATOR = "SAPO_ACCELERATOR"
"""Environment variable of drivers: `gpu` or `cpu`, for clusters whose GPU nodes come only when they are asked for."""


def label_selector(role: Role) -> dict[str, str]:
    """What Ray is asked for beside resources; empty if nodes are not told apart."""
    label = os.environ.get(ROLE_LABEL)
    return {label: role} if label else {}


def wants_gpus(cluster_has: bool) -> bool:
    """Whether engines and learners ask for GPUs: as the operator says, else if the cluster has any now."""
    said = os.environ.get(ACCELERATOR, "")
    return said == "gpu" if said in ("gpu", "cpu") else cluster_has
