"""Lines of a journal, one at a time, with their numbers.

A journal may hold millions of lines: one line is in memory at once. A torn last line (the driver was killed while it
wrote, or is writing) does not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from sapo_ray.errors import CheckpointError

LEDGER = {
    "bounds": ("steps", "prompts", "group_size", "max_staleness", "keep"),
    "issued": ("group", "index"),
    "graded": ("group", "completions"),
    "consumed": ("step", "groups"),
    "dropped": ("group", "reason", "step"),
    "published": ("version", "fingerprint", "workers"),
    "reissued": ("group", "reason"),
    "waited": ("group", "reason"),
}
"""Kinds of the ledger and what they must have. A kind that is not here, and is no event, is not understood."""
EVENTS = {
    "transition": ("state",),
    "rollback": ("to_step", "checkpoint"),
    "checkpoint": ("step", "name"),
    "step": ("step", "metrics"),
    "condition": ("condition",),
    "worker": ("what",),
}
"""Events that are looked at; others, which carry `seq` as they do, are for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a journal."""

    number: int
    attempt: int
    kind: str
    seq: int | None
    """Of an event within its attempt, from 1; None for the ledger."""
    data: dict[str, Any]


def lines(path: Path) -> Iterator[Line]:
    """All whole lines, oldest first.

    Raises:
        CheckpointError: a line is not a journal's, or of a kind that is not known; says which and what to do.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    return
                yield _line(path, number, raw)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); `sapo-ray audit` wants the run directory of a job"
        ) from error


def _line(path: Path, number: int, raw: bytes) -> Line:
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise _damaged(path, number, f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise _damaged(path, number, "not a JSON object")
    kind, attempt, seq = data.get("kind"), data.get("attempt"), data.get("seq")
    if not isinstance(kind, str) or not _number(attempt) or not (seq is None or _number(seq)):
        raise _damaged(path, number, "it has no kind and attempt as every line has")
    if seq is None and kind not in LEDGER:
        raise CheckpointError(
            f"{path}:{number}: a line of kind {kind!r} is not known to this version of sapo-ray; "
            "audit the run with the version that wrote it"
        )
    wanted = (LEDGER if seq is None else EVENTS).get(kind, ())
    if missing := [key for key in wanted if key not in data]:
        raise _damaged(path, number, f"{kind} without {', '.join(missing)}")
    return Line(number=number, attempt=attempt, kind=kind, seq=seq, data=data)


def _number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _damaged(path: Path, number: int, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}:{number}: not a journal line ({problem}); the file was damaged, or is of an earlier version of "
        "sapo-ray: restore it from a copy, or audit with the version that wrote it"
    )
