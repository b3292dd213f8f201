"""The journal of a run: what happened, in order, durable before anything that depends on it is visible.

`journal.jsonl` holds two streams in one file. The *ledger* follows every prompt and completion (`bounds`, `issued`,
`graded`, `dropped`, `consumed`, `published`, ...). *Events* are for people and for the control plane (`transition`,
`phase`, `step`, `evaluation`, `condition`, ...); each carries `seq`, contiguous from 1 within its attempt.

A line is one JSON object with `time` (Unix seconds), `attempt`, `kind`, and the fields of its kind. Lines are buffered
and made durable together: `sync()` before anything that depends on them becomes visible.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sapo_ray.driver.files import append, came_of_a_full_disk
from sapo_ray.driver.masking import Hidden, masked
from sapo_ray.errors import CheckpointError, DiskFull, ResourceError, SapoRayError

log = logging.getLogger(__name__)

Listener = Callable[[dict[str, Any]], None]
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Journal:
    """Appends to a run's journal. One writer per run, guarded by the run's lock.

    A line leaves the queue only when it is on the disk. A write that fails, on a full disk mostly, is taken back, so
    that the next `sync` begins at the end of a whole line with everything that is still missing. `hidden` values of
    secrets are masked in all texts.
    """

    def __init__(self, path: Path, attempt: int, listener: Listener | None = None, hidden: Hidden = ()) -> None:
        _cut_torn_tail(path)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.path = path
        self.attempt = attempt
        self.seq = 0
        """Number of the newest event, be it on the disk or not."""
        self.start = self.durable = os.fstat(self._file).st_size
        """Bytes in the file when this attempt began; bytes that are on the disk."""
        self._closed = False
        self._fence: SapoRayError | None = None
        self._unsynced: list[str] = []
        self._listener = listener
        self._hidden = hidden
        self._order = threading.Lock()
        self._lock = threading.Lock()

    def ledger(self, kind: str, **fields: Any) -> None:
        """Record what happened to prompts and completions."""
        with self._order:
            self._append({"time": time.time(), "attempt": self.attempt, "kind": kind, **fields})

    def event(self, kind: str, **fields: Any) -> None:
        """Record something people or the control plane should hear of, and tell the listener."""
        with self._order:
            record = {"time": time.time(), "attempt": self.attempt, "seq": self.seq + 1, "kind": kind, **fields}
            self.seq += 1  # first: the link may ship the line, and be told of its number, before `_append` returns
            try:
                self._append(record)
            except BaseException:
                self.seq -= 1
                raise
        if self._listener is not None:
            try:
                self._listener(record)
            except Exception:  # whoever looks on must not end the run
                log.exception("the listener failed at event %s; it is not told of further events", kind)
                self._listener = None

    def _append(self, record: dict[str, Any]) -> None:
        self.check()
        self._unsynced.append(json_line(masked(record, self._hidden) if self._hidden else record))

    def fence(self, reason: SapoRayError) -> None:
        """Write no more, from this moment on: the run is another attempt's. Every later call raises `reason`."""
        with self._lock:
            self._fence = reason
            self._unsynced.clear()

    def check(self) -> None:
        """Raise the reason of the fence, if there is one."""
        if self._fence is not None:
            raise type(self._fence)(str(self._fence))

    def sync_now(self) -> None:
        """Write and fsync everything recorded so far.

        Raises:
            ResourceError: the disk did not take it (DiskFull: it is full); nothing is lost, the next call tries again.
        """
        with self._lock:
            self.check()
            lines = list(self._unsynced)
            if not lines:
                return
            try:
                append(self._file, "\n".join(lines) + "\n")
                self.durable = os.fstat(self._file).st_size
            except OSError as error:
                kind = DiskFull if came_of_a_full_disk(self.path, error) else ResourceError
                raise kind(
                    f"{self.path} cannot be written ({error.strerror}); free some space on its disk, "
                    "then `sapo-ray resume` the run"
                ) from error
            del self._unsynced[: len(lines)]

    async def sync(self) -> None:
        """As `sync_now`, off the event loop."""
        await asyncio.to_thread(self.sync_now)

    def close(self) -> None:
        """Make the rest durable and close."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._fence is None:
                self.sync_now()
        finally:
            os.close(self._file)


def json_line(record: dict[str, Any]) -> str:
    """Compact JSON that is valid UTF-8, whatever was in the record.

    A number that is not finite, which JSON does not have, is null; half of a surrogate pair, which UTF-8 does not have
    (names of files that are not text, completions that end within a character), is U+FFFD.
    """
    try:
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        line = json.dumps(_finite(record), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return line if line.isascii() else _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", line)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines of a journal, oldest first. A torn last line (a crash in mid-write) is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise CheckpointError(f"{path}:{number}: not a journal line ({error}); the file was damaged") from error


def last_attempt(path: Path) -> int:
    """Attempt of a journal's last whole line; 0 if it has none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        end = _line_start(file, file.seek(0, os.SEEK_END))  # a torn line after it may be being written
        file.seek(_line_start(file, max(0, end - 1)))
        line = file.read(end - file.tell())
    try:
        return int(json.loads(line)["attempt"]) if line else 0
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the last line of {path} is no journal line ({error}); the file was damaged: remove that line"
        ) from error


def _cut_torn_tail(path: Path) -> None:
    """Drop a half-written last line, so that the next append starts on a line of its own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = _line_start(file, size)
        if start < size:
            file.truncate(start)


def _line_start(file: BinaryIO, end: int) -> int:
    """Place after the last newline before `end`."""
    start = end
    while start > 0:
        step = min(start, 1 << 16)
        file.seek(start - step)
        newline = file.read(step).rfind(b"\n")
        if newline >= 0:
            return start - step + newline + 1
        start -= step
    return 0
