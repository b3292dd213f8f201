"""What an event of a driver does to its job. Pure: no database, no clock.

A driver says where *it* is; what that means for the job depends on what the job is at. Rows: the job's state; columns:
the state in the driver's `transition`. A dot: the event is kept, the job stays as it is.

| job        | starting | running | paused | cancelled  | interrupted | failed    | succeeded |
|------------|----------|---------|--------|------------|-------------|-----------|-----------|
| queued     | .        | .       | .      | .          | .           | .         | succeeded |
| starting   | .        | running | paused | recovering | recovering  | failed    | succeeded |
| running    | .        | .       | paused | recovering | recovering  | failed    | succeeded |
| pausing    | .        | .       | paused | recovering | recovering  | failed    | succeeded |
| recovering | starting | running | paused | .          | .           | failed    | succeeded |
| paused     | .        | .       | .      | .          | .           | .         | succeeded |
| cancelling | .        | .       | .      | cancelled  | .           | cancelled | succeeded |
| terminal   | .        | .       | .      | .          | .           | .         | .         |

Why:

- Only events of the newest attempt get here (`events.ingest`). They may be late: a driver may have been given up while
  its last words were on their way. That is why `succeeded` counts in any state: all steps were taken, the result is
  there, another attempt would only repeat it.
- `queued` and `paused` have no driver. What else a late driver says of its end does not matter: the checkpoint stands.
- `pausing` and `cancelling` outlive a new driver's `starting` and `running`: the user's wish stands, and the driver
  hears of it with its first reply. For the same reason a driver that starts while the job is recovering with a pause
  asked for makes it `pausing`.
- `interrupted` and a `cancelled` that nobody asked for: the attempt has ended, the job has not. The reconciler decides
  what is next (state `recovering`). A job that is cancelling stays so, and the reconciler completes it; likewise one
  whose driver had paused before it heard of the cancelling.
- A driver that fails while it is cancelled has ended, which is what was asked for: `cancelled`, the failure as reason.
  A job that had succeeded before its driver heard of the cancelling has succeeded, unless everything was to be
  discarded: then it is `cancelled`, for its export will not stay.
- `paused` counts while pausing, and also where the wish was withdrawn meanwhile: the driver is gone all the same. A
  paused job with `desired_state` run is the reconciler's to queue again.
- A `step` taken after the job was given up (`recovering`) shows that the driver lives: running again.
- A terminal job does not change any more, in nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sapo_ray.api.jobs import TERMINAL
from sapo_ray.control.store.tables import JobRow

ENDS = {"paused": "paused", "cancelled": "recovering", "interrupted": "recovering", "failed": "failed"}
TRANSITIONS: dict[str, dict[str, str]] = {
    "queued": {},
    "starting": ENDS | {"running": "running"},
    "running": ENDS,
    "pausing": ENDS,
    "recovering": {"starting": "starting", "running": "running", "paused": "paused", "failed": "failed"},
    "paused": {},
    "cancelling": {"cancelled": "cancelled", "failed": "cancelled"},
}
"""The table above, without its last column."""

VERSION = re.compile(r"[0-9]{1,10}\.[0-9]{1,10}(\.[0-9]{1,10})?")
MAX_REASON = 2000
MAX_CONDITIONS = 32
MAX_INT = 2**31 - 1
WORKERS = ("wanted", "ready", "starting", "pending", "draining", "given_up")
OF_WORKERS = {"ScaleInProgress", "NoCapacity", "BelowTarget", "BelowMinimum"}
"""Conditions about a driver's rollout workers."""
DISK_FULL = "DiskFull"
"""Condition of a run that holds."""
OF_DRIVER = {"Stalled", "LearnerLost", DISK_FULL, "Throttled", "Mismatch", "RatioOutOfRange", "RewardCollapse"} | {
    "VerifierErrors",
    "StaleDrops",
}
"""Others that the driver which said them takes back; one that was killed cannot, and its successor says its own."""
SUMMARY_METRICS = {
    "reward": "reward/mean",
    "tokens_per_second": "rollout/tokens_per_second",
    "staleness": "age/sample_mean",
    "verifier_error_rate": "verifier/error_rate",
}
"""Where a step's metrics hold what the job's summary shows."""


class Transition(NamedTuple):
    """A change of a job's state."""

    state: str
    previous: str
    reason: str


def enter(row: JobRow, state: str, reason: str, at: float) -> Transition:
    """Put a job into a state. `at` in Unix seconds; never before the state that it leaves."""
    change = Transition(state=state, previous=row.state, reason=reason[:MAX_REASON])
    row.state, row.reason = change.state, change.reason
    row.since = max(row.since, at)
    if state == "starting" and row.started_at is None:
        row.started_at = row.since
    if state in TERMINAL:
        row.finished_at = row.since
    return change


def apply(row: JobRow, event: Mapping[str, Any], *, at: float) -> Transition | None:
    """Change the job by one event of its newest attempt. `at`: when it happened, Unix seconds, not in the future.

    Takes any event without raising: a field that is missing or of the wrong type changes nothing. Returns the change of
    state, if there is one.
    """
    if row.state in TERMINAL:
        return None
    match event.get("kind"):
        case "transition":
            return _transition(row, event, at)
        case "step":
            return _step(row, event, at)
        case "evaluation":
            _evaluation(row, event)
        case "condition":
            return _condition(row, event, at)
        case "workers":
            _workers(row, event)
        case "rollback":
            row.step = _count(event.get("to_step"), row.step)
            row.summary = row.summary | {"version": _version(row, event)}
    return None


