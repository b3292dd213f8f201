"""What a run writes down as it goes: metrics, samples, logs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from starlette.concurrency import run_in_threadpool

from sapo_ray.api.jobs import Wire
from sapo_ray.control import views
from sapo_ray.control.access import Reader
from sapo_ray.control.body import LARGEST, read_cursor, write_cursor
from sapo_ray.control.documents import headers, keyed
from sapo_ray.control.files import list_below, open_below
from sapo_ray.control.lines import read_rows
from sapo_ray.control.service import JobId, The, find, peek, respond
from sapo_ray.control.store import attempts

router = APIRouter(prefix="/v1/jobs", tags=["watch"])

DRIVER = "driver-"
"""Logs that come from the cluster: what the driver of an attempt printed."""


class RowPage(views.Page):
    """Rows as the run wrote them."""

    data: list[dict[str, Any]]
    """The rows of this page."""


class LogFile(Wire):
    """A log."""

    name: str
    """For reading it."""
    bytes: int | None
    """Its size now; null for a driver's output, which the cluster keeps."""
    modified_at: datetime | None
    """When it was last written to."""


class LogList(views.Page):
    """Logs of a job."""

    data: list[LogFile]
    """Logs of all actors, and the output of each attempt's driver."""


After = Annotated[str | None, Query(description="`next` of the page before.")]


@router.get(
    "/{job_id:segment}/metrics",
    operation_id="list_metrics",
    summary="Metrics, a row per step",
    response_model=RowPage,
    responses=keyed(400, 404),
)
def list_metrics(
    caller: Reader,
    control: The,
    job_id: JobId,
    from_step: Annotated[int, Query(ge=0, le=LARGEST, description="Only this step and later ones.")] = 0,
    names: Annotated[
        str | None,
        Query(description="Only these metrics, separated by commas; `step` always.", examples=["reward/mean,loss"]),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Most rows of a page.")] = 1000,
    after: After = None,
) -> Response:
    """docs/metrics.md says what each one means."""
    chosen = {name.strip() for name in names.split(",")} | {"step"} if names is not None else None

    def wanted(row: dict[str, Any]) -> bool:
        step = row.get("step")
        return isinstance(step, int) and step >= from_step

    run_dir = FilePath(peek(control, caller, job_id).run_dir)
    page = _page(run_dir, "metrics.jsonl", after, limit, wanted)
    if chosen is not None:
        page.data = [{name: value for name, value in row.items() if name in chosen} for row in page.data]
    return respond(page)


@router.get(
    "/{job_id:segment}/samples",
    operation_id="list_samples",
    summary="Sampled completions with their verdicts",
    response_model=RowPage,
    responses=keyed(400, 404),
)
def list_samples(
    caller: Reader,
    control: The,
    job_id: JobId,
    step: Annotated[int | None, Query(ge=0, le=LARGEST, description="Only of this step.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most rows of a page.")] = 100,
    after: After = None,
) -> Response:
    """A few groups of each step (`logging.sample_groups`): prompt, completion, verdict, reward."""
    run_dir = FilePath(peek(control, caller, job_id).run_dir)
    return respond(_page(run_dir, "samples.jsonl", after, limit, lambda row: step is None or row.get("step") == step))


def _page(
    run_dir: FilePath, name: str, after: str | None, limit: int, wanted: Callable[[dict[str, Any]], bool]
) -> RowPage:
    offset = 0 if after is None else read_cursor(name, after)
    rows = read_rows(run_dir, name, offset=offset, limit=limit, wanted=wanted)
    more = rows.next is not None
    return RowPage(data=rows.data, has_more=more, next=write_cursor(name, rows.next) if rows.next is not None else None)


@router.get(
    "/{job_id:segment}/logs",
    operation_id="list_logs",
    summary="Logs of a job",
    response_model=LogList,
    responses=keyed(404),
)
def list_logs(caller: Reader, control: The, job_id: JobId) -> Response:
    """One log per actor, and per attempt what its driver printed."""
    with control.store.read() as session:
        row = find(session, caller, job_id)
        numbers = [attempt.number for attempt in attempts.list_attempts(session, job_id)]
    found = list_below(FilePath(row.run_dir) / "logs")
    data = [LogFile(name=one.path, bytes=one.bytes, modified_at=views.as_time(one.modified)) for one in found]
    data += [LogFile(name=f"{DRIVER}{number}", bytes=None, modified_at=None) for number in numbers]
    return respond(LogList(data=data))


@router.get(
    "/{job_id:segment}/logs/{name:path}",
    operation_id="read_log",
    summary="Part of a log",
    response_class=Response,
    responses={
        200: {
            "description": "The bytes, as they were written.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
            "headers": headers(X_Next_Offset="Offset of what follows; ask again with it to go on."),
        },
        **keyed(404),
    },
)
async def read_log(
    caller: Reader,
    control: The,
    job_id: JobId,
    name: Annotated[str, Path(description="Name as listed.", examples=["rollout-0.log"])],
    offset: Annotated[
        int, Query(ge=-LARGEST, le=LARGEST, description="First byte; negative: so many bytes before the end.")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=16 << 20, description="Most bytes.")] = 1 << 20,
) -> Response:
    """The output of a driver (`driver-<attempt>`) is asked of the cluster; 503 where that does not answer."""
    row = await run_in_threadpool(peek, control, caller, job_id)
    number = name.removeprefix(DRIVER)
    if name.startswith(DRIVER) and number.isascii() and number.isdigit() and 1 <= int(number[:9]) <= row.attempt:
        logs = control.launcher.logs
        text = (await control.rooms.cluster.run(logs, f"sapo-{row.id}-{int(number)}")).encode()
        start = _start(offset, len(text))
        data = text[start : start + limit]
    else:
        start, data = await run_in_threadpool(_part, FilePath(row.run_dir) / "logs", name, offset, limit)
    headers = {"X-Next-Offset": str(start + len(data))}
    return Response(data, headers=headers, media_type="text/plain")


def _part(folder: FilePath, name: str, offset: int, limit: int) -> tuple[int, bytes]:
    """Where the part begins, and its bytes."""
    with open_below(folder, name) as file:
        start = _start(offset, file.seek(0, 2))
        file.seek(start)
        return start, file.read(limit)


def _start(offset: int, size: int) -> int:
    return min(offset, size) if offset >= 0 else max(0, size + offset)
