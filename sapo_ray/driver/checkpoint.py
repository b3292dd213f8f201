"""Checkpoints that are either whole or not there.

    checkpoints/.writing-step-000020/   filled, every file hashed and fsynced, manifest last
    checkpoints/step-000020/            by one rename
    checkpoints/latest                  a pointer, replaced by one rename after that

Whatever is killed when, `latest` names a whole checkpoint, and at least the one before it is kept too.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from sapo_ray.driver.files import came_of_a_full_disk, fsync, not_written, write_text
from sapo_ray.errors import CheckpointError, DiskFull, ResourceError, SapoRayError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 2
"""Of a checkpoint's files; 2: no pickles of the driver."""
_WRITING = ".writing-"


class Checkpoints:
    """The checkpoints of one run. `expected` is the size in bytes that the first one is thought to have."""

    def __init__(self, folder: Path, *, keep: int, min_free_gb: float, expected: int = 0) -> None:
        self._folder = folder
        self._keep = keep
        self._min_free = int(min_free_gb * 1e9)
        self._expected = expected

    async def write(self, step: int, fill: Callable[[Path], Awaitable[None]], guard: Callable[[], None]) -> Path:
        """Write the checkpoint of `step`; `fill` puts its files into the folder it is given.

        `guard` raises where another attempt has taken the run over. Filling takes minutes, so it is asked before
        anything is touched, before the checkpoint gets its name, and right before `latest` moves.

        Raises DiskFull before anything is written if the disk has too little room, and where it is full all the
        same; whatever fails, the checkpoints that were there stay valid.
        """
        guard()
        self.check_space()
        name = f"step-{step:06d}"
        writing, final = self._folder / f"{_WRITING}{name}", self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in {*self._folder.glob(f"{_WRITING}*"), final}:  # of a crash, or of an abandoned lineage
                if leftover.exists():
                    await asyncio.to_thread(shutil.rmtree, leftover)
            writing.mkdir()
            await fill(writing)
            await asyncio.to_thread(_seal, writing, step)
            guard()
            writing.rename(final)
            fsync(self._folder)
        except BaseException as error:
            refused = _refusal(writing, error)  # before the half that was written is removed: by then there is room
            await asyncio.to_thread(shutil.rmtree, writing, ignore_errors=True)
            if refused is None:
                raise
            raise refused from error
        guard()
        write_text(self._folder / "latest", name)
        try:
            await asyncio.to_thread(self._prune)
        except OSError as error:  # the new one is good; the next one prunes again
            log.warning("an old checkpoint in %s could not be removed: %s", self._folder, error)
        return final

    def check_space(self) -> None:
        """Raise DiskFull unless the disk holds another checkpoint and the reserve.

        A checkpoint is taken to be of the last one's size, or as large as expected if there is none.
        """
        last = max(self._complete(), key=step_of, default=None)
        size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file()) if last else self._expected
        existing = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < self._min_free + size:
            raise DiskFull(
                f"too little disk for a checkpoint: {free / 1e9:.2f} GB free at {existing}, needed are "
                f"checkpoint.min_free_gb = {self._min_free / 1e9:g} GB and {size / 1e9:.2f} GB for the checkpoint; "
                "free some space, move run_dir, or lower checkpoint.min_free_gb"
            )

    def newest(self) -> Path | None:
        """The newest whole checkpoint, by the pointer first; None if the run has none yet.

        Raises CheckpointError if there are checkpoints but every one of them is damaged.
        """
        pointer = self._folder / "latest"
        candidates = sorted(self._complete(), key=step_of, reverse=True)
        if pointer.exists():
            pointed = self._folder / self._pointed()
            candidates = [pointed, *(path for path in candidates if step_of(path) < step_of(pointed))]
        problems = []
        for candidate in candidates:
            try:
                verify(candidate)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                return candidate
        if problems:
            raise CheckpointError("no checkpoint of this run can be used: " + "; ".join(problems))
        return None

    def _complete(self) -> list[Path]:
        folders = (path for path in self._folder.glob("step-*") if (path / MANIFEST).exists())
        return [path for path in folders if path.name.removeprefix("step-").isdecimal()]

    def _pointed(self) -> str:
        """The name in `latest`."""
        pointer = self._folder / "latest"
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not name.startswith("step-") or not name.removeprefix("step-").isdecimal():
            raise CheckpointError(
                f"{pointer} names no checkpoint ({name[:40]!r}); write the name of the newest step-* folder into it, "
                "or remove it to take the newest that is whole"
            )
        return name

    def _prune(self) -> None:
        pointed = step_of(self._folder / self._pointed())
        older = sorted((path for path in self._complete() if step_of(path) <= pointed), key=step_of)
        newer = [path for path in self._complete() if step_of(path) > pointed]  # of an abandoned lineage
        for path in [*older[: -self._keep], *newer]:
            shutil.rmtree(path)


def _refusal(writing: Path, error: BaseException) -> ResourceError | None:
    """What to raise where the disk kept a checkpoint from being written; None if it was not the disk.

    A learner that is lost on the way stays lost however full the disk is (and a missed deadline is an OSError).
    """
    if isinstance(error, SapoRayError) and not isinstance(error, ResourceError):
        return None
    if isinstance(error, OSError) or came_of_a_full_disk(writing, error):
        return not_written(writing, error)
    return None


def step_of(folder: Path) -> int:
    """Step of a checkpoint by its name; names do not sort as numbers once a run takes a million steps."""
    return int(folder.name.removeprefix("step-"))


def verify(folder: Path) -> None:
    """Compare every file with the manifest; raise CheckpointError naming the first that differs."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} has no readable manifest ({error})") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} is of format {manifest.get('format')}, this version of sapo-ray reads {FORMAT}; "
            "go on with the version that wrote it, or start a new job from the exported model"
        )
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"] or _digest(path) != expected["blake2b"]:
            raise CheckpointError(f"{path} differs from its hash in the manifest")


def _seal(folder: Path, step: int) -> None:
    """Hash and fsync every file, then write the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {}
    for path in files:
        entries[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "blake2b": _digest(path)}
        fsync(path)
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            fsync(path)
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=1))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
