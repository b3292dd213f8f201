"""What is the matter with a job: a verdict, the part that it is about, why, and what to do."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from sapo_ray.api.jobs import Wire

Verdict = Literal["healthy", "waiting", "stalled", "failed", "ended"]


class Cause(Wire):
    """What went wrong first."""

    code: Annotated[str, Field(examples=["out_of_memory"])]
    """For programs: out_of_memory, disk_full, worker_died, silent, checkpoint_damaged, ... (docs/guides/trouble.md)."""
    component: Annotated[str, Field(examples=["rollout-0"])]
    """The part in which it happened."""
    text: str
    """In the words of whoever noticed it."""
    time: datetime
    """When."""
    log: str | None = None
    """The log that `lines` are from, for `/logs/{name}`."""
    lines: Annotated[list[str], Field(examples=[["torch.OutOfMemoryError: CUDA out of memory."]])]
    """The part's own last words: its last error, or its last lines if there is none."""


class ComponentState(Wire):
    """A part of a run that has work under way."""

    name: str
    """rollout-0, verifier-1, learner, storage, control plane, ..."""
    task: str
    """What it is at."""
    since: datetime
    """Since when it is at that."""
    quiet_s: float
    """Seconds since it last got on."""
    usual_s: float | None
    """What such work took lately, median; null before the first was finished."""
    stalled: bool
    """Whether that is out of proportion."""


class Diagnosis(Wire):
    """What is the matter with a job."""

    verdict: Verdict
    """healthy: it gets on. waiting: for its turn, its cluster, for being resumed, or for who takes the place of a lost
    part. stalled: it should get on and does not. failed: it ended by an error. ended: succeeded or cancelled."""
    component: str | None
    """The part that the verdict is about; null where there is nothing to name."""
    summary: str
    """The verdict in a sentence."""
    since: datetime
    """Since when it is so."""
    remedy: str
    """What to do; empty where there is nothing to be done."""
    cause: Cause | None = None
    """What went wrong first; null where nothing did."""
    components: list[ComponentState]
    """Parts with work under way, as their driver saw them last; those that stall first."""
    notes: list[str]
    """Conditions that are worth knowing beside the verdict."""
