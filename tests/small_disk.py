"""Real file systems of a few megabytes, in memory, that a test may fill."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A folder that is a disk of its own. Skips where none can be mounted."""
    with perhaps_small_disk(folder, megabytes) as mounted:
        if not mounted:
            pytest.skip("a small file system cannot be mounted here")
        yield folder


@contextmanager
def perhaps_small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A folder, made if need be, that is a disk of its own where that can be mounted; yields whether it is."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


def fill(folder: Path) -> None:
    """Not one more page of memory fits after this; `filler` is the file to delete for room."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
