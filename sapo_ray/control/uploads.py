"""Uploaded data sets: received beside their place, looked at row by row, then renamed into it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from starlette.concurrency import run_in_threadpool

from sapo_ray.api.problems import FieldProblem
from sapo_ray.control.problems import Refused, several
from sapo_ray.control.settings import Settings

Format = Literal["jsonl", "parquet"]
MOST_PROBLEMS = 20
"""Bad lines that one answer lists."""
MOST_COLUMNS = 1000
PARQUET_S = 300.0
"""Bound of reading an uploaded Parquet file through."""
_FLUSH = 1 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What was found in an upload."""

    rows: int
    columns: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """A file that lies beside its place."""

    path: Path
    bytes: int
    sha256: str


async def receive(chunks: AsyncIterator[bytes], folder: Path, settings: Settings) -> Received:
    """Write `chunks` to a new file in `folder` (made if needed), durable. Nothing is left behind on failure.

    Raises Refused: 413 beyond the limit, 507 without the disk for it.
    """
    with disk():
        await run_in_threadpool(_prepare, folder, settings.min_free_gb)
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".upload-", delete=False)  # noqa: SIM115
    path = Path(file.name)
    sha256, size = hashlib.sha256(), 0
    try:
        with file, disk():
            waiting = bytearray()
            async for chunk in chunks:
                size += len(chunk)
                if size > settings.max_upload_bytes:
                    raise Refused(413, "too_large", f"a data set may have {settings.max_upload_bytes} bytes")
                waiting += chunk
                if len(waiting) >= _FLUSH:
                    await run_in_threadpool(_write, file, sha256, bytes(waiting))
                    waiting.clear()
            await run_in_threadpool(_write, file, sha256, bytes(waiting), last=True)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Received(path=path, bytes=size, sha256=sha256.hexdigest())


def examine(path: Path, kind: Format, max_row_bytes: int) -> Contents:
    """Look at every row. Raises Refused (422) that names the bad lines."""
    return _examine_jsonl(path, max_row_bytes) if kind == "jsonl" else _examine_parquet(path)


def settle(received: Path, place: Path) -> None:
    """Give a received file its name, durably."""
    with disk():
        os.replace(received, place)
        descriptor = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prepare(folder: Path, min_free_gb: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < min_free_gb * 1e9:
        raise OSError(errno.ENOSPC, f"{free / 1e9:.2f} GB free")


def _write(file: Any, sha256: Any, data: bytes, last: bool = False) -> None:
    file.write(data)
    sha256.update(data)
    if last:
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def disk() -> Iterator[None]:
    """Full disks and quotas as an answer; nothing was kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise Refused(
            507,
            "disk_full",
            "the service has not enough disk for this; nothing was kept",
            hint="the operator must free space; deleting jobs and data sets helps",
            headers={"Retry-After": "60"},
        ) from error


def _examine_jsonl(path: Path, max_row_bytes: int) -> Contents:
    problems: list[FieldProblem] = []
    columns: dict[str, None] = {}
    rows = 0
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(max_row_bytes + 1):
            number += 1
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            rows += 1
            found = _line(raw, max_row_bytes)
            if isinstance(found, str):
                problems.append(FieldProblem(param=f"line {number}", detail=f"line {number}: {found}"))
                if len(problems) == MOST_PROBLEMS or len(raw) > max_row_bytes:
                    break  # after a line that is too long it is unknown where the next begins
            else:
                columns |= dict.fromkeys(found[: MOST_COLUMNS - len(columns)])
    if problems:
        raise several(problems, code="invalid_dataset", status=422, what="the data set")
    if not rows:
        raise Refused(422, "invalid_dataset", "the file holds no row", hint="each line must be one JSON object")
    return Contents(rows=rows, columns=list(columns))


def _line(raw: bytes, max_row_bytes: int) -> list[str] | str:
    """The row's keys, or what is wrong with it."""
    if len(raw) > max_row_bytes:
        return f"longer than {max_row_bytes} bytes"
    try:
        row = json.loads(raw.rstrip(b"\r\n").decode("utf-8"), parse_constant=_no_constant)
        if _SURROGATE.search(raw):  # a pair of them is a character, one alone is none
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair in its text, which cannot be written as UTF-8; remove it"
    except UnicodeDecodeError as error:
        return f"not valid UTF-8 at byte {error.start + 1} of the line (0x{raw[error.start]:02x}); save it as UTF-8"
    except json.JSONDecodeError as error:
        return f"not valid JSON at column {error.colno} ({error.msg}); each line must be one JSON object"
    except (ValueError, RecursionError) as error:
        return f"not readable as JSON ({str(error)[:100]}); each line must be one JSON object"
    return list(row) if isinstance(row, dict) else f"must be a JSON object, got {type(row).__name__}"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write a finite number, or null")


def _examine_parquet(path: Path) -> Contents:
    """In a process of its own: what reads foreign Parquet is C++, and brings numpy along."""
    command = [sys.executable, "-m", "sapo_ray.control.parquet", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PARQUET_S, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(422, "invalid_dataset", f"the file could not be read within {PARQUET_S:g} s") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {"error": "the file ends the process that reads it"}
    if "error" in answer:
        raise Refused(422, "invalid_dataset", answer["error"], hint=answer.get("hint"))
    if not answer["rows"]:
        raise Refused(422, "invalid_dataset", "the file holds no row")
    return Contents(rows=answer["rows"], columns=answer["columns"][:MOST_COLUMNS])
