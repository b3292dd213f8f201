"""What all routes share, and what most of them do: find a job of the caller, answer, repeat an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import structlog
from fastapi import Depends, Path, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from sapo_ray.api.jobs import Job
from sapo_ray.control import body, paths, views
from sapo_ray.control.access import Caller, Gate
from sapo_ray.control.disk import DataDisk
from sapo_ray.control.launcher import Launcher
from sapo_ray.control.problems import Refused, not_found
from sapo_ray.control.rooms import Rooms
from sapo_ray.control.settings import Settings
from sapo_ray.control.store import JobRow, Store, idempotency, jobs
from sapo_ray.control.telemetry import Telemetry
from sapo_ray.control.watch import Watcher


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """The parts of one application; `app.state.control`."""

    settings: Settings
    store: Store
    launcher: Launcher
    disk: DataDisk
    gate: Gate
    watcher: Watcher
    telemetry: Telemetry
    rooms: Rooms = field(default_factory=Rooms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer that can be kept and given again."""

    status: int
    content: BaseModel
    headers: dict[str, str]


async def _control(request: Request) -> Control:  # async, as all that only looks: a `def` is sent to another thread
    control: Control = request.app.state.control
    return control


async def _bound_job(
    job_id: Annotated[
        str,
        Path(
            description="Id of the job.",
            examples=["job-2gd4q7x3zkmbw6tfh5ye"],
            json_schema_extra={"pattern": "^job-[2-7a-z]{20}$"},
        ),
    ],
) -> str:
    structlog.contextvars.bind_contextvars(job_id=job_id[:64])
    return job_id


assert paths  # imported for what it registers, before any route is made
The = Annotated[Control, Depends(_control)]
JobId = Annotated[str, Depends(_bound_job)]
IdempotencyKey = Annotated[str | None, Depends(body.idempotency_key)]
IfMatch = Annotated[str | None, Depends(body.if_match)]


def find(session: Session, caller: Caller, job_id: str, *, lock: bool = False) -> JobRow:
    """The caller's job. Raises Refused (404), whether it is another tenant's or nobody's."""
    row = jobs.get_job(session, caller.tenant, job_id, lock=lock)
    if row is None:
        raise not_found(f"job {job_id[:64]!r}")
    return row


def peek(control: Control, caller: Caller, job_id: str) -> JobRow:
    """The caller's job as it is now. Raises Refused (404)."""
    with control.store.read() as session:
        return find(session, caller, job_id)


def shown(session: Session, row: JobRow) -> Job:
    """The job with its place in the queue."""
    return views.job(row, jobs.queue_position(session, row) if row.state == "queued" else None)


def job_answer(session: Session, row: JobRow, status: int) -> Answer:
    """A job with its ETag; with 201 and 202 also where to look for it."""
    headers = {"ETag": body.etag(row.generation)}
    if status in (201, 202):
        headers["Location"] = f"/v1/jobs/{row.id}"
    return Answer(status=status, content=shown(session, row), headers=headers)


def respond(content: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A wire shape as JSON."""
    return Response(content.model_dump_json(), status, headers, media_type="application/json")


def give(answer: Answer) -> Response:
    """An answer as a response."""
    return respond(answer.content, answer.status, answer.headers)


def once(
    control: Control,
    caller: Caller,
    key: str | None,
    request: tuple[str, str, Any],
    work: Callable[[Session], Answer],
    prepare: Callable[[], None] = lambda: None,
) -> Response:
    """Do `work` in one write transaction; with an idempotency key only once, and answer alike ever after.

    Key, work and answer are committed together: a crash leaves all of them or none, so that a repetition either finds
    the answer or does the work. `prepare` checks beforehand what needs no transaction; it may raise Refused.

    Args:
        request: method, path and content of the request.
    """
    method, path, content = request
    hashed = body.digest(method, path, content)
    try:
        prepare()
    except Refused:
        # What was accepted once is answered so again, also where it would not be accepted any more.
        replay = _replay(control, caller, key, method, path, hashed)
        if replay is None:
            raise
        return replay
    with control.store.begin() as session:
        if key is not None:
            found = idempotency.claim(session, caller.tenant, key, method, path, hashed)
            if found is not None:
                return _again(found)
        answer = work(session)
        if key is not None:
            kept = {"body": answer.content.model_dump(mode="json"), "headers": answer.headers}
            idempotency.finish(session, caller.tenant, key, answer.status, kept)
        return give(answer)  # within: what cannot be written as an answer must not have been done


def _replay(control: Control, caller: Caller, key: str | None, method: str, path: str, hashed: str) -> Response | None:
    if key is None:
        return None
    with control.store.begin() as session:
        found = idempotency.claim(session, caller.tenant, key, method, path, hashed)
        if found is None:
            idempotency.abandon(session, caller.tenant, key)
    return _again(found) if found is not None else None


def _again(found: idempotency.Replay) -> Response:
    text = json.dumps(found.response["body"], ensure_ascii=False, separators=(",", ":"))
    headers = {**found.response["headers"], "Idempotent-Replayed": "true"}
    return Response(text, found.status, headers, media_type="application/json")
