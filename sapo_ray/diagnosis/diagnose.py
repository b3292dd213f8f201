"""From what is known of a job to what is the matter with it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapo_ray.api.diagnosis import ComponentState, Diagnosis, Verdict
from sapo_ray.diagnosis.causes import CLUSTER, STORAGE, component_of, kind_by
from sapo_ray.diagnosis.first_cause import VAGUE, Event, Log, cause, first_cause
from sapo_ray.diagnosis.vitals import DRIVER, WRITTEN_S, Component, Vitals, as_time, loop, names, replacements, stalls

FULL_BYTES = 32 << 20
"""A disk with less free than this is full."""
LAUNCH_S = 60.0
"""A driver that was launched reports within this, as a rule."""
HELD = {
    "DiskFull": STORAGE,
    "LauncherUnavailable": CLUSTER,
    "RunDirUnavailable": STORAGE,
}
"""Conditions that keep a job from getting on, and whose they are."""
REMEDIES = {
    "rollout": "look at its log and its machine; it is replaced by itself once it misses its heartbeat or its deadline "
    "(rollout.group_deadline_s)",
    "verifier": "a slow reward function shows like this: time it, lower verifier.deadline_s, or raise "
    "verifier.processes; a verifier that is stopped is replaced by itself within a minute",
    "learner": "look at its log and its machine; after learner deadlines (deadlines.step_s, deadlines.publish_s) the "
    "run goes on from its last checkpoint",
    STORAGE: "look at the file system of the run directory: is it full, slow, or gone?",
    "checkpoint": "look at the file system of the run directory: is it full, slow, or gone?",
    DRIVER: "look at driver.log and the head node; a service replaces a driver that is silent for a minute, otherwise "
    "end it and `sapo-ray resume` the run",
    "control plane": "see that the service runs and is reached from the cluster; training goes on, its events wait in "
    "the journal",
    CLUSTER: "add machines, end other jobs, or ask for less: rollout.workers, rollout.min_workers, learner.ranks; the "
    "run goes on by itself once there is room, and gives up after deadlines.start_s",
    "model": "look at driver.log: a model or data set may be on its way from the Hub",
}
LEARNER_LOST = "LearnerLost"
"""Condition while a new learner goes back to the newest checkpoint."""
HOLDS = (
    "free some space on the run's disk, at least checkpoint.min_free_gb and a checkpoint's size: a run at work holds "
    "and goes on by itself within half a minute; or cancel it, which keeps the newest checkpoint"
)
"""To do where a disk is full and the driver lives."""
GOES_ON_WITHOUT = frozenset({"control plane"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Everything that a diagnosis is made of. Times are Unix seconds."""

    now: float
    state: str
    """Of the job, or `interrupted` for a run without a service."""
    reason: str
    since: float
    attempt: int
    step: int
    steps: int
    conditions: Sequence[Mapping[str, Any]]
    """That hold now: type, reason, since."""
    events: Sequence[Event]
    """The newest ones, oldest first: time, attempt, kind, and the kind's fields."""
    vitals: Vitals | None
    log: Log
    position: int | None = None
    last_heard: float | None = None
    """When the service heard of the driver; None where there is no service, or it never did."""
    free: int | None = None
    """Bytes free on the disk of the run directory; None where it cannot be asked."""
    served: bool = False
    """Whether a service looks after the job."""


def diagnose(known: Evidence) -> Diagnosis:
    """What is the matter."""
    match known.state:
        case "succeeded" | "cancelled":
            return _verdict(known, "ended", None, f"{known.state}: {known.reason}", known.since)
        case "failed" | "interrupted":
            return _failed(known)
        case "queued" | "paused":
            return _waiting(known)
        case "recovering":
            return _recovering(known)
    return _live(known)


def _failed(known: Evidence) -> Diagnosis:
    first = first_cause(known.events, known.reason, known.since, known.attempt, known.log)
    if _is_full(known) and first.code in VAGUE:  # what cannot be written cannot be told either
        first = first.model_copy(update={"code": "disk_full", "component": STORAGE})
    summary = f"{known.state}{_step(known)}; it began with {first.component}: {_line(first.text)}"
    remedy = kind_by(first.code).remedy
    return _verdict(known, "failed", first.component, summary, known.since, remedy).model_copy(update={"cause": first})


def _waiting(known: Evidence) -> Diagnosis:
    if held := _held(known):
        return held
    if known.state == "paused":
        remedy = "resume it when it is to go on"
        return _verdict(known, "waiting", None, f"paused: {known.reason}", known.since, remedy)
    place = "" if known.position is None else f", place {known.position} in its tenant's queue"
    remedy = "it starts by itself; a higher priority goes first, and ending another job makes room"
    return _verdict(known, "waiting", "queue", f"queued{place}: {known.reason}", known.since, remedy)


def _recovering(known: Evidence) -> Diagnosis:
    first = first_cause(known.events, known.reason, known.since, known.attempt, known.log)
    summary = f"a new driver is on its way; attempt {known.attempt} ended with {first.component}: {_line(first.text)}"
    remedy = f"nothing if it happens once; else {kind_by(first.code).remedy}"
    return _verdict(known, "waiting", first.component, summary, known.since, remedy).model_copy(update={"cause": first})


def _live(known: Evidence) -> Diagnosis:
    """A job that has a driver, or is about to."""
    vitals = known.vitals if known.vitals is not None and known.vitals.attempt == known.attempt else None
    if held := _held(known):
        return held
    if vitals is None:
        return _not_begun(known)
    if not vitals.ended and known.now - vitals.written > WRITTEN_S:
        return _silent(known, vitals)
    if found := stalls(vitals, known.now):
        at = min(known.now, vitals.written)
        return _stalled(known, found, at)
    if lost := _replaced(known, vitals):
        return lost
    summary = f"{known.state}{_step(known)}, phase {vitals.phase}"
    if busy := names(vitals.components):
        summary += f"; at work: {busy}"
    return _verdict(known, "healthy", None, summary, known.since)


