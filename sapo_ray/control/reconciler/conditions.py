"""Conditions that the control plane itself reports of a job, beside those of its driver."""

from __future__ import annotations

from sqlalchemy.orm import Session

from sapo_ray.control.store import JobRow, events

LAUNCHER_UNAVAILABLE = "LauncherUnavailable"
RUN_DIR_UNAVAILABLE = "RunDirUnavailable"
REMAINS_LOST = "RemainsLost"
"""What an ended driver left could not all be kept. Stays: it does not come back."""
OURS = frozenset({LAUNCHER_UNAVAILABLE, RUN_DIR_UNAVAILABLE})


def unusable(error: OSError) -> str:
    """What a tenant is told of a run directory that cannot be used: the kind of failure, not the operator's paths."""
    return f"the job's run directory cannot be used ({error.strerror or type(error).__name__})"


def raise_condition(s: Session, row: JobRow, kind: str, reason: str, now: float) -> None:
    """Say that something is the case; nothing if that was said before. `row` is locked."""
    if is_raised(row, kind):
        return
    row.conditions = [*row.conditions, {"type": kind, "reason": reason, "since": now, "step": None}]
    events.append_control_event(s, row, "condition", condition=kind, reason=reason)


def clear_conditions(s: Session, row: JobRow) -> None:
    """Say that none of ours is the case any more. `row` is locked."""
    gone = [one["type"] for one in row.conditions if one["type"] in OURS]
    if not gone:
        return
    row.conditions = [one for one in row.conditions if one["type"] not in OURS]
    for kind in gone:
        events.append_control_event(s, row, "condition", condition=kind, cleared=True)


def has_ours(row: JobRow) -> bool:
    """Whether there is something to clear."""
    return any(one["type"] in OURS for one in row.conditions)


def is_raised(row: JobRow, kind: str) -> bool:
    """Whether it was said already."""
    return any(one["type"] == kind for one in row.conditions)
