"""Between a driver and the control plane: events up, desired state down. The driver is the client."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from sapo_ray.api.jobs import Whole, Wire

MAX_BATCH = 500
"""Events in one delivery."""


class DriverEvents(Wire):
    """Events of one attempt, contiguous from `first_seq`. An empty list is a heartbeat."""

    first_seq: Annotated[Whole, Field(ge=1)]
    """Sequence number of the first event, or of the next one to come if there is none."""
    events: Annotated[list[dict[str, Any]], Field(max_length=MAX_BATCH)]
    """As journalled: time (Unix seconds), attempt, seq, kind, and the kind's own fields."""


class FromControl(Wire):
    """What the driver reads. A newer control plane may say more than this driver knows: that is not refused."""

    model_config = ConfigDict(extra="ignore")


class Orders(FromControl):
    """What the driver should bring about."""

    state: Literal["run", "pause", "cancel"]
    """Go on, stop with a checkpoint, or end."""
    discard: bool
    """With cancel: nothing needs to be exported."""
    rollout_workers: int
    """Rollout workers wanted."""
    rollout_min: int = 1
    """Fewest with which the job goes on."""
    rollout_max: int | None = None
    """Most that it may be given; rollout_workers if null."""
    checkpoint_request: int
    """Counts requests for a checkpoint; one more than at the driver's start is one to be made."""
    generation: int
    """Of the job, for the log."""


class Received(FromControl):
    """Answer to a delivery."""

    next_seq: int
    """First sequence number not stored yet."""
    orders: Orders
    """Newest desired state."""


class Assignment(FromControl):
    """What a driver needs to begin."""

    job_id: str
    """The job."""
    attempt: int
    """This driver's attempt."""
    run_dir: str
    """Where the run lives, on storage shared with the control plane."""
    spec: dict[str, Any]
    """The resolved job."""
    secrets: dict[str, str]
    """Environment variables for this job only."""
    orders: Orders
    """Desired state at the start."""
