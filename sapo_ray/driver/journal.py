"""The journal of a run: what happened, in order, durable before anything that depends on it is visible.

`journal.jsonl` holds two streams in one file. The *ledger* follows every prompt and completion (`issued`, `graded`,
`dropped`, `consumed`, `rollback`, `checkpoint`). *Events* are for people and for the control plane (`transition`,
`phase`, `step`, `evaluation`, `condition`, ...); each carries `seq`, contiguous from 1 within its attempt.

A line is one JSON object with `time` (Unix seconds), `attempt`, `kind`, and the fields of its kind. Lines are buffered
and made durable together: `sync()` before anything that depends on them becomes visible.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sapo_ray.errors import CheckpointError

log = logging.getLogger(__name__)

Listener = Callable[[dict[str, Any]], None]


class Journal:
    """Appends to a run's journal. One writer per run, guarded by the run's lock."""

    def __init__(self, path: Path, attempt: int, listener: Listener | None = None) -> None:
        _cut_torn_tail(path)
        self._file = path.open("a", encoding="utf-8")
        self._attempt = attempt
        self._seq = 0
        self._unsynced: list[str] = []
        self._listener = listener
        self._lock = asyncio.Lock()

    def ledger(self, kind: str, **fields: Any) -> None:
        """Record what happened to prompts and completions."""
        self._append({"time": time.time(), "attempt": self._attempt, "kind": kind, **fields})

    def event(self, kind: str, **fields: Any) -> None:
        """Record something people or the control plane should hear of, and tell the listener."""
        self._seq += 1
        record = {"time": time.time(), "attempt": self._attempt, "seq": self._seq, "kind": kind, **fields}
        self._append(record)
        if self._listener is not None:
            try:
                self._listener(record)
            except Exception:  # whoever looks on must not end the run
                log.exception("the listener failed at event %s; it is not told of further events", kind)
                self._listener = None

    def _append(self, record: dict[str, Any]) -> None:
        self._unsynced.append(json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False))

    def sync_now(self) -> None:
        """Write and fsync everything recorded so far."""
        lines, self._unsynced = self._unsynced, []
        if lines:
            self._write(lines)

    def _write(self, lines: list[str]) -> None:
        self._file.write("\n".join(lines) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    async def sync(self) -> int:
        """As `sync_now`, off the event loop. Returns the journal's length in bytes."""
        async with self._lock:
            lines, self._unsynced = self._unsynced, []
            if lines:
                await asyncio.to_thread(self._write, lines)
            return self._file.tell()

    def close(self) -> None:
        """Make the rest durable and close."""
        if not self._file.closed:
            self.sync_now()
            self._file.close()


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines of a journal, oldest first. A torn last line (a crash in mid-write) is left out."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise CheckpointError(f"{path}:{number}: not a journal line ({error}); the file was damaged") from error


def _cut_torn_tail(path: Path) -> None:
    """Drop a half-written last line, so that the next append starts on a line of its own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = size
        while start > 0:
            step = min(start, 1 << 16)
            file.seek(start - step)
            newline = file.read(step).rfind(b"\n")
            if newline >= 0:
                start = start - step + newline + 1
                break
            start -= step
        if start < size:
            file.truncate(start)
