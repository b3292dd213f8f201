"""Does a folder keep what checkpoints, journals and locks need: write, fsync, rename, lock, and room?"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sapo_ray.doctor.findings import Finding, bounded
from sapo_ray.errors import DeadlineExceeded

BOUND_S = 30.0
"""A file system that has not done a few small writes by then would stall every checkpoint."""
SLOW_FSYNC_S = 1.0
"""The journal is synced at least once a step."""
BYTES = 1 << 20
PREFIX = ".sapo-doctor-"
"""Of the folders that are made, and removed again."""
_OWNER = "give the folder to the service's user (uid 10001 in the images; Kubernetes: securityContext.fsGroup)"
_REMEDIES = {
    errno.EROFS: "the volume is mounted read-only: mount it with write access",
    errno.EACCES: _OWNER,
    errno.EPERM: _OWNER,
    errno.ENOSPC: "the volume is full: enlarge it, or delete jobs that have ended (`sapo-ray delete JOB`)",
    errno.EDQUOT: "the user's quota is used up: raise it, or delete jobs that have ended (`sapo-ray delete JOB`)",
    errno.ESTALE: "the network file system lost the folder: mount it again",
    errno.ENOLCK: "the file system gives no locks: mount it with locking (NFS: version 4, or a running lockd)",
}


class StorageTrouble(Exception):
    """What was tried when it failed; the cause is the OSError."""


def check_storage(folder: Path, min_free_gb: float, where: str = "here") -> Finding:
    """Write, fsync, rename, lock and read back in a folder of its own below `folder`, which is removed again."""
    try:
        fsync_s, free = bounded(f"storage at {folder}", BOUND_S, lambda: _probe(folder))
    except DeadlineExceeded as error:
        remedy = "the file system hangs: is its server up and reachable from this machine?"
        return Finding(check="storage", status="failed", detail=str(error), remedy=remedy, where=where)
    except FileNotFoundError:
        remedy = "mount the volume there, create the folder, or name another with SAPO_DATA_DIR or --data-dir"
        return Finding(check="storage", status="failed", detail=f"{folder} is not there", remedy=remedy, where=where)
    except StorageTrouble as error:
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        remedy = _REMEDIES.get(number or 0, "runs need a POSIX file system: not an object store mounted as a folder")
        return Finding(check="storage", status="failed", detail=f"{folder}: {error}", remedy=remedy, where=where)
    detail = f"{folder}: write, fsync, rename and lock work; fsync {fsync_s * 1000:.0f} ms, {free / 1e9:.1f} GB free"
    if free < min_free_gb * 1e9:
        remedy = f"make room: uploads are refused below SAPO_MIN_FREE_GB={min_free_gb:g}, and jobs hold on a full disk"
        return Finding(check="storage", status="failed", detail=detail, remedy=remedy, where=where)
    if fsync_s > SLOW_FSYNC_S:
        remedy = "use faster storage: the journal of a run is synced at least once a step"
        return Finding(check="storage", status="warning", detail=detail, remedy=remedy, where=where)
    return Finding(check="storage", status="ok", detail=detail, where=where)


@contextmanager
def marker(folder: Path) -> Iterator[tuple[Path, str]]:
    """A file with a text that nobody can guess, for other machines to read: do they see the same storage?"""
    with _own_folder(folder) as own:
        text = secrets.token_hex(16)
        path = own / "marker"
        with _step("writing"):
            path.write_text(text)
            own.chmod(0o755)  # the nodes' user may be another
        yield path, text


def check_marker(path: Path, text: str, where: str) -> Finding | None:
    """What is wrong if this machine does not see the file that another wrote; None if it does."""
    try:
        found = bounded(f"reading {path}", BOUND_S, path.read_text)
    except (OSError, DeadlineExceeded) as error:
        found = f"({error})"
    if found == text:
        return None
    detail = f"what the control plane writes to {path.parent.parent} cannot be read here: {found[:200]}"
    remedy = "mount the same shared volume (ReadWriteMany), at the same path, in the control plane and on every node"
    return Finding(check="storage", status="failed", detail=detail, remedy=remedy, where=where)


def _probe(folder: Path) -> tuple[float, int]:
    """Seconds of one fsync of 1 MiB, and free bytes. Raises FileNotFoundError, StorageTrouble."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    content = secrets.token_bytes(BYTES)
    with _own_folder(folder) as own:
        draft, final = own / "draft", own / "final"
        with _step("writing"), draft.open("wb") as file:
            file.write(content)
            file.flush()
            with _step("fsync"):
                started = time.monotonic()
                os.fsync(file.fileno())
                fsync_s = time.monotonic() - started
            with _step("locking"):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with _step("renaming over a file that is there"):
            final.write_bytes(b"old")
            os.replace(draft, final)
        with _step("fsync of the folder"):
            _sync_folder(own)
        with _step("reading back"):
            if final.read_bytes() != content or draft.exists():
                raise OSError("other bytes came back than were written")
    return fsync_s, shutil.disk_usage(folder).free


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    own = folder / (PREFIX + secrets.token_hex(8))
    with _step("making a folder"):
        own.mkdir(mode=0o700)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


@contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageTrouble(f"{name} failed ({error.strerror or error})") from error


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
