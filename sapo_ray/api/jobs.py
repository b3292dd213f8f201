"""A job as the API shows it: what was asked for (`spec`, `desired`) beside what was observed (`status`)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

State = Literal[
    "queued",
    "starting",
    "running",
    "pausing",
    "paused",
    "recovering",
    "cancelling",
    "cancelled",
    "succeeded",
    "failed",
]
TERMINAL: frozenset[str] = frozenset({"cancelled", "succeeded", "failed"})
"""A job in one of these does not change any more."""
LIVE: frozenset[str] = frozenset({"starting", "running", "pausing", "recovering", "cancelling"})
"""A job in one of these may have a driver."""

Labels = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$")],
        Annotated[str, Field(max_length=256)],
    ],
    Field(max_length=32, json_schema_extra={"additionalProperties": False}),
]


def _number(value: Any) -> Any:
    """JSON's true and "1" are no numbers, though Python would take them for one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("not_a_number", "a whole number is wanted")
    return value


Whole = Annotated[int, BeforeValidator(_number)]
"""A whole number in what a client sends."""


class Wire(BaseModel):
    """Base of all wire shapes: unknown keys refused, attribute docstrings become the reference."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Scale(Wire):
    """How many rollout workers a job wants."""

    min: Annotated[Whole, Field(ge=1)]
    """Fewest with which the job goes on."""
    max: Annotated[Whole, Field(ge=1, le=10_000)]
    """Most it may ever be given."""
    target: Annotated[Whole, Field(ge=1)]
    """How many it should have now; min <= target <= max."""


class ObservedWorkers(Wire):
    """Rollout workers as the driver last counted them."""

    wanted: int
    """How many it aims at: the target it heard of last, or what it chose itself (`rollout.autoscale`)."""
    ready: int
    """They sample, or are just taking newer weights over."""
    starting: int
    """Placed on a node, loading the model or taking weights over for the first time; or left behind by the others until
    they have the newest weights."""
    pending: int
    """The cluster has no room for them yet."""
    draining: int
    """Surplus: they get no new groups, finish what they have within `rollout.drain_timeout_s`, and end."""
    given_up: int
    """Lost too often to be replaced; tried again when the job is scaled to another number."""


class ScaleState(Scale):
    """How many rollout workers a job wants, and how many there are."""

    observed: ObservedWorkers | None = None
    """null while the job has no driver that counts them."""


class Desired(Wire):
    """What the user asked for last."""

    state: Literal["run", "pause", "cancel"]
    """Run to the end, hold without resources, or end."""
    discard: bool = False
    """With cancel: delete checkpoints and export too."""
    scale: Scale
    """Rollout workers."""


class Condition(Wire):
    """Something worth knowing that is true of a job beside its state."""

    type: str
    """E.g. VerifierErrors, StaleDrops, DiskFull, Advice."""
    reason: str
    """In words."""
    since: datetime
    """When it was last reported."""
    step: int | None = None
    """Step at which it was reported."""


class Summary(Wire):
    """Newest figures of a job; null where there is none yet."""

    reward: float | None = None
    """Mean training reward of the newest step."""
    accuracy_before: float | None = None
    """Greedy held-out accuracy before training, 0 to 1."""
    accuracy: float | None = None
    """Greedy held-out accuracy, newest, 0 to 1."""
    tokens_per_second: float | None = None
    """Sampled tokens per second of step time."""
    staleness: float | None = None
    """Mean age of trained samples, in policy versions."""
    verifier_error_rate: float | None = None
    """Share of gradings that ended in an error, 0 to 1."""
    workers: int | None = None
    """Rollout workers that took the newest weights over."""
    version: str | None = None
    """Newest policy version, attempt.step."""


class JobStatus(Wire):
    """What was observed."""

    state: State
    """Where the job is in its life."""
    reason: str
    """Why it is in that state, in words."""
    since: datetime
    """When it entered the state."""
    attempt: int
    """Number of the newest driver, from 1; 0 before the first."""
    position: int | None = None
    """Place in the tenant's queue, from 1; only while queued."""
    step: int
    """Steps taken."""
    steps: int
    """Steps to take."""
    restarts: int
    """Drivers replaced after a failure."""
    summary: Summary
    """Newest figures."""
    conditions: list[Condition]
    """Newest of each type."""
    result: dict[str, Any] | None = None
    """What result.json holds, once the job has ended."""
    last_heard: datetime | None = None
    """When the driver last reported."""
    started_at: datetime | None = None
    """First launch."""
    finished_at: datetime | None = None
    """End."""


class Job(Wire):
    """A training job."""

    id: str
    """`job-` and 20 characters; later jobs sort later."""
    name: str
    """The spec's name."""
    tenant: str
    """Whose job it is."""
    priority: int
    """0 to 100; higher is launched first."""
    labels: dict[str, str]
    """The user's own marks."""
    generation: int
    """Counts changes that users made; the ETag."""
    created_at: datetime
    """Submission."""
    updated_at: datetime
    """Newest change of any kind."""
    spec: Annotated[dict[str, Any], Field(json_schema_extra={"x-schema": "JobSpec"})]
    """The resolved job, every key of it."""
    desired: Desired
    """What the user asked for last."""
    status: JobStatus
    """What was observed."""


class Event(Wire):
    """Something that happened to a job. Ids are contiguous from 1 within a job."""

    id: int
    """Place in the job's events."""
    time: datetime
    """When it happened."""
    source: Literal["driver", "control"]
    """Who saw it."""
    attempt: int | None = None
    """Driver's attempt, for driver events."""
    kind: str
    """transition, phase, step, evaluation, condition, checkpoint, worker, ..."""
    data: dict[str, Any]
    """The kind's own fields."""
