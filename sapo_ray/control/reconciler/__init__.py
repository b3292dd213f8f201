"""Brings drivers in the cluster to what jobs in the store want; see loop.py, and decision.py for the rules."""

from sapo_ray.control.reconciler.hooks import Hooks
from sapo_ray.control.reconciler.limits import Limits
from sapo_ray.control.reconciler.loop import Reconciler

__all__ = ["Hooks", "Limits", "Reconciler"]
