"""What learner verbs report."""

from __future__ import annotations

from dataclasses import dataclass, field

from sapo_ray.learner.batching import SampleId


@dataclass(frozen=True, kw_only=True, slots=True)
class RankInfo:
    """A rank that is ready."""

    rank: int
    pid: int
    node_id: str
    host: str
    parameters: int
    """Of the whole model, tied ones once."""
    published_bytes: int
    """Size of one published set of weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """One optimizer update; the same on every rank but for max_log_ratio."""

    mini_batch: int
    loss: float
    """Of the mini-batch, over all ranks."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    lr: float
    skipped: bool
    """The gradient was not finite: nothing was changed."""
    max_log_ratio: float
    """Largest |logp - old_logp| over this rank's completion tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One learner step, over all ranks."""

    step: int
    metrics: dict[str, float]
    """Token-level metrics (algorithms.diagnostics) and `learner/...`."""
    updates: int
    """Updates applied."""
    nonfinite: int
    """Updates skipped for a non-finite gradient."""
    dropped: tuple[SampleId, ...]
    """Samples all of whose updates were skipped: they were not trained on."""
    seconds: dict[str, float]
    """By phase: load, prepare, forward_backward, optim_step."""
    details: tuple[UpdateReport, ...] = field(repr=False)
    """Every update in order."""
