"""Rows of the store as the API shows them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from sapo_ray.api.jobs import (
    LIVE,
    Condition,
    Desired,
    Event,
    Job,
    JobStatus,
    ObservedWorkers,
    Scale,
    ScaleState,
    Summary,
    Wire,
)
from sapo_ray.control.store import DatasetRow, EventRow, JobRow, KeyRow


class Dataset(Wire):
    """An uploaded data set."""

    id: str
    """`ds-` and 20 characters; in a job: `dataset:<id>`."""
    name: str
    """As given at the upload."""
    format: Literal["jsonl", "parquet"]
    """Of the file."""
    rows: int
    """Rows in it."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Of the file, hexadecimal."""
    columns: list[str]
    """Names that rows have at their top level; what `prompt_field` and `answer_field` may name."""
    created_at: datetime
    """Upload."""


class ApiKey(Wire):
    """An API key without its secret."""

    id: str
    """For revoking it."""
    tenant: str
    """Whose jobs and data sets it reaches."""
    name: str
    """What it is for."""
    prefix: str
    """First characters of the secret."""
    scopes: list[Literal["read", "submit", "admin"]]
    """read: look; submit: make and change jobs and data sets; admin: both, and keys."""
    created_at: datetime
    """When it was made."""
    expires_at: datetime | None = None
    """From then on it is refused."""
    revoked_at: datetime | None = None
    """Since then it is refused."""
    last_used_at: datetime | None = None
    """Roughly."""


class NewApiKey(ApiKey):
    """A key at its birth."""

    secret: str
    """Shown this once; the service keeps a hash only."""


class Page(Wire):
    """Part of a list."""

    has_more: bool = False
    """Whether there is more after this."""
    next: str | None = None
    """Pass it as `after` to have what follows; null at the end."""


class JobPage(Page):
    """Jobs, newest first."""

    data: list[Job]
    """The jobs of this page."""


class EventPage(Page):
    """Events in the order of their ids."""

    data: list[Event]
    """The events of this page."""


class DatasetPage(Page):
    """Data sets, newest first."""

    data: list[Dataset]
    """The data sets of this page."""


class KeyList(Page):
    """API keys."""

    data: list[ApiKey]
    """All that the caller may manage."""


class Checked(Wire):
    """Answer to a dry run."""

    valid: Literal[True] = True
    """What is wrong is a problem document instead."""
    spec: Annotated[dict[str, Any], Field(json_schema_extra={"x-schema": "JobSpec"})]
    """The resolved job, every key of it."""
    scale: Scale
    """Rollout workers it would begin with."""


def as_time(seconds: float) -> datetime:
    """Unix seconds as UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def maybe_time(seconds: float | None) -> datetime | None:
    """As `as_time`, or None."""
    return None if seconds is None else as_time(seconds)


def job(row: JobRow, position: int | None = None) -> Job:
    """A job; `position` is its place in the queue while it is queued."""
    return Job(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        priority=row.priority,
        labels=dict(row.labels),
        generation=row.generation,
        created_at=as_time(row.created_at),
        updated_at=as_time(row.updated_at),
        spec=row.spec,
        desired=Desired(state=row.desired_state, discard=row.discard, scale=scale(row)),  # type: ignore[arg-type]
        status=_status(row, position),
    )


def scale(row: JobRow) -> Scale:
    """Rollout workers wanted."""
    return Scale(min=row.scale_min, max=row.scale_max, target=row.scale_target)


def scale_state(row: JobRow) -> ScaleState:
    """Rollout workers wanted, and those that there are."""
    counted = row.summary.get("observed_workers") if row.state in LIVE else None
    observed = None if counted is None else ObservedWorkers.model_validate(counted)
    return ScaleState(**scale(row).model_dump(), observed=observed)


def event(row: EventRow) -> Event:
    """One event."""
    return Event(
        id=row.id,
        time=as_time(row.time),
        source=row.source,  # type: ignore[arg-type]
        attempt=row.attempt,
        kind=row.kind,
        data=row.data,
    )


def dataset(row: DatasetRow) -> Dataset:
    """One data set."""
    return Dataset(
        id=row.id,
        name=row.name,
        format=row.format,  # type: ignore[arg-type]
        rows=row.rows,
        bytes=row.bytes,
        sha256=row.sha256,
        columns=row.columns,
        created_at=as_time(row.created_at),
    )


def key_fields(row: KeyRow) -> dict[str, Any]:
    """The fields of an ApiKey."""
    return {
        "id": row.id,
        "tenant": row.tenant,
        "name": row.name,
        "prefix": row.prefix,
        "scopes": list(row.scopes),
        "created_at": as_time(row.created_at),
        "expires_at": maybe_time(row.expires_at),
        "revoked_at": maybe_time(row.revoked_at),
        "last_used_at": maybe_time(row.last_used_at),
    }


def _status(row: JobRow, position: int | None) -> JobStatus:
    known = {name: row.summary.get(name) for name in Summary.model_fields}
    return JobStatus(
        state=row.state,  # type: ignore[arg-type]
        reason=row.reason,
        since=as_time(row.since),
        attempt=row.attempt,
        position=position,
        step=row.step,
        steps=row.steps,
        restarts=row.restarts,
        summary=Summary.model_validate(known),
        conditions=[_condition(one) for one in row.conditions],
        result=row.result,
        last_heard=maybe_time(row.last_heard),
        started_at=maybe_time(row.started_at),
        finished_at=maybe_time(row.finished_at),
    )


def _condition(stored: dict[str, Any]) -> Condition:
    since = stored["since"]
    return Condition(
        type=stored["type"],
        reason=stored["reason"],
        since=as_time(since) if isinstance(since, int | float) else since,
        step=stored.get("step"),
    )
