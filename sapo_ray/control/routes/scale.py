"""Rollout workers of a job: how many are wanted, and which there are."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from pydantic import Field

from sapo_ray.api.jobs import TERMINAL, Scale, ScaleState, Wire
from sapo_ray.control import body, views
from sapo_ray.control.access import Reader, Submitter
from sapo_ray.control.documents import ETAG, changing, json_body, keyed
from sapo_ray.control.problems import illegal, invalid
from sapo_ray.control.service import IfMatch, JobId, The, find, peek, respond
from sapo_ray.control.store import events, jobs

router = APIRouter(prefix="/v1/jobs", tags=["control"])

MOST_EVENTS = 10_000
"""Newest events about workers that are read back."""


class Worker(Wire):
    """A rollout worker, as its driver last spoke of it."""

    id: str
    """Name within the job."""
    state: Annotated[str, Field(examples=["worker_ready"])]
    """What last happened to it: worker_ready, worker_lost, takeover_failed, worker_stopped, ..."""
    attempt: int | None
    """Driver that spoke of it."""
    since: datetime
    """When it happened."""
    details: dict[str, Any]
    """What else the driver said, e.g. `reason`, `version`."""


class WorkerList(views.Page):
    """Rollout workers of the newest attempt."""

    data: list[Worker]
    """By name."""


@router.get(
    "/{job_id:segment}/scale",
    operation_id="get_scale",
    summary="Rollout workers wanted and observed",
    response_model=ScaleState,
    responses={200: {"description": "How many are wanted, and how many there are.", "headers": ETAG}, **keyed(404)},
)
def get_scale(caller: Reader, control: The, job_id: JobId) -> Response:
    """What the job's user wants of it beside what its driver counts."""
    row = peek(control, caller, job_id)
    return respond(views.scale_state(row), headers={"ETag": body.etag(row.generation)})


@router.put(
    "/{job_id:segment}/scale",
    operation_id="set_scale",
    summary="Want more or fewer rollout workers",
    response_model=ScaleState,
    responses={
        200: {"description": "How many are wanted now, and how many there are.", "headers": ETAG},
        **changing(404, 409, 412),
    },
    openapi_extra=json_body(Scale, {"four": {"min": 1, "max": 8, "target": 4}}),
)
def set_scale(
    caller: Submitter,
    control: The,
    job_id: JobId,
    wanted: Annotated[Scale, Depends(body.body_of(Scale))],
    expected: IfMatch,
) -> Response:
    """min <= target <= max. The driver hears of it with its next report, a few seconds later, and adds or drains
    workers while the learner trains on. min and max also bound what `rollout.autoscale` chooses.

    Without If-Match the last one who writes wins, all three numbers at once; with it nothing that somebody else
    changed is undone (the client and the command line do so)."""
    _check(wanted)
    with control.store.begin() as session:
        row = find(session, caller, job_id, lock=True)
        body.check_match(expected, row.generation)
        if row.state in TERMINAL:
            raise illegal(row.state, "scaling", "it has ended; submit a new job")
        if views.scale(row) != wanted:
            row.scale_min, row.scale_max, row.scale_target = wanted.min, wanted.max, wanted.target
            jobs.bump(row)
            events.append_control_event(session, row, "scale", **wanted.model_dump())
        return respond(views.scale_state(row), headers={"ETag": body.etag(row.generation)})


def _check(wanted: Scale) -> None:
    if wanted.min > wanted.max:
        raise invalid(f"min must be at most max ({wanted.max}), got {wanted.min}; lower min or raise max", "min")
    if not wanted.min <= wanted.target <= wanted.max:
        bound = "min" if wanted.target < wanted.min else "max"
        raise invalid(
            f"target must be between min ({wanted.min}) and max ({wanted.max}), got {wanted.target}; change it, or "
            f"give another {bound} with it",
            "target",
        )


@router.get(
    "/{job_id:segment}/workers",
    operation_id="list_workers",
    summary="Rollout workers",
    response_model=WorkerList,
    responses=keyed(404),
)
def list_workers(caller: Reader, control: The, job_id: JobId) -> Response:
    """What the newest driver reported of each of its workers."""
    newest: dict[str, Worker] = {}
    with control.store.read() as session:
        row = find(session, caller, job_id)
        for event in events.newest_of_kind(session, job_id, row.attempt, "worker", MOST_EVENTS):
            data = dict(event.data)
            name = data.pop("worker", None)
            if name is not None and str(name) not in newest:
                newest[str(name)] = Worker(
                    id=str(name),
                    state=str(data.pop("what", "unknown")),
                    attempt=event.attempt,
                    since=views.as_time(event.time),
                    details=data,
                )
    return respond(WorkerList(data=[newest[name] for name in sorted(newest)]))
