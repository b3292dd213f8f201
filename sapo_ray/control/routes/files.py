"""What a run made: checkpoints and the trained model."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Response

from sapo_ray.api.jobs import Wire
from sapo_ray.control import views
from sapo_ray.control.access import Reader
from sapo_ray.control.documents import file_answer, keyed
from sapo_ray.control.files import FileResponse, list_below, open_below
from sapo_ray.control.problems import Refused, not_found
from sapo_ray.control.service import JobId, The, peek, respond

router = APIRouter(prefix="/v1/jobs", tags=["files"])


class RemoteFile(Wire):
    """A file that can be fetched."""

    path: str
    """Relative, with `/`."""
    bytes: int
    """Size."""
    sha256: str | None = None
    """Checksum, hexadecimal; null for files beyond 1 GiB."""
    blake2b: str | None = None
    """Checksum of 16 bytes, hexadecimal, from a checkpoint's manifest."""


class Checkpoint(Wire):
    """A whole checkpoint."""

    name: str
    """E.g. step-000040."""
    step: int
    """Steps taken when it was made."""
    bytes: int
    """Size of all files."""
    created_at: datetime
    """When it was complete."""
    latest: bool
    """Whether a new attempt would begin with it."""
    files: list[RemoteFile]
    """What it consists of."""


class CheckpointList(views.Page):
    """Checkpoints that are kept."""

    data: list[Checkpoint]
    """Oldest first."""


class FileList(views.Page):
    """Files of a folder."""

    data: list[RemoteFile]
    """By path."""


RelativePath = Annotated[str, Path(description="Path of the file as listed.", examples=["config.json"])]
Range = Annotated[
    str | None, Header(alias="Range", description="Part of the file, `bytes=first-last`.", examples=["bytes=0-1023"])
]
IfRange = Annotated[
    str | None, Header(alias="If-Range", description="ETag; if the file has another by now, all of it is sent.")
]


@router.get(
    "/{job_id:segment}/checkpoints",
    operation_id="list_checkpoints",
    summary="Checkpoints that are kept",
    response_model=CheckpointList,
    responses=keyed(404),
)
def list_checkpoints(caller: Reader, control: The, job_id: JobId) -> Response:
    """Only whole ones; each with its files."""
    folder = FilePath(peek(control, caller, job_id).run_dir) / "checkpoints"
    latest = _read(folder, "latest").strip()
    names = {one.path.partition("/")[0] for one in list_below(folder) if one.path.endswith("/manifest.json")}
    found = [_checkpoint(folder, name, latest) for name in sorted(names)]
    return respond(CheckpointList(data=[one for one in found if one is not None]))


def _checkpoint(folder: FilePath, name: str, latest: str) -> Checkpoint | None:
    """None for what is gone or damaged by the time it is read."""
    try:
        manifest: dict[str, Any] = json.loads(_read(folder, f"{name}/manifest.json"))
        files = [
            RemoteFile(path=path, bytes=one["bytes"], blake2b=one["blake2b"])
            for path, one in sorted(manifest["files"].items())
        ]
        made = (folder / name / "manifest.json").lstat().st_mtime
        return Checkpoint(
            name=name,
            step=manifest["step"],
            bytes=sum(one.bytes for one in files),
            created_at=views.as_time(made),
            latest=name == latest,
            files=files,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(folder: FilePath, name: str) -> str:
    try:
        with open_below(folder, name) as file:
            return file.read().decode("utf-8", "replace")
    except Refused:
        return ""


@router.get(
    "/{job_id:segment}/checkpoints/{name}/files/{path:path}",
    operation_id="get_checkpoint_file",
    summary="A file of a checkpoint",
    response_class=Response,
    responses={**file_answer("application/octet-stream", "The file."), **keyed(404, 416)},
)
def get_checkpoint_file(
    caller: Reader,
    control: The,
    job_id: JobId,
    name: Annotated[str, Path(description="Name of the checkpoint.", examples=["step-000040"])],
    path: RelativePath,
    range_header: Range = None,
    if_range: IfRange = None,
) -> Response:
    """Whole, or one range of it."""
    folder = FilePath(peek(control, caller, job_id).run_dir) / "checkpoints"
    if "/" in name:
        raise not_found(f"checkpoint {name[:80]!r}")
    file = open_below(folder, f"{name}/{path}")
    return FileResponse(file, media_type="application/octet-stream", range_header=range_header, if_range=if_range)


@router.get(
    "/{job_id:segment}/export",
    operation_id="list_export",
    summary="The trained model",
    response_model=FileList,
    responses=keyed(404),
)
def list_export(caller: Reader, control: The, job_id: JobId) -> Response:
    """Files of the model in Hugging Face format; 404 as long as there is none."""
    found = list_below(FilePath(peek(control, caller, job_id).run_dir) / "export", checksums=True)
    if not found:
        raise not_found("export of this job; it is written when the job ends")
    return respond(FileList(data=[RemoteFile(path=one.path, bytes=one.bytes, sha256=one.sha256) for one in found]))


@router.get(
    "/{job_id:segment}/export/files/{path:path}",
    operation_id="get_export_file",
    summary="A file of the trained model",
    response_class=Response,
    responses={**file_answer("application/octet-stream", "The file."), **keyed(404, 416)},
)
def get_export_file(
    caller: Reader,
    control: The,
    job_id: JobId,
    path: RelativePath,
    range_header: Range = None,
    if_range: IfRange = None,
) -> Response:
    """Whole, or one range of it."""
    file = open_below(FilePath(peek(control, caller, job_id).run_dir) / "export", path)
    return FileResponse(file, media_type="application/octet-stream", range_header=range_header, if_range=if_range)
