"""Reading a run's line-by-line JSON files while a driver appends to them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo_ray.control.files import open_below
from sapo_ray.control.problems import Refused

SCANNED_BYTES = 32 << 20
"""Read for one page at most; a page may so hold fewer rows than asked for, and still have a next."""
LONGEST_LINE = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A page of rows."""

    data: list[dict[str, Any]]
    next: int | None
    """Offset in bytes of what follows; None at the end of what there is now."""


def read_rows(run_dir: Path, name: str, *, offset: int, limit: int, wanted: Callable[[dict[str, Any]], bool]) -> Rows:
    """Up to `limit` rows of `name` that are wanted, from `offset` bytes on. A file that is not there has none."""
    try:
        file = open_below(run_dir, name)
    except Refused:
        return Rows(data=[], next=None)
    data: list[dict[str, Any]] = []
    with file:
        size = os.fstat(file.fileno()).st_size
        file.seek(min(offset, size))
        position = start = file.tell()
        for line in _lines(file):
            if len(data) == limit or position - start > SCANNED_BYTES:
                return Rows(data=data, next=position)
            position += len(line)
            row = _row(line)
            if row is not None and wanted(row):
                data.append(row)
    return Rows(data=data, next=None)


def _lines(file: Any) -> Iterator[bytes]:
    """Whole lines; what the driver is just writing is left for the next time."""
    while line := file.readline(LONGEST_LINE):
        if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
            return
        yield line


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a line, with null for numbers that JSON cannot say; None for a damaged line."""
    try:
        row = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return _finite(row) if isinstance(row, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return value
