"""Conditions that the control plane itself reports of a job, beside those of its driver."""

from __future__ import annotations

from sqlalchemy.orm import Session

from sapo_ray.control.store import JobRow, events

LAUNCHER_UNAVAILABLE = "LauncherUnavailable"
RUN_DIR_UNAVAILABLE = "RunDirUnavailable"
CLUSTER_PENDING = "ClusterPending"
"""Nodes that a job needs are not there yet; the reason says which, and what Kubernetes says of them."""
REMAINS_LOST = "RemainsLost"
"""What an ended driver left could not all be kept. Stays: it does not come back."""
OURS = frozenset({LAUNCHER_UNAVAILABLE, RUN_DIR_UNAVAILABLE, CLUSTER_PENDING})


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


def keep_only(s: Session, row: JobRow, kind: str, reason: str, now: float) -> None:
    """Say that of ours this is the case, for this reason now, and no other. `row` is locked."""
    ours = {one["type"]: one for one in row.conditions if one["type"] in OURS}
    if (ours.get(kind) or {}).get("reason") == reason and len(ours) == 1:
        return
    since = (ours.get(kind) or {}).get("since", now)
    kept = [one for one in row.conditions if one["type"] not in OURS]
    row.conditions = [*kept, {"type": kind, "reason": reason, "since": since, "step": None}]
    for gone in sorted(set(ours) - {kind}):
        events.append_control_event(s, row, "condition", condition=gone, cleared=True)
    events.append_control_event(s, row, "condition", condition=kind, reason=reason)


def ours(row: JobRow) -> dict[str, str]:
    """Reasons of those of ours that are the case."""
    return {one["type"]: one["reason"] for one in row.conditions if one["type"] in OURS}


def is_raised(row: JobRow, kind: str) -> bool:
    """Whether it was said already."""
    return any(one["type"] == kind for one in row.conditions)
