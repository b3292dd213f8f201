"""Copies a trained model to a folder of any file system that fsspec knows: `python -m sapo_ray.driver.copying ...`.

A process of its own (output.py starts it), because file systems block, hang and keep threads: it can be killed, and
ends by itself if nobody is left to do so. Prints one line of JSON: files and bytes, or what went wrong.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from sapo_ray.errors import ResourceError

LAST = "config.json"
"""Without this file nothing loads the folder: so half a copy is not taken for a whole one."""


def copy(folder: Path, uri: str) -> tuple[int, int]:
    """Copy all files below `folder` to below `uri`; returns how many, and their bytes.

    Files of the same names are overwritten, so that a copy can be repeated.

    Raises:
        ResourceError: other files are there, of another model then; or a file did not arrive whole.
    """
    files, root = fsspec.url_to_fs(uri)
    ours = dict(_files(folder))
    there = {str(path)[len(root.rstrip("/")) + 1 :] for path in files.find(root)}
    if strange := sorted(there - ours.keys()):
        raise ResourceError(
            f"the folder holds {len(strange)} files that are not of this model, {strange[0]!r} first; a mixture would "
            "load as neither: name an empty folder"
        )
    files.makedirs(root, exist_ok=True)
    if LAST in there:
        files.rm_file(f"{root}/{LAST}")
    for name in sorted(ours, key=lambda name: (name == LAST, name)):
        target, size = f"{root}/{name}", ours[name].stat().st_size
        files.makedirs(target.rpartition("/")[0], exist_ok=True)
        files.put_file(str(ours[name]), target)
        if (arrived := files.size(target)) != size:
            raise ResourceError(f"{name} has {size} bytes and arrived with {arrived}")
    return len(ours), sum(path.stat().st_size for path in ours.values())


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def main() -> None:
    """Arguments: folder, URI, seconds."""
    folder, uri, seconds = sys.argv[1:4]
    signal.alarm(int(float(seconds)) + 60)
    said: dict[str, Any]
    try:
        count, size = copy(Path(folder), uri)
        said = {"files": count, "bytes": size}
    except Exception as error:  # noqa: BLE001 - of any file system; what it is belongs into the job's condition
        said = {"error": str(error) if isinstance(error, ResourceError) else f"{type(error).__name__}: {error}"}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
