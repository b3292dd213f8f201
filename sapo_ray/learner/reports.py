"""What learner verbs report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sapo_ray.algorithms.diagnostics import TokenStats
from sapo_ray.learner.batching import SampleId, StepPlan


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


def step_report(
    step: int, plan: StepPlan, reports: Sequence[Sequence[UpdateReport]], stats: TokenStats, seconds: dict[str, float]
) -> StepReport:
    """One report from those of the ranks (inner sequences: one update's, by rank)."""
    details = [
        UpdateReport(
            mini_batch=ranks[0].mini_batch,
            loss=ranks[0].loss,
            grad_norm=ranks[0].grad_norm,
            lr=ranks[0].lr,
            skipped=ranks[0].skipped,
            max_log_ratio=max(report.max_log_ratio for report in ranks),
        )
        for ranks in reports
    ]
    applied = [report for report in details if not report.skipped]
    metrics = stats.summary() | {
        "learner/updates": float(len(applied)),
        "learner/nonfinite_updates": float(len(details) - len(applied)),
        "learner/lr": details[-1].lr,
    }
    if applied:
        metrics |= {
            "learner/loss": sum(report.loss for report in applied) / len(applied),
            "learner/grad_norm": sum(report.grad_norm for report in applied) / len(applied),
            "learner/grad_norm_max": max(report.grad_norm for report in applied),
            "learner/log_ratio_max": max(report.max_log_ratio for report in applied),
        }
    trained = {report.mini_batch for report in applied}
    dropped: list[SampleId] = [
        sample for number, members in enumerate(plan.members) if number not in trained for sample in members
    ]
    return StepReport(
        step=step,
        metrics=metrics,
        updates=len(applied),
        nonfinite=len(details) - len(applied),
        dropped=tuple(dropped),
        seconds=seconds,
        details=tuple(details),
    )
