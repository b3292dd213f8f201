"""Files of a job, whole or not at all: resumed by byte ranges, checked by size and checksum, renamed into place."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from sapo_ray.client.errors import ApiError, BadReply, ClientError, ConnectionFailed, RateLimited, Unavailable
from sapo_ray.client.shapes import Shape
from sapo_ray.client.transport import Transport
from sapo_ray.errors import ResourceError

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told path, bytes on the disk, bytes in all."""
HASHES: dict[str, Callable[[], Any]] = {
    "sha256": hashlib.sha256,
    "blake2b": lambda: hashlib.blake2b(digest_size=16),
}
TRIES = 6
"""Failures in a row, without a byte in between, after which a file is given up."""


class RemoteFile(Shape):
    """A file that the service has."""

    path: str
    """Relative, with `/`."""
    bytes: int
    sha256: str | None = None
    """Hexadecimal; None where the service has not computed it."""
    blake2b: str | None = None
    """Of 16 bytes, hexadecimal; checkpoints have it."""


class Damaged(BadReply):
    """A file that arrived is not the one that the service listed."""


def download(
    transport: Transport, base: str, files: Sequence[RemoteFile], folder: Path, progress: Progress | None = None
) -> list[Path]:
    """Fetch all `files` from beneath `base` into `folder`; those that are there already, whole, are not fetched again.

    A download that was broken off goes on where it stopped, also in a later call: the beginning lies in `NAME.part`.

    Raises:
        Damaged: size or checksum differ, also after a second try from the start.
        ConnectionFailed, Unavailable: the service did not come back.
        ResourceError: the disk does not take it.
    """
    targets = [_target(folder, one) for one in files]
    try:
        for one, target in zip(files, targets, strict=True):
            if not _is_whole(target, one):
                target.parent.mkdir(parents=True, exist_ok=True)
                _Fetch(transport, f"{base}/{quote(one.path)}", one, target, progress or _silent).run()
    except OSError as error:
        raise ResourceError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from error
    return targets


class _Fetch:
    """One file on its way, in `NAME.part` until it is whole."""

    def __init__(self, transport: Transport, url: str, file: RemoteFile, target: Path, progress: Progress) -> None:
        self._transport = transport
        self._url = url
        self._file = file
        self._target = target
        self._part = target.with_name(target.name + ".part")
        self._progress = progress
        self._etag: str | None = None

    def run(self) -> None:
        begun = self._part.exists()
        self._complete()
        if begun and not _is_whole(self._part, self._file):
            self._part.unlink()  # what an earlier call had begun may have been of another file
            self._complete()
        if not _is_whole(self._part, self._file):
            self._part.unlink()
            raise _damaged(self._file)
        os.replace(self._part, self._target)

    def _complete(self) -> None:
        """Append until it has its size. Bounded: so many tries in a row that got no further."""
        self._part.touch()
        failures, furthest = 0, self._fitting_size()
        while (have := self._fitting_size()) < self._file.bytes:
            error: ClientError = ConnectionFailed(f"{self._url} ended before its {self._file.bytes} bytes were there")
            try:
                self._append(have)
            except (ConnectionFailed, Unavailable, RateLimited) as caught:
                error = caught
            except ApiError as caught:
                if caught.status != 416:
                    raise
                error = caught
                os.truncate(self._part, 0)  # what is there does not fit what the service has: from the start
            now = self._part.stat().st_size
            if now > self._file.bytes:
                raise _damaged(self._file)
            failures = 1 if now > furthest else failures + 1
            furthest = max(now, furthest)
            if now < self._file.bytes:
                if failures >= TRIES:
                    raise error
                wait = self._transport.backoff.wait_s(failures, getattr(error, "retry_after", None))
                log.info("%s: %s; on from byte %d in %.1f s", self._url, error, now, wait)
                time.sleep(wait)

    def _fitting_size(self) -> int:
        """Bytes that are there; what is longer than the file is not of it."""
        if self._part.stat().st_size > self._file.bytes:
            os.truncate(self._part, 0)
        return self._part.stat().st_size

    def _append(self, have: int) -> None:
        """What one connection brings after the first `have` bytes."""
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self._etag is not None and not self._etag.startswith("W/"):
                headers["If-Range"] = self._etag
        with self._transport.stream("GET", self._url, headers=headers) as response:
            goes_on = response.status_code == 206
            found = response.headers.get("content-range", "")
            if goes_on and not found.startswith(f"bytes {have}-"):
                raise BadReply(f"{self._url} answered a range from byte {have} with {found!r}")
            self._etag = response.headers.get("etag")
            with self._part.open("ab" if goes_on else "wb") as out:
                written = have if goes_on else 0
                for chunk in response.iter_raw():
                    out.write(chunk)
                    written += len(chunk)
                    self._progress(self._file.path, written, self._file.bytes)
                    if written > self._file.bytes:
                        break


def _target(folder: Path, file: RemoteFile) -> Path:
    """Where it goes; never outside `folder`, whatever the service says."""
    path = PurePosixPath(file.path)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in file.path or "\\" in file.path:
        raise BadReply(f"the service names a file {file.path!r}, which does not lie within a folder")
    return folder.joinpath(*path.parts)


def _is_whole(path: Path, file: RemoteFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    return all(_digest(path, kind) == wanted for kind, wanted in _checksums(file).items())


def _checksums(file: RemoteFile) -> dict[str, str]:
    return {kind: value for kind in HASHES if (value := getattr(file, kind)) is not None}


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, HASHES[kind]).hexdigest()


def _damaged(file: RemoteFile) -> Damaged:
    listed = ", ".join(f"{kind} {value}" for kind, value in _checksums(file).items())
    return Damaged(
        f"{file.path} arrived damaged: not the {file.bytes} bytes that were listed ({listed or 'no checksum'})"
    )


def _silent(*_: object) -> None:
    return None
