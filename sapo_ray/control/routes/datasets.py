"""Data sets: upload, list, remove. In a job's spec: `path: dataset:<id>`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import AsyncIterator
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from sapo_ray.api.jobs import TERMINAL
from sapo_ray.control import confine, quotas, views
from sapo_ray.control.access import Caller, Reader, Submitter
from sapo_ray.control.documents import headers, keyed
from sapo_ray.control.problems import Refused, invalid, not_found
from sapo_ray.control.service import Answer, Control, IdempotencyKey, The, once, respond
from sapo_ray.control.store import DatasetRow, JobRow, datasets
from sapo_ray.control.uploads import Contents, Format, Received, disk, examine, receive, settle

router = APIRouter(prefix="/v1/datasets", tags=["data"])

_TYPES: dict[str, Format | None] = {
    "application/jsonl": "jsonl",
    "application/x-ndjson": "jsonl",
    "application/x-jsonlines": "jsonl",
    "application/vnd.apache.parquet": "parquet",
    "application/octet-stream": None,
}
_CHUNK = 1 << 18
MOST_READERS = 100
"""Jobs that are named when they keep a data set from being deleted."""
DatasetId = Annotated[str, Path(description="Id of the data set.", examples=["ds-2gd4q7x3zkmbw6tfh5ye"])]
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSONL or Parquet."},
                        "name": {"type": "string", "description": "Name in lists; the file's name if not given."},
                        "format": {"enum": ["jsonl", "parquet"], "description": "By the file's name if not given."},
                    },
                }
            },
            "application/jsonl": {"schema": {"type": "string", "format": "binary"}},
            "application/vnd.apache.parquet": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


@router.post(
    "",
    operation_id="upload_dataset",
    summary="Upload a data set",
    status_code=201,
    response_model=views.Dataset,
    responses={
        201: {"description": "The data set, ready to be used.", "headers": headers(Location="Where it is.")},
        **keyed(400, 409, 413, 415, 507),
    },
    openapi_extra=_BODY,
)
async def upload(
    request: Request,
    caller: Submitter,
    control: The,
    key: IdempotencyKey,
    name: Annotated[str | None, Query(description="Name in lists; for a body that is the file itself.")] = None,
    format: Annotated[
        Format | None, Query(description="For a body that is the file itself: over its Content-Type.")
    ] = None,
) -> Response:
    """As a form with a part `file`, or as a body that is the file itself. Every row is looked at: a JSONL file with a
    bad line is refused, with the line's number."""
    control.rooms.examination.check()
    folder = control.settings.datasets_dir / caller.tenant
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media == "multipart/form-data":
        with disk():
            form = await request.form(max_files=1, max_fields=4)
        try:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise invalid("the form needs a part `file` that is a file", "file")
            unknown = set(form) - {"file", "name", "format"}
            if unknown:
                raise invalid(
                    f"{min(unknown)[:60]!r} is not a part of this form: file, name, format", min(unknown)[:60]
                )
            name = name or _text(form.get("name")) or file.filename or None
            kind = _format(format or _text(form.get("format")), None, name)
            checked_name = _name(name, kind)
            received = await receive(_parts(file), folder, control.settings)
        finally:
            await form.close()
    else:
        if media not in _TYPES:
            raise Refused(
                415,
                "unsupported_media_type",
                f"the body must be a form (multipart/form-data), {', '.join(_TYPES)}; got {media[:60] or 'nothing'}",
                param="Content-Type",
            )
        kind = _format(format, _TYPES[media], name)
        checked_name = _name(name, kind)
        received = await receive(request.stream(), folder, control.settings)
    try:
        largest = control.settings.max_row_bytes
        contents = await control.rooms.examination.run(examine, received.path, kind, largest)
        return await run_in_threadpool(_keep, control, caller, key, received, contents, checked_name, kind)
    finally:
        received.path.unlink(missing_ok=True)


