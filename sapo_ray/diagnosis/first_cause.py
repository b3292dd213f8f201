"""The first cause of an end among a run's events, not the last symptom."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sapo_ray.api.diagnosis import Cause
from sapo_ray.diagnosis.causes import CLUSTER, OTHER, STORAGE, component_of, kind_of
from sapo_ray.diagnosis.log_lines import file_of
from sapo_ray.diagnosis.vitals import DRIVER, as_time

Event = Mapping[str, Any]
Log = Callable[[str], Sequence[str]]
"""Last telling lines of a log by its name below `logs/`; none where it is not there."""
LONGEST = 2000
TROUBLE = ("worker_lost", "takeover_failed")
_OF_WORKERS = re.compile(
    r"no rollout worker|rollout pool failed|no attested rollout worker|rollout workers? (is|are) left|below the minimum"
)
_WAITED = re.compile(r"waited [\d.]+ s for")
VAGUE = frozenset({OTHER.code, "silent", "worker_died"})
"""Kinds of which the part's own log may know more."""


def first_cause(events: Sequence[Event], end: str, at: float, attempt: int, log: Log) -> Cause:
    """Why a run came to its end.

    Args:
        events: of the run, oldest first.
        end: the reason of its end, in the words of whoever ended it.
        at: Unix seconds of the end.
    """
    mine = [event for event in events if event.get("attempt") in (None, attempt)]
    if _OF_WORKERS.search(end) and (lost := _first_loss(mine)) is not None:
        return cause(str(lost.get("worker")), str(lost.get("reason", "")), _time(lost, at), log)
    if _WAITED.search(end) and (stall := _last_stall(mine)) is not None:
        text = f"{stall.get('component')}: {stall.get('reason')}; then {end}"
        return cause(str(stall.get("component")).partition(",")[0], text, _time(stall, at), log)
    return cause(None, end, at, log)


def cause(component: str | None, text: str, at: float, log: Log) -> Cause:
    """What is known of a trouble that was noticed in these words; `component` is whose it is, if that is known."""
    kind = kind_of(text)
    found = component or kind.component or component_of(text, DRIVER)
    lines = list(log(file_of(found)))
    if kind.code in VAGUE and (better := kind_of("\n".join(lines))).code not in VAGUE:
        kind = better
    if kind.component in (STORAGE, CLUSTER) and component is None:
        found = kind.component
    name = file_of(found) if lines else None
    return Cause(code=kind.code, component=found, text=text[:LONGEST], time=as_time(at), log=name, lines=lines)


def _first_loss(events: Sequence[Event]) -> Event | None:
    """Of the losses that ended in the pool's end: those after the last step, where anything still worked."""
    step = max((at for at, event in enumerate(events) if event.get("kind") == "step"), default=-1)
    losses = [
        (at, event) for at, event in enumerate(events) if event.get("kind") == "worker" and event.get("what") in TROUBLE
    ]
    return next((event for at, event in losses if at > step), losses[-1][1] if losses else None)


def _last_stall(events: Sequence[Event]) -> Event | None:
    """The stall that was not over when the run ended."""
    told = [event for event in events if event.get("kind") == "condition" and event.get("condition") == "Stalled"]
    return told[-1] if told and not told[-1].get("cleared") else None


def _time(event: Event, otherwise: float) -> float:
    value = event.get("time")
    return float(value) if isinstance(value, int | float) else otherwise
