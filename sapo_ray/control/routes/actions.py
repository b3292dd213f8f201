"""Pause, resume, cancel, checkpoint: what is wanted of a job. The reconciler and the driver bring it about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from sqlalchemy.orm import Session

from sapo_ray.api.jobs import Job
from sapo_ray.control import body
from sapo_ray.control.access import Caller, Submitter
from sapo_ray.control.actions import Action, Change, decide
from sapo_ray.control.documents import MADE, keyed
from sapo_ray.control.service import Answer, Control, IdempotencyKey, IfMatch, JobId, The, find, job_answer, once
from sapo_ray.control.store import JobRow, events, jobs

router = APIRouter(prefix="/v1/jobs", tags=["control"])


def _route(action: Action, summary: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return router.post(
        f"/{{job_id:segment}}:{action}",
        operation_id=f"{action}_job",
        summary=summary,
        status_code=202,
        response_model=Job,
        responses={
            202: {"description": "The job; its state tells when it has happened.", "headers": MADE},
            **keyed(400, 404, 409, 412),
        },
    )


@_route("pause", "Hold a job without resources")
def pause(caller: Submitter, control: The, job_id: JobId, key: IdempotencyKey, expected: IfMatch) -> Response:
    """The step under way is finished, a checkpoint made, all actors ended; then the job is `paused`."""
    return _act(control, caller, job_id, "pause", key, expected)


@_route("resume", "Queue a paused job again")
def resume(caller: Submitter, control: The, job_id: JobId, key: IdempotencyKey, expected: IfMatch) -> Response:
    """It goes on from its checkpoint, exactly where it was."""
    return _act(control, caller, job_id, "resume", key, expected)


@_route("cancel", "End a job")
def cancel(
    caller: Submitter,
    control: The,
    job_id: JobId,
    key: IdempotencyKey,
    expected: IfMatch,
    discard: Annotated[
        bool, Query(description="Delete checkpoints and export too, rather than export the model.")
    ] = False,
) -> Response:
    """The newest weights are exported first, unless they are to be discarded."""
    return _act(control, caller, job_id, "cancel", key, expected, discard=discard)


@_route("checkpoint", "Make a checkpoint soon")
def checkpoint(caller: Submitter, control: The, job_id: JobId, key: IdempotencyKey, expected: IfMatch) -> Response:
    """It is made after the step under way; a `checkpoint` event tells."""
    return _act(control, caller, job_id, "checkpoint", key, expected)


def _act(
    control: Control,
    caller: Caller,
    job_id: str,
    action: Action,
    key: str | None,
    expected: str | None,
    *,
    discard: bool = False,
) -> Response:
    def work(session: Session) -> Answer:
        row = find(session, caller, job_id, lock=True)
        body.check_match(expected, row.generation)
        _carry_out(session, row, action, decide(action, row.state), discard=discard)
        session.flush()
        return job_answer(session, row, 202)

    return once(control, caller, key, ("POST", f"/v1/jobs/{job_id}:{action}", discard), work)


def _carry_out(session: Session, row: JobRow, action: Action, change: Change, *, discard: bool) -> None:
    more_discarded = discard and action == "cancel" and not row.discard
    if change.nothing and not more_discarded:
        return
    if change.desired is not None:
        row.desired_state = change.desired
    if more_discarded:
        row.discard = True
        events.append_control_event(session, row, "request", action="discard")
    if change.checkpoint:
        row.checkpoint_request += 1
        events.append_control_event(session, row, "request", action="checkpoint")
    if change.state is not None and change.state != row.state:
        jobs.set_state(session, row, change.state, change.reason, allowed={row.state})
    jobs.bump(row)
