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
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from sapo_ray.driver.files import fsync, write_text
from sapo_ray.errors import CheckpointError, ResourceError

MANIFEST = "manifest.json"
FORMAT = 2
"""Of a checkpoint's files; 2: no pickles of the driver."""
_WRITING = ".writing-"


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int, min_free_gb: float) -> None:
        self._folder = folder
        self._keep = keep
        self._min_free = int(min_free_gb * 1e9)

    async def write(self, step: int, fill: Callable[[Path], Awaitable[None]], guard: Callable[[], None]) -> Path:
        """Write the checkpoint of `step`; `fill` puts its files into the folder it is given.

        `guard` raises where another attempt has taken the run over. Filling takes minutes, so it is asked before
        anything is touched, before the checkpoint gets its name, and right before `latest` moves.

        Raises ResourceError before anything is written if the disk has too little room; whatever fails later, the
        checkpoints that were there stay valid.
        """
        guard()
        self.check_space()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{step:06d}"
        writing, final = self._folder / f"{_WRITING}{name}", self._folder / name
        for leftover in {*self._folder.glob(f"{_WRITING}*"), final}:  # of a crash, or of an abandoned lineage
            if leftover.exists():
                await asyncio.to_thread(shutil.rmtree, leftover)
        writing.mkdir()
        try:
            await fill(writing)
            await asyncio.to_thread(_seal, writing, step)
            guard()
        except BaseException as error:
            shutil.rmtree(writing, ignore_errors=True)
            if not isinstance(error, OSError) and "No space left on device" not in str(error):
                raise
            raise ResourceError(f"checkpoint of step {step} could not be written to {writing}: {error}") from error
        writing.rename(final)
        fsync(self._folder)
        guard()
        write_text(self._folder / "latest", name)
        self._prune()
        return final

    def check_space(self, expected: int = 0) -> None:
        """Raise ResourceError unless the disk holds another checkpoint and the reserve.

        A checkpoint is taken to be of the last one's size, or of `expected` bytes if there is none.
        """
        last = max(self._complete(), default=None)
        size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file()) if last else expected
        existing = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < self._min_free + size:
            raise ResourceError(
                f"too little disk for a checkpoint: {free / 1e9:.2f} GB free at {existing}, needed are "
                f"checkpoint.min_free_gb = {self._min_free / 1e9:g} GB and {size / 1e9:.2f} GB for the checkpoint; "
                "free some space, move run_dir, or lower checkpoint.min_free_gb"
            )

    def newest(self) -> Path | None:
        """The newest whole checkpoint, by the pointer first; None if the run has none yet.

        Raises CheckpointError if there are checkpoints but every one of them is damaged.
        """
        pointer = self._folder / "latest"
        candidates = sorted(self._complete(), reverse=True)
        if pointer.exists():
            pointed = self._folder / pointer.read_text().strip()
            candidates = [pointed, *(path for path in candidates if path < pointed)]
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
        return [path for path in self._folder.glob("step-*") if (path / MANIFEST).exists()]

    def _prune(self) -> None:
        pointed = (self._folder / "latest").read_text().strip()
        older = sorted(path for path in self._complete() if path.name <= pointed)
        newer = [path for path in self._complete() if path.name > pointed]  # of an abandoned lineage
        for path in [*older[: -self._keep], *newer]:
            shutil.rmtree(path)


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
