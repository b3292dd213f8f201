"""What a driver that is gone left in its run directory: events it could not deliver, files nobody wants any more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

from sapo_ray.api.link import MAX_BATCH

log = structlog.get_logger("sapo_ray.control.reconciler")

LOG_BYTES = 4 << 20
DISCARDED = ("checkpoints", "export")
"""What `discard` removes from a run directory."""


def undelivered(run_dir: Path, attempt: int, next_seq: int) -> Iterator[list[dict[str, Any]]]:
    """Events of an attempt from `next_seq` on that are in its journal, in batches as the driver would send them.

    The driver makes an event durable before it sends it, so whatever the control plane missed while it was away is
    here. Ends at the first gap or damaged line: what follows could not be stored anyway.
    """
    batch: list[dict[str, Any]] = []
    for event in _events(run_dir / "journal.jsonl", attempt):
        if event["seq"] < next_seq:
            continue
        if event["seq"] > next_seq:
            log.warning("journal_gap", run_dir=str(run_dir), attempt=attempt, expected=next_seq, found=event["seq"])
            break
        batch.append(event)
        next_seq += 1
        if len(batch) == MAX_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _events(path: Path, attempt: int) -> Iterator[dict[str, Any]]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # a crash in mid-write
            if b'"seq"' not in line:
                continue  # the ledger, by far the larger part
            try:
                event = json.loads(line.decode())
            except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
                log.warning("journal_damaged", path=str(path), line=number, error=str(error))
                return
            if isinstance(event, dict) and isinstance(event.get("seq"), int) and event.get("attempt") == attempt:
                yield event


def keep_log(run_dir: Path, attempt: int, text: str) -> None:
    """What the driver printed, beside its actors' logs: the cluster forgets it when it ends. The end, if it is long."""
    if not text:
        return
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"driver-{attempt}.log").write_bytes(text.encode("utf-8", "replace")[-LOG_BYTES:])


def discard(run_dir: Path) -> list[str]:
    """Delete checkpoints and export; returns what was there. Raises OSError if something could not be deleted."""
    found = [name for name in DISCARDED if (run_dir / name).exists()]
    for name in found:
        shutil.rmtree(run_dir / name)
    return found
