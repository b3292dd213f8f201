"""Files of a run, never a step outside of it: no `..`, and no link is followed, not even on the way."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sapo_ray.control.problems import Refused, not_found

CHUNK = 1 << 18
MOST_FILES = 10_000
"""Files of a folder that are listed."""
HASHED_BYTES = 1 << 30
"""Larger files are listed without a checksum."""
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A file below a folder."""

    path: str
    """Relative to the folder, with `/`."""
    bytes: int
    modified: float
    """Unix seconds."""
    sha256: str | None = None


def open_below(root: Path, relative: str) -> BinaryIO:
    """The regular file `relative` to `root`, opened for reading; every part of the way must be a real folder.

    Raises Refused (404) for whatever is not exactly that, and for names that begin with a dot, as `..` and drafts do.
    """
    parts = relative.split("/")
    if "\0" in relative or any(part == "" or part.startswith(".") for part in parts):
        raise not_found(f"file {relative[:200]!r}")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    opened: list[int] = []
    try:
        opened.append(os.open(root, flags | os.O_DIRECTORY))
        for part in parts[:-1]:
            opened.append(os.open(part, flags | os.O_DIRECTORY, dir_fd=opened[-1]))
        # Non-blocking: opening a pipe would wait for somebody to write to it.
        descriptor = os.open(parts[-1], flags | os.O_NONBLOCK, dir_fd=opened[-1])
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG, errno.ENXIO):
            raise not_found(f"file {relative[:200]!r}") from error
        raise
    finally:
        for one in opened:
            os.close(one)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_found(f"file {relative[:200]!r}")
    return os.fdopen(descriptor, "rb")


def list_below(root: Path, *, checksums: bool = False) -> list[Found]:
    """All regular files below `root` by path, without links and without what begins with a dot."""
    found = []
    for path, entry in _walk(root, ""):
        status = entry.stat(follow_symlinks=False)
        digest = _digest(entry.path, status.st_size, status.st_mtime_ns) if checksums else None
        found.append(Found(path=path, bytes=status.st_size, modified=status.st_mtime, sha256=digest))
        if len(found) == MOST_FILES:
            break
    return sorted(found, key=lambda one: one.path)


def _walk(folder: Path | str, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    if os.path.islink(folder):
        return
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{prefix}{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            yield f"{prefix}{entry.name}", entry


@lru_cache(maxsize=4096)
def _digest(path: str, size: int, _modified_ns: int) -> str | None:
    """SHA-256, computed once per version of a file."""
    if size > HASHED_BYTES:
        return None
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None  # gone since it was listed


class FileResponse(Response):
    """An open file, whole or one range of it (`Range: bytes=a-b`), with a strong ETag for `If-Range`.

    Several ranges at once are answered with the whole, as RFC 9110 permits.
    """

    def __init__(self, file: BinaryIO, *, media_type: str, range_header: str | None, if_range: str | None) -> None:
        self._file = file
        status = os.fstat(file.fileno())
        self._etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        try:
            wanted = _wanted(range_header, status.st_size) if if_range in (None, self._etag) else None
        except Refused:
            file.close()
            raise
        self._start, self._length = wanted or (0, status.st_size)
        headers = {"Accept-Ranges": "bytes", "ETag": self._etag, "Content-Length": str(self._length)}
        if wanted:
            headers["Content-Range"] = f"bytes {self._start}-{self._start + self._length - 1}/{status.st_size}"
        super().__init__(None, 206 if wanted else 200, headers, media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self._chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._file.close()

    async def _chunks(self) -> AsyncIterator[bytes]:
        descriptor, offset, end = self._file.fileno(), self._start, self._start + self._length
        while offset < end:
            chunk = await run_in_threadpool(os.pread, descriptor, min(CHUNK, end - offset), offset)
            if not chunk:
                raise OSError(errno.EIO, "the file was cut while it was sent")
            offset += len(chunk)
            yield chunk


def _wanted(header: str | None, size: int) -> tuple[int, int] | None:
    """(first byte, number) of a range request; None for the whole file. Raises Refused (416)."""
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return None  # another unit, or several ranges
    first, last = match.groups()
    if len(first) > 18 or len(last) > 18:
        first, last = "9" * 18, ""
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if first and last and int(last) < int(first):
        return None
    if start >= size or (not first and int(last) == 0):
        raise Refused(
            416,
            "range_not_satisfiable",
            f"the file has {size} bytes; {header!r} lies beyond",
            param="Range",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end - start
