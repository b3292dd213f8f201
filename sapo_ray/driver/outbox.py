"""A driver's events, read back from its journal for whoever they are shipped to.

Nothing is kept but a place in the file and one batch: an outage of hours costs no memory. A lost answer, a gap or a
restart of the receiver is a number to go on from; going back is reading again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sapo_ray.api.link import MAX_BATCH
from sapo_ray.errors import CheckpointError

BATCH_BYTES = 256 << 10
"""Journal text in one batch; a single event may be longer."""
_HEAD = 96
"""`seq` stands within so many bytes of an event's line; lines of the ledger, which may be long, have none."""


class Outbox:
    """Events of one attempt by number. Not for more than one thread."""

    def __init__(self, path: Path, attempt: int, start: int) -> None:
        """`start`: length of the journal when the attempt began."""
        self._path, self._attempt, self._start = path, attempt, start
        self._offset, self._next = start, 1

    def batch(self, first_seq: int, end: int, count: int = MAX_BATCH) -> list[dict[str, Any]]:
        """At most `count` events from `first_seq` on, out of the journal's first `end` bytes.

        Raises:
            CheckpointError: a line of the journal cannot be read, or is not there any more.
        """
        if first_seq < self._next:
            self._offset, self._next = self._start, 1
        found: list[dict[str, Any]] = []
        with self._path.open("rb") as file:
            offset = file.seek(self._offset)
            size = 0
            while offset < end and len(found) < count and size < BATCH_BYTES:
                line = file.readline()
                if not line:
                    raise CheckpointError(
                        f"{self._path} has {offset} bytes, though {end} were durable: somebody cut it short"
                    )
                event = self._event(line, offset)
                if event is not None and event["seq"] >= first_seq:
                    if size + len(line) > BATCH_BYTES and found:
                        break
                    found.append(event)
                    size += len(line)
                offset += len(line)
                if not found:  # nothing before this place will be asked for, unless the receiver goes back
                    self._offset = offset
        self._next = first_seq
        return found

    def _event(self, line: bytes, offset: int) -> dict[str, Any] | None:
        if b'"seq":' not in line[:_HEAD]:
            return None
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise CheckpointError(
                f"{self._path} at byte {offset}: not a journal line ({error}); the file was damaged"
            ) from error
        return event if event["attempt"] == self._attempt else None
