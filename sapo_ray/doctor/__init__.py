"""`sapo-ray doctor`: is a machine, or a whole cluster, fit to run the service and its jobs?

    here      dns ray versions clock storage, where engines are installed also shm gpu nccl        local.py
    cluster   versions clock storage shm gpu of every node of Ray, and nccl between them           cluster.py, inside.py

Nothing is changed: what is written to storage is removed again. Every look is bounded.
"""

from sapo_ray.doctor.findings import CHECKS, Check, Finding, Status

__all__ = ["CHECKS", "Check", "Finding", "Status"]
