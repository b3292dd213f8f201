"""Reinforcement learning of language models that never loses a sample."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sapo_ray.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    """`Client` comes with an HTTP library, so it is loaded when it is first asked for."""
    if name == "Client":
        return import_module("sapo_ray.client").Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
