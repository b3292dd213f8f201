"""Events of a job: by pages, or as they happen."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from sapo_ray.api.jobs import TERMINAL
from sapo_ray.control import views
from sapo_ray.control.access import Caller, Reader
from sapo_ray.control.body import LARGEST
from sapo_ray.control.documents import keyed
from sapo_ray.control.problems import Refused
from sapo_ray.control.service import Control, JobId, The, find, respond
from sapo_ray.control.store import events

router = APIRouter(prefix="/v1/jobs", tags=["watch"])

SEND_S = 30.0
"""A reader that takes nothing for so long is cut off; it comes back with Last-Event-ID."""
LOOK_AGAIN_S = 15.0
"""A key revoked on another replica, or expired, keeps its streams at most so long, and as long as keys are cached."""
_STREAM = """\
Events as server-sent events: `id:` is the event's id, `data:` the event as in the page. A comment comes every 15 s. The
stream ends after the last event of a job that has ended, and with its key. Reconnect with Last-Event-ID: no event is
left out, none comes twice. 204 if the job has ended and there is no further event."""


@router.get(
    "/{job_id:segment}/events",
    operation_id="list_events",
    summary="Events, as a page or as a stream",
    responses={
        200: {
            "description": f"A page. With `Accept: text/event-stream` a stream.\n\n{_STREAM}",
            "model": views.EventPage,
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "Stream only: the job has ended, and everything was sent."},
        **keyed(400, 404),
    },
)
async def list_events(
    caller: Reader,
    control: The,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, le=LARGEST, description="Only events with a larger id.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most events of a page.")] = 100,
    kind: Annotated[
        list[str] | None, Query(description="Pages only: events of this kind; may be given several times.")
    ] = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    last_event_id: Annotated[
        str | None, Header(description="Streams: the last event that was received; over `after`.", examples=["17"])
    ] = None,
) -> Response:
    """Transitions, steps, evaluations, conditions, checkpoints, workers, in the order in which they were stored."""
    if "text/event-stream" not in accept.lower():
        return await run_in_threadpool(_page, control, caller, job_id, after, limit, kind)
    position = _position(last_event_id, after)
    state, newest = await run_in_threadpool(_where, control, caller, job_id)
    if position > newest:
        raise Refused(
            400,
            "bad_cursor",
            f"Last-Event-ID {position} is beyond the newest event, {newest}",
            param="Last-Event-ID",
            hint="begin without it",
        )
    if state in TERMINAL and position == newest:
        return Response(status_code=204)
    control.watcher.admit(caller.tenant)
    return EventSourceResponse(
        _stream(control, caller, job_id, position),
        ping=control.settings.stream_heartbeat_s,
        ping_message_factory=lambda: ServerSentEvent(comment="alive", sep="\n"),
        send_timeout=SEND_S,
        sep="\n",
    )


async def _stream(control: Control, caller: Caller, job_id: str, position: int) -> AsyncIterator[ServerSentEvent]:
    """The watcher's, as long as the key is valid."""
    every_s = min(LOOK_AGAIN_S, control.settings.stream_heartbeat_s)
    with control.gate.hold(caller.key_id, every_s, lambda: control.watcher.wake(job_id)) as held:
        stream = control.watcher.stream(caller.tenant, job_id, position, lambda: held.revoked)
        async with contextlib.aclosing(stream) as told:
            async for event in told:
                yield event


def _position(last_event_id: str | None, after: int) -> int:
    if last_event_id is None or last_event_id == "":
        return after
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) <= 16):
        raise Refused(
            400,
            "bad_cursor",
            f"Last-Event-ID must be the id of an event, got {last_event_id[:40]!r}",
            param="Last-Event-ID",
            hint="send the last `id:` of the stream",
        )
    return int(last_event_id)


def _where(control: Control, caller: Caller, job_id: str) -> tuple[str, int]:
    with control.store.read() as session:
        row = find(session, caller, job_id)
        return row.state, row.next_event - 1


def _page(control: Control, caller: Caller, job_id: str, after: int, limit: int, kinds: list[str] | None) -> Response:
    with control.store.read() as session:
        find(session, caller, job_id)
        wanted = None if kinds is None else {one for one in kinds if "\0" not in one}
        rows = events.list_events(session, job_id, after, limit + 1, kinds=wanted)
    more, rows = len(rows) > limit, rows[:limit]
    data = [views.event(row) for row in rows]
    return respond(views.EventPage(data=data, has_more=more, next=str(data[-1].id) if more else None))