def target(row: JobRow, said: str) -> str | None:
    """The state into which a driver's `transition` brings the job; None if it stays as it is."""
    if row.state in TERMINAL:
        return None
    if said == "succeeded":
        return "cancelled" if row.state == "cancelling" and row.discard else "succeeded"
    state = TRANSITIONS[row.state].get(said)
    if row.state == "recovering" and state in ("starting", "running") and row.desired_state == "pause":
        return "pausing"
    return state


def _transition(row: JobRow, event: Mapping[str, Any], at: float) -> Transition | None:
    said = event.get("state")
    if not isinstance(said, str):
        return None
    if said in ("starting", "succeeded", *ENDS):
        _forget(row, said)
    state = target(row, said)
    if state is None:
        return None
    if state in TERMINAL and isinstance(event.get("result"), dict):
        row.result = event["result"]
    return enter(row, state, _reason(event, said, state), at)


def _forget(row: JobRow, said: str) -> None:
    """Drop what was true of a driver's workers, which are no more, and at the start of another all it said."""
    gone = OF_WORKERS | (OF_DRIVER | {"Advice"} if said == "starting" else set())
    row.conditions = [condition for condition in row.conditions if condition["type"] not in gone]
    row.summary = {name: value for name, value in row.summary.items() if name != "observed_workers"}


def _workers(row: JobRow, event: Mapping[str, Any]) -> None:
    row.summary = row.summary | {
        "observed_workers": {name: _count(event.get(name), 0) for name in WORKERS},
        "workers": _count(event.get("ready"), 0),
    }


def _reason(event: Mapping[str, Any], said: str, state: str) -> str:
    given = event.get("reason")
    words = given if isinstance(given, str) and given else f"the driver is {said}"
    if state == "cancelled" and said == "failed":
        return f"failed while it was being cancelled: {words}"
    if state == "cancelled" and said == "succeeded":
        return "all steps were taken before the driver heard of the cancelling; discarded as asked"
    if state == "recovering" and said == "cancelled":
        return "the driver ended as cancelled, which nobody had asked for"
    return words


def _step(row: JobRow, event: Mapping[str, Any], at: float) -> Transition | None:
    row.step = _count(event.get("step"), row.step)
    row.steps = _count(event.get("steps"), row.steps)
    metrics = event.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    found = {name: _number(metrics.get(metric)) for name, metric in SUMMARY_METRICS.items()}
    workers = _number(metrics.get("rollout/workers"))
    found["workers"] = None if workers is None else int(workers)
    news = {name: value for name, value in found.items() if value is not None}
    row.summary = row.summary | news | {"version": _version(row, event)}
    if row.state == "recovering" and at > row.since:
        state = "pausing" if row.desired_state == "pause" else "running"
        return enter(row, state, f"the driver was heard again at step {row.step}", at)
    return None


def _version(row: JobRow, event: Mapping[str, Any]) -> str:
    """Of the weights; drivers of before it was in their events never restored any within an attempt."""
    said = event.get("version")
    return said if isinstance(said, str) and VERSION.fullmatch(said) else f"{row.attempt}.{row.step}"


def _evaluation(row: JobRow, event: Mapping[str, Any]) -> None:
    greedy = event.get("greedy")
    accuracy = _number(greedy.get("mean")) if isinstance(greedy, Mapping) else None
    if accuracy is not None:
        before = {"accuracy_before": accuracy} if event.get("step") == 0 else {}
        row.summary = row.summary | before | {"accuracy": accuracy}


def _condition(row: JobRow, event: Mapping[str, Any], at: float) -> Transition | None:
    """Newest of each type; of advice, each piece. `cleared: true` takes one away.

    A driver that was to pause and held for a full disk begins to do so when there is room: so does its time for it.
    """
    type = event.get("condition")
    if not isinstance(type, str) or not type:
        return None
    details = {key: value for key, value in event.items() if key not in ("time", "attempt", "seq", "kind", "condition")}
    given = details.pop("reason", None)
    words = [given] if isinstance(given, str) and given else []
    words += [f"{key} {_words(value)}" for key, value in details.items() if key not in ("step", "cleared")]
    new = {
        "type": type[:MAX_REASON],
        "reason": "; ".join(words)[:MAX_REASON],
        "since": at,
        "step": _count(event.get("step"), row.step),
    }
    replaced = ("type", "reason") if type == "Advice" else ("type",)
    others = [old for old in row.conditions if any(old[key] != new[key] for key in replaced)]
    cleared, stood = details.get("cleared") is True, len(others) < len(row.conditions)
    row.conditions = others if cleared else [*others, new][-MAX_CONDITIONS:]
    if cleared and stood and type == DISK_FULL and row.state == "pausing":
        return enter(row, "pausing", "there is room on the disk again: the pause goes on", at)
    return None


def _words(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(value: Any, otherwise: int) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT
    return value if whole else otherwise


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return number if math.isfinite(number) else None