def _keep(
    control: Control,
    caller: Caller,
    key: str | None,
    received: Received,
    contents: Contents,
    name: str,
    kind: Format,
) -> Response:
    place = received.path.parent / f"{datasets.new_dataset_id()}.{kind}"
    settled = False

    def work(session: Session) -> Answer:
        nonlocal settled
        quotas.check_datasets(session, caller.tenant, received.bytes, control.settings)
        settle(received.path, place)
        settled = True
        row = datasets.add(
            session,
            tenant=caller.tenant,
            name=name,
            format=kind,
            rows=contents.rows,
            bytes=received.bytes,
            sha256=received.sha256,
            columns=contents.columns,
            path=place,
            id=place.stem,
        )
        return Answer(status=201, content=views.dataset(row), headers={"Location": f"/v1/datasets/{row.id}"})

    try:
        content = {"name": name, "format": kind, "sha256": received.sha256}
        return once(control, caller, key, ("POST", "/v1/datasets", content), work)
    except BaseException:
        if settled:
            place.unlink(missing_ok=True)
        raise


@router.get(
    "",
    operation_id="list_datasets",
    summary="List data sets",
    response_model=views.DatasetPage,
    responses=keyed(400),
)
def list_datasets(
    caller: Reader,
    control: The,
    limit: Annotated[int, Query(ge=1, le=500, description="Most data sets of a page.")] = 100,
    after: Annotated[str | None, Query(description="`next` of the page before.")] = None,
) -> Response:
    """The tenant's, newest first."""
    with control.store.read() as session:
        rows = datasets.list_datasets(session, caller.tenant, after=after, limit=limit + 1)
    more, rows = len(rows) > limit, rows[:limit]
    page = views.DatasetPage(
        data=[views.dataset(row) for row in rows], has_more=more, next=rows[-1].id if more else None
    )
    return respond(page)


@router.get(
    "/{dataset_id}",
    operation_id="get_dataset",
    summary="One data set",
    response_model=views.Dataset,
    responses=keyed(404),
)
def get_dataset(caller: Reader, control: The, dataset_id: DatasetId) -> Response:
    """What is in it; the file itself is not given out."""
    with control.store.read() as session:
        return respond(views.dataset(_find(session, caller, dataset_id)))


@router.delete(
    "/{dataset_id}",
    operation_id="delete_dataset",
    summary="Remove a data set",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "It is gone."}, **keyed(404, 409)},
)
def delete_dataset(caller: Submitter, control: The, dataset_id: DatasetId) -> Response:
    """Refused while a job that has not ended reads it."""
    with control.store.begin() as session:
        row = _find(session, caller, dataset_id, lock=True)
        going = select(JobRow.id, JobRow.spec).where(
            JobRow.tenant == caller.tenant, JobRow.state.not_in(sorted(TERMINAL))
        )
        readers = [id for id, spec in session.execute(going) if dataset_id in confine.dataset_ids(spec)]
        if readers:
            who = f"job {readers[0]} reads" if len(readers) == 1 else f"{len(readers)} jobs, {readers[0]} first, read"
            raise Refused(
                409,
                "illegal_transition",
                f"{who} this data set and {'has' if len(readers) == 1 else 'have'} not ended",
                hint="cancel what reads it first, or wait for its end",
                job_ids=readers[:MOST_READERS],
            )
        datasets.delete(session, row)
    FilePath(row.path).unlink(missing_ok=True)
    return Response(status_code=204)


def _find(session: Session, caller: Caller, dataset_id: str, *, lock: bool = False) -> DatasetRow:
    row: DatasetRow | None = datasets.get(session, caller.tenant, dataset_id, lock=lock)
    if row is None:
        raise not_found(f"data set {dataset_id[:64]!r}")
    return row


async def _parts(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(_CHUNK):
        yield chunk


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _format(given: str | None, of_type: Format | None, name: str | None) -> Format:
    wanted = given or of_type or (name or "").rpartition(".")[2].lower()
    if wanted == "jsonl" or wanted == "parquet":
        return wanted  # type: ignore[return-value]
    raise invalid(
        f"format must be jsonl or parquet, got {wanted[:40]!r}; say it, or name the file .jsonl or .parquet", "format"
    )


def _name(name: str | None, kind: Format) -> str:
    chosen = re.split(r"[\\/]", name or f"data.{kind}")[-1]
    if not 1 <= len(chosen) <= 200 or any(unicodedata.category(one)[0] == "C" for one in chosen):
        raise invalid("name must have 1 to 200 characters, none of them a control character", "name")
    return chosen
