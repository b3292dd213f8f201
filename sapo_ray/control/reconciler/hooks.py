"""Where metrics attach to the reconciler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _nobody(*_: object) -> None:
    """Nobody listens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """Called by the reconciler's thread; must return at once and not raise."""

    admitted: Callable[[str, float], None] = _nobody
    """A job left the queue: tenant, seconds it waited."""
    launched: Callable[[str], None] = _nobody
    """A driver was handed to the cluster: tenant."""
    restarted: Callable[[str], None] = _nobody
    """A driver was replaced: tenant."""
    failed_round: Callable[[str], None] = _nobody
    """Something went wrong and is tried again: store, launcher, cluster, run_dir or bug."""
    round_over: Callable[[float], None] = _nobody
    """A round over all jobs ended; Unix seconds."""
