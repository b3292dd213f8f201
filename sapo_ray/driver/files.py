"""Files that are whole and on the disk, or not there."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from sapo_ray.errors import DiskFull, ResourceError

FULL_BYTES = 32 << 20
"""A disk with less free than this is full: what failed on it failed for that, whatever its error says."""


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a small file, durably and by one rename: whole or not at all.

    Raises:
        ResourceError: the disk does not take it; what stood there stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        fsync(path.parent)
    except OSError as error:
        raise not_written(path, error) from error


def append(file: int, text: str) -> None:
    """Add `text` to a file that was opened for appending: all of it, durably, or with an OSError none of it."""
    whole = os.fstat(file).st_size
    rest = memoryview(text.encode())
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except OSError:
        with suppress(OSError):  # what cannot be cut off now is a torn line to whoever opens the file next
            os.ftruncate(file, whole)
        raise


def disk_is_full(path: Path) -> bool:
    """Whether the disk of `path`, which need not exist, has no room left at this moment."""
    return _free(path) < FULL_BYTES


def came_of_a_full_disk(path: Path, error: BaseException) -> bool:
    """Whether `error`, in writing to `path`, did: libraries word it as they like, and some not at all."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or (isinstance(error, Exception) and disk_is_full(path))


def not_written(path: Path, error: BaseException) -> ResourceError:
    """What to raise where `error` kept something from being written to `path`: DiskFull if that is why."""
    kind = DiskFull if came_of_a_full_disk(path, error) else ResourceError
    reason = (isinstance(error, OSError) and error.strerror) or str(error).strip().partition("\n")[0]
    return kind(
        f"{path} cannot be written ({reason}); its disk has {_free(path) / 1e9:.2f} GB free: free some space, or see "
        "to it that this user may write there; then `sapo-ray resume` the run (a service: submit the job again). "
        "The newest checkpoint stays as it is"
    )


def _free(path: Path) -> int:
    """Bytes."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
