"""`sapo-ray grade`: a file of completions graded again, by the same processes as in training, without Ray."""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.errors import ConfigError, DataError
from sapo_ray.types import Grading, Verdict
from sapo_ray.verifier.jobs import GradingItem
from sapo_ray.verifier.supervisor import GradingProcesses

ROWS_AHEAD = 512
"""Rows in memory at once: enough that one slow answer does not hold up the others."""


@dataclass(kw_only=True, slots=True)
class GradeSummary:
    """What a file came to."""

    rows: int = 0
    correct: int = 0
    wrong: int = 0
    errors: int = 0


def grade_file(
    in_path: str | Path, out_path: str | Path, spec: VerifierSpec, progress: Callable[[int], None] | None = None
) -> GradeSummary:
    """Grades JSONL rows with `completion`, `gold` and perhaps `prompt`; see `grade_rows`. Opens its own event loop."""
    return asyncio.run(grade_rows(Path(in_path), Path(out_path), spec, progress))


async def grade_rows(
    in_path: Path, out_path: Path, spec: VerifierSpec, progress: Callable[[int], None] | None = None
) -> GradeSummary:
    """Writes every row again, in order, with `verdict`, `reward` (null for `error`), `reason`, `seconds`, `parts` and,
    where there is one, `detail` over whatever stood there.

    All rows are read once before the first is graded, so that a fault in the last line costs no time. Rows stream:
    at most ROWS_AHEAD are in memory. The output appears complete or not at all. Blank lines are left out.

    Args:
        progress: called with the number of rows done.

    Raises:
        DataError: a line is not a JSON object, or a field is missing or not text; names file and line.
        ConfigError: `out_path` is a folder; and others: see GradingProcesses.start.
    """
    if out_path.is_dir():
        raise ConfigError(f"{out_path} is a folder; name the file that the graded rows are to be written to")
    for _ in _rows(in_path):
        pass
    with _written_whole(out_path) as out:
        processes = GradingProcesses(spec)
        await processes.start()
        try:
            return await _grade_all(in_path, out, processes, progress)
        finally:
            await processes.close()


async def _grade_all(
    in_path: Path, out: TextIO, processes: GradingProcesses, progress: Callable[[int], None] | None
) -> GradeSummary:
    summary = GradeSummary()
    ahead: deque[tuple[dict[str, Any], asyncio.Future[Grading]]] = deque()

    async def finish_first() -> None:
        row, future = ahead.popleft()
        grading = await future
        out.write(json.dumps({**row, **_columns(grading)}) + "\n")
        summary.rows += 1
        summary.correct += grading.verdict is Verdict.CORRECT
        summary.wrong += grading.verdict is Verdict.WRONG
        summary.errors += grading.verdict is Verdict.ERROR
        if progress is not None:
            progress(summary.rows)

    for row, item in _rows(in_path):
        if len(ahead) == ROWS_AHEAD:
            await finish_first()
        ahead.append((row, processes.submit(item)))
    while ahead:
        await finish_first()
    return summary


def _columns(grading: Grading) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "verdict": grading.verdict.value,
        "reward": grading.reward,
        "reason": grading.reason,
        "seconds": round(grading.seconds, 6),
        "parts": grading.parts,
    }
    return {**columns, "detail": grading.detail} if grading.detail else columns


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], GradingItem]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _row(path, number, line)


def _row(path: Path, number: int, line: bytes) -> tuple[dict[str, Any], GradingItem]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
    for name in ("completion", "gold"):
        if name not in row:
            raise DataError(
                f"{path}:{number}: no field `{name}`; a row needs `completion` and `gold`, got {sorted(row)[:10]}"
            )
    gold = row["gold"]
    if isinstance(gold, int | float) and not isinstance(gold, bool):
        gold = str(gold)  # as data sources write numbers out
    for name, value in (("completion", row["completion"]), ("gold", gold), ("prompt", row.get("prompt", ""))):
        if not isinstance(value, str):
            kinds = "text or a number" if name == "gold" else "text"
            raise DataError(f"{path}:{number}: `{name}` must be {kinds}, got {type(value).__name__}")
    return row, GradingItem(completion=row["completion"], gold=gold, prompt=row.get("prompt", ""))


@contextmanager
def _written_whole(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name when the block ends well, and not at all otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file = temporary.open("w", encoding="ascii")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
