"""Last progress of every part of a run: what the driver writes to `vitals.json`, and when a part counts as stalled.

A part that has nothing to do cannot stall; one that works does when it has not got on for FACTOR times as long as such
work usually takes, and for longer than a floor. "Usually" is the median of what was finished lately in this attempt;
before the first was finished, a share of the deadline that bounds the work stands in for it.

The driver writes the file from a thread of its own every few seconds. Whoever reads it needs no driver: one that hangs
shows by an old heartbeat of its loop, one that is stopped or gone by an old file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

FILE = "vitals.json"
FACTOR = 3.0
FLOOR_S = 15.0
"""Nothing counts as stalled before this: machines have hiccups."""
START_FLOOR_S = 120.0
"""The same for a part that starts: images are pulled, nodes come up, models are read."""
PLACE_FLOOR_S = 30.0
"""The same for a cluster that has no room: nodes may be on their way."""
LOOP_S = 15.0
"""The driver's loop beats every second; nothing that it does by itself takes longer than this."""
WRITTEN_S = 20.0
"""A record that is older than this was not written because nobody writes it any more."""
POOL = "rollout pool"
"""Waits for everybody else: named only where nobody else can be."""
DRIVER = "driver"


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """Work under way. Times are Unix seconds."""

    name: str
    """rollout-0, verifier-1, learner, storage, ..."""
    kind: str
    """Of the work: place, start, sample, grade, train, publish, takeover, checkpoint, export, output, write, ..."""
    task: str
    """In words."""
    since: float
    progress: float
    """When it last got on."""
    after: str = ""
    """Of a start: how the one was lost whose place it takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """Work under way beside what is usual for it."""

    name: str
    kind: str
    task: str
    since: float
    progress: float
    usual: float | None
    """Seconds; None before the first was finished."""
    patience: float
    """Seconds without progress that are no reason to worry."""
    after: str = ""
    """Of a start: how the one was lost whose place it takes."""

    def quiet(self, now: float) -> float:
        """Seconds without progress."""
        return max(0.0, now - max(self.since, self.progress))

    def stalled(self, now: float) -> bool:
        return self.quiet(now) > self.patience

    def story(self, now: float) -> str:
        """`no progress for 17 s where 1.2 s is usual: sampling 16 completions`"""
        usual = "and nothing to compare with yet" if self.usual is None else f"where {self.usual:.2g} s is usual"
        return f"no progress for {self.quiet(now):.0f} s {usual}: {self.task}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Vitals:
    """One record of a driver."""

    attempt: int
    pid: int
    host: str
    written: float
    """Unix seconds, as are all times."""
    loop: float | None
    """Last heartbeat of the driver's event loop; None while it does not run one."""
    phase: str
    ended: bool
    """The attempt wrote its last record."""
    components: tuple[Component, ...]
    """Work under way; of many, those that have been quiet for longest."""

    def as_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def patience(kind: str, usual: float | None, deadline_s: float | None) -> float:
    """Seconds without progress from which on work of a kind counts as stalled.

    Args:
        deadline_s: bound of such work; half of it stands in for experience.
    """
    if kind == "place":
        return PLACE_FLOOR_S
    floor = START_FLOOR_S if kind == "start" else FLOOR_S
    if usual is not None:
        return max(floor, FACTOR * usual)
    return max(floor, deadline_s / 2) if deadline_s is not None else floor


def parse(text: str | bytes) -> Vitals | None:
    """A record as it was written; None for anything else, such as one of another version."""
    try:
        raw = json.loads(text)
        components = tuple(Component(**_typed(Component, one)) for one in raw.pop("components"))
        return Vitals(components=components, **_typed(Vitals, raw))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def stalls(vitals: Vitals, now: float) -> list[Component]:
    """Who stalls, the likeliest culprit first.

    What hangs because somebody else does is left out: everything if that is the driver, the pool's own wait if it waits
    for a part that hangs, starts, or finds no room. Who finds no room comes first: others wait for it.
    """
    at = min(now, vitals.written)
    if vitals.loop is not None and at - vitals.loop > LOOP_S:
        return [loop(vitals, at)]
    found = [component for component in vitals.components if component.stalled(at)]
    named = [component for component in found if component.name != POOL]
    if named or any(component.kind in ("start", "place") for component in vitals.components):
        found = named
    return sorted(found, key=lambda one: (one.kind == "deliver", one.kind != "place", one.progress))


def replacements(vitals: Vitals) -> list[Component]:
    """Parts that start in the place of lost ones, the oldest first."""
    found = [component for component in vitals.components if component.kind == "start" and component.after]
    return sorted(found, key=lambda one: one.since)


def loop(vitals: Vitals, now: float) -> Component:
    """The driver itself as a part."""
    beat = vitals.written if vitals.loop is None else vitals.loop
    task = f"its loop, in phase {vitals.phase}" if now <= vitals.written else f"its process ({vitals.pid})"
    return Component(name=DRIVER, kind="loop", task=task, since=beat, progress=beat, usual=1.0, patience=LOOP_S)


def names(components: Iterable[Component]) -> str:
    """`rollout-0, rollout-1`; of many, the first few."""
    every = [one.name for one in components]
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


def as_time(seconds: float) -> datetime:
    """Unix seconds as the wire has times."""
    return datetime.fromtimestamp(seconds, UTC)


def _typed(kind: type[Any], raw: dict[str, Any]) -> dict[str, Any]:
    """The fields that `kind` has, numbers where it has numbers; others a newer version may have added."""
    values = {field.name: raw[field.name] for field in fields(kind) if field.name != "components"}
    for name in {"since", "progress", "usual", "patience", "written", "loop"} & values.keys():
        value = values[name]
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(name)
    return values
