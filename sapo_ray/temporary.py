"""Temporary folders: all begin with `sapo-`, and what a killed process left is removed by the next start.

A folder names its owner in a file inside it. The owner is dead if this machine has started again since, or if no
process of this kind (number and start, in the same namespace of processes) exists any more. Whatever cannot be shown to
be ours and dead is left alone: folders of other users, without an owner's file, of another machine or container.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "sapo-"
OWNER = ".owner"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder of this process, readable by its user alone, removed at the end.

    Those that killed processes left are removed first. Its path is short: those of sockets inside it are limited to
    about 100 characters.
    """
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        (folder / OWNER).write_text(json.dumps(_owner(os.getpid())))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep() -> list[Path]:
    """Remove temporary folders of this user whose owner is dead; returns what was removed."""
    removed = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _is_ours(folder) and _is_dead(folder):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _is_ours(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:  # removed meanwhile, or not for us to see
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _is_dead(folder: Path) -> bool:
    try:
        owner = dict(json.loads((folder / OWNER).read_text()))
        pid = int(owner["pid"])
        here = _owner(os.getpid())
        if owner["host"] != here["host"]:
            return False
        if owner["boot"] != here["boot"]:
            return True
        return owner["namespace"] == here["namespace"] and owner != _owner(pid)
    except (OSError, ValueError, KeyError, TypeError):  # no owner's file, or not one of ours
        return False


def _owner(pid: int) -> dict[str, str | int | None]:
    """Who a process is, so that nobody else ever is; `started` is None if there is no such process."""
    return {
        "pid": pid,
        "started": _started(pid),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.readlink("/proc/self/ns/pid"),
        "host": socket.gethostname(),
    }


def _started(pid: int) -> int | None:
    """Clock ticks from the machine's start to the process's; unlike a time of day it never shifts."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()  # its name may hold blanks
    return None if state == "Z" else int(fields[18])