def _stalled(known: Evidence, found: Sequence[Component], at: float) -> Diagnosis:
    first = found[0]
    since = max(first.since, first.progress)
    summary = f"{names(found)}: {first.story(at)}"
    if first.name in GOES_ON_WITHOUT:
        summary = f"{first.name} does not take events since {at - first.since:.0f} s; training goes on without it"
    answer = _verdict(known, "stalled", first.name, summary, since, _remedy(first.name))
    own = cause(first.name, first.story(at), since, known.log)
    return answer.model_copy(update={"cause": own.model_copy(update={"code": "silent"})})


def _replaced(known: Evidence, vitals: Vitals) -> Diagnosis | None:
    """A part that was lost, while another comes in its place."""
    if condition := next((one for one in known.conditions if one["type"] == LEARNER_LOST), None):
        text, since, lost = str(condition["reason"]), _since(condition, known), "learner"
        coming = "a new learner goes on from the newest checkpoint"
    elif found := replacements(vitals):
        text, since, lost = found[0].after, found[0].since, found[0].name
        coming = f"{names(found)} is starting in its place"
    else:
        return None
    first = cause(component_of(text, lost), text, since, known.log)
    summary = f"{first.component} was lost {known.now - since:.0f} s ago: {_line(text)}; {coming}"
    remedy = f"nothing if it happens once; else {kind_by(first.code).remedy}"
    return _verdict(known, "waiting", first.component, summary, since, remedy).model_copy(update={"cause": first})


def _silent(known: Evidence, vitals: Vitals) -> Diagnosis:
    """Nobody writes the record any more: the driver, unless it is heard all the same."""
    heard = known.last_heard or 0.0
    if heard > vitals.written + WRITTEN_S:
        summary = f"the driver reports, but has not written to its run directory for {known.now - vitals.written:.0f} s"
        return _verdict(known, "stalled", STORAGE, summary, vitals.written, REMEDIES[STORAGE])
    return _stalled(known, [loop(vitals, known.now)], known.now)


def _not_begun(known: Evidence) -> Diagnosis:
    """A driver that has written nothing yet."""
    waited = known.now - known.since
    summary = f"{known.state}: {known.reason}; its driver has not begun for {waited:.0f} s"
    if waited <= LAUNCH_S:
        return _verdict(known, "healthy", None, summary, known.since)
    if not known.served:
        return _verdict(known, "stalled", DRIVER, summary, known.since, REMEDIES[DRIVER])
    remedy = "see whether the cluster has room for the driver, and its log (driver-<attempt>)"
    return _verdict(known, "stalled", CLUSTER, summary, known.since, remedy)


def _held(known: Evidence) -> Diagnosis | None:
    """A disk or a condition that keeps the job from getting on."""
    if _is_full(known) and known.state not in ("queued", "paused"):
        summary = f"the disk of the run directory is full: {(known.free or 0) / 1e6:.0f} MB are free"
        return _verdict(known, "stalled", STORAGE, summary, known.since, HOLDS)
    for condition in known.conditions:
        component = HELD.get(str(condition["type"]))
        if component is not None:
            verdict: Verdict = "waiting" if known.state == "queued" else "stalled"
            summary = f"{condition['type']}: {condition['reason']}"
            remedy = HOLDS if condition["type"] == "DiskFull" else _held_remedy(component)
            return _verdict(known, verdict, component, summary, _since(condition, known), remedy)
    return None


def _is_full(known: Evidence) -> bool:
    return known.free is not None and known.free < FULL_BYTES


def _held_remedy(component: str) -> str:
    return kind_by("unreachable_cluster").remedy if component == CLUSTER else REMEDIES[component]


def _verdict(
    known: Evidence, verdict: Verdict, component: str | None, summary: str, since: float, remedy: str = ""
) -> Diagnosis:
    notes = [
        f"{one['type']}: {one['reason']}"
        for one in known.conditions
        if str(one["type"]) not in (*HELD, "Stalled", LEARNER_LOST)
    ]
    return Diagnosis(
        verdict=verdict,
        component=component,
        summary=summary,
        since=as_time(since),
        remedy=remedy,
        components=_components(known),
        notes=notes,
    )


def _components(known: Evidence) -> list[ComponentState]:
    vitals = known.vitals
    if vitals is None or vitals.ended or vitals.attempt != known.attempt:
        return []
    at = min(known.now, vitals.written)
    shown = [
        ComponentState(
            name=one.name,
            task=one.task,
            since=as_time(one.since),
            quiet_s=round(one.quiet(at), 1),
            usual_s=one.usual,
            stalled=one.stalled(at),
        )
        for one in vitals.components
    ]
    return sorted(shown, key=lambda one: (not one.stalled, -one.quiet_s))


def _remedy(component: str) -> str:
    return REMEDIES.get(component) or next(
        (text for name, text in REMEDIES.items() if component.startswith(name)), REMEDIES[DRIVER]
    )


def _step(known: Evidence) -> str:
    return f", step {known.step} of {known.steps}" if known.steps else ""


def _since(condition: Mapping[str, Any], known: Evidence) -> float:
    value = condition.get("since")
    return float(value) if isinstance(value, int | float) else known.since


def _line(text: str) -> str:
    """The first line of an error that may have a whole traceback."""
    return text.strip().partition("\n")[0][:300]
