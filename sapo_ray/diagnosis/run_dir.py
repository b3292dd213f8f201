"""What a run directory tells, for a run without a service or beside one that does not answer."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sapo_ray.diagnosis.diagnose import Evidence
from sapo_ray.diagnosis.log_lines import TAIL_BYTES, telling
from sapo_ray.diagnosis.vitals import FILE, WRITTEN_S, Vitals, parse
from sapo_ray.errors import CheckpointError

JOURNAL_BYTES = 8 << 20
"""Of the journal's end that is read."""


def evidence(run_dir: Path, now: float) -> Evidence:
    """What is known of a run.

    Raises:
        CheckpointError: it is no run directory.
    """
    if not (run_dir / "journal.jsonl").is_file():
        raise CheckpointError(f"{run_dir} is not a run directory: it has no journal.jsonl")
    events = [event for event in _rows(_tail(run_dir / "journal.jsonl", JOURNAL_BYTES)) if "seq" in event]
    attempt = max((int(event["attempt"]) for event in events), default=1)
    mine = [event for event in events if event["attempt"] == attempt]
    vitals = parse(_tail(run_dir / FILE, 1 << 20))
    step, steps = _steps(mine)
    state, reason, since = _state(mine, vitals if vitals and vitals.attempt == attempt else None, now)
    return Evidence(
        now=now,
        state=state,
        reason=reason,
        since=since,
        attempt=attempt,
        step=step,
        steps=steps,
        conditions=conditions(mine),
        events=mine,
        vitals=vitals,
        free=free_bytes(run_dir),
        log=lambda name: telling(_tail(run_dir / "logs" / name, TAIL_BYTES)),
    )


def conditions(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those that hold after these events: the newest of each type that was not cleared, as type, reason, since."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["kind"] != "condition":
            continue
        name = str(event.get("condition"))
        found.pop(name, None)
        if not event.get("cleared"):
            reason = event.get("reason")
            if reason is None:
                known = ("time", "attempt", "seq", "kind", "condition")
                reason = ", ".join(f"{key} {value}" for key, value in event.items() if key not in known)
            found[name] = {"type": name, "reason": str(reason), "since": event["time"]}
    return list(found.values())


def free_bytes(folder: Path) -> int | None:
    """Bytes free on a folder's disk; None where it cannot be asked."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _state(events: list[dict[str, Any]], vitals: Vitals | None, now: float) -> tuple[str, str, float]:
    """State, reason and since of the newest attempt."""
    last = next((event for event in reversed(events) if event["kind"] == "transition"), None)
    if last is None and any(event["kind"] == "step" for event in events):  # of long ago: not in what was read
        last = {"state": "running", "time": events[0]["time"]}
    if last is None:
        return "starting", "its driver has just begun", events[-1]["time"] if events else now
    state, reason = str(last["state"]), str(last.get("reason", ""))
    if state in ("starting", "running") and vitals is not None and _is_gone(vitals, now):
        return "failed", f"its driver (process {vitals.pid}) was killed: it ended without a word", vitals.written
    return state, reason or state, float(last["time"])


def _is_gone(vitals: Vitals, now: float) -> bool:
    """Whether the driver's process does not exist any more; known on its own machine only."""
    if vitals.host != platform.node() or now - vitals.written < WRITTEN_S / 4:
        return False
    try:
        os.kill(vitals.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _steps(events: list[dict[str, Any]]) -> tuple[int, int]:
    """Steps taken, and to take."""
    step = steps = 0
    for event in events:
        if event["kind"] in ("step", "phase") and "steps" in event:
            step, steps = int(event["step"]), int(event["steps"])
        elif event["kind"] == "rollback":
            step = int(event["to_step"])
    return step, steps


def _tail(path: Path, size: int) -> bytes:
    """The last bytes of a file; none of one that cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size)
    except OSError:
        return b""


def _rows(text: bytes) -> list[dict[str, Any]]:
    """Whole lines of JSON objects; a torn one at either end is left out."""
    rows = []
    for line in text.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
