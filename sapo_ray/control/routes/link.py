"""The link: drivers bring events, and take back what is wanted of their jobs."""

from __future__ import annotations

from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import ValidationError

from sapo_ray.api.link import Assignment, DriverEvents, Orders, Received
from sapo_ray.control import launch
from sapo_ray.control.body import parse_leniently
from sapo_ray.control.documents import json_body, problems
from sapo_ray.control.problems import Refused, wrong_shape
from sapo_ray.control.service import Control, JobId, The, respond
from sapo_ray.control.store import JobRow, SequenceGap, Superseded, attempts, events, jobs

log = structlog.get_logger("sapo_ray.control.link")
router = APIRouter(prefix="/v1/link", tags=["link"])

_token = HTTPBearer(
    auto_error=False, scheme_name="driver", description="Token of one attempt of one job; lies in its run directory."
)
Attempt = Annotated[int, Path(ge=1, le=2**31 - 1, description="The driver's attempt.")]
_DELIVERY = {
    "two events": {
        "first_seq": 7,
        "events": [
            {"time": 1.0, "attempt": 1, "seq": 7, "kind": "phase", "phase": "train"},
            {"time": 2.0, "attempt": 1, "seq": 8, "kind": "step", "step": 1, "steps": 60, "drops": {}, "metrics": {}},
        ],
    },
    "heartbeat": {"first_seq": 9, "events": []},
}


async def _driver(
    request: Request,
    control: The,
    job_id: JobId,
    attempt: Attempt,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_token)],
) -> tuple[str, int]:
    """The attempt that the token was made for; it must be the one in the address. Raises Refused (401)."""
    client = request.client.host if request.client else "unknown"
    with control.gate.guess(f"of drivers {client}") as known:
        found = await control.rooms.link.run(_made_for, control, credentials.credentials) if credentials else None
        known(found)
    if found != (job_id, attempt):
        control.telemetry.link_deliveries.labels("unauthenticated").inc()
        raise Refused(
            401,
            "unauthenticated",
            "the token is not this attempt's",
            headers={"WWW-Authenticate": 'Bearer realm="sapo-ray link"'},
        )
    return job_id, attempt


Driver = Annotated[tuple[str, int], Depends(_driver)]


@router.post(
    "/{job_id:segment}/{attempt}/events",
    operation_id="deliver_events",
    summary="Deliver events, hear what is wanted",
    response_model=Received,
    responses=problems(400, 401, 409, 413, 422),
    openapi_extra=json_body(DriverEvents, _DELIVERY),
)
async def deliver(request: Request, driver: Driver, control: The) -> Response:
    """Each event is stored once, however often it comes; `sequence_gap` says which comes next, `superseded` means that
    the driver must end. An empty delivery is a sign of life."""
    raw = await request.body()
    return await control.rooms.link.run(_ingest, control, driver, raw)


def _ingest(control: Control, driver: tuple[str, int], raw: bytes) -> Response:
    outcomes = control.telemetry.link_deliveries
    try:
        delivery = DriverEvents.model_validate(parse_leniently(raw))
    except ValidationError as error:
        outcomes.labels("refused").inc()
        raise wrong_shape(error.errors(include_url=False), list(DriverEvents.model_fields)) from None
    job_id, attempt = driver
    try:
        with control.store.begin() as session:
            reply = events.ingest(session, job_id, attempt, delivery.first_seq, delivery.events)
            received = Received(next_seq=reply.next_seq, orders=_orders(reply.job))
    except (Superseded, SequenceGap) as error:
        outcomes.labels(type(error).__name__.lower()).inc()
        raise
    outcomes.labels("stored" if delivery.events else "heartbeat").inc()
    if delivery.events:
        control.telemetry.link_events.inc(len(delivery.events))
        control.watcher.nudge(job_id)
    return respond(received)


@router.get(
    "/{job_id:segment}/{attempt}/assignment",
    operation_id="get_assignment",
    summary="What a driver needs to begin",
    response_model=Assignment,
    responses=problems(401, 409, 422),
)
async def assignment(driver: Driver, control: The) -> Response:
    """The job with its data sets' files, its folder, the secrets that it names, and the desired state."""
    return await control.rooms.link.run(_assigned, control, driver)


def _assigned(control: Control, driver: tuple[str, int]) -> Response:
    job_id, attempt = driver
    with control.store.read() as session:
        row = jobs.get_job(session, None, job_id)
        if row is None or row.attempt != attempt:
            raise Superseded(0 if row is None else row.attempt)
        try:
            spec, secrets = launch.what_to_run(session, row, control.settings)
        except Refused as refusal:
            if refusal.status_code >= 500:  # it cannot be told now; the driver asks again
                raise
            refused = refusal
        else:
            orders = _orders(row)
            return respond(
                Assignment(
                    job_id=job_id,
                    attempt=attempt,
                    run_dir=row.run_dir,
                    spec=spec.model_dump(mode="json"),
                    secrets=secrets,
                    orders=orders,
                )
            )
    with control.store.begin() as session:
        reason = launch.give_up(session, job_id, attempt, refused)
    log.warning("not_launched", job_id=job_id, attempt=attempt, reason=reason)
    raise Refused(409, "superseded", reason, hint="end this process; the job is not to be run as it is")


def _made_for(control: Control, token: str) -> tuple[str, int] | None:
    with control.store.read() as session:
        row = attempts.by_token(session, token)
        return None if row is None else (row.job_id, row.number)


def _orders(row: JobRow) -> Orders:
    return Orders(
        state=row.desired_state,  # type: ignore[arg-type]
        discard=row.discard,
        rollout_workers=row.scale_target,
        rollout_min=row.scale_min,
        rollout_max=row.scale_max,
        checkpoint_request=row.checkpoint_request,
        generation=row.generation,
    )
