"""Payload files, written and read by Ray tasks so that the driver handles references only."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import ray

from sapo_ray.driver.parts import Ref
from sapo_ray.types import CompletionPayload


def save_payloads(path: str, *payloads: CompletionPayload) -> None:
    """Write payloads to one file; runs as a Ray task."""
    with Path(path).open("wb") as file:
        pickle.dump(payloads, file)
        file.flush()
        os.fsync(file.fileno())


def load_payloads(path: str, count: int) -> list[CompletionPayload]:
    """Read them back, as `count` separate objects; runs as a Ray task."""
    payloads: tuple[CompletionPayload, ...] = pickle.loads(Path(path).read_bytes())
    assert len(payloads) == count, f"{path} holds {len(payloads)} payloads, the checkpoint names {count}"
    return list(payloads)


def append_texts(path: str, rows: list[dict[str, Any]], *payloads: CompletionPayload) -> None:
    """Append one JSON line a completion; runs as a Ray task."""
    with Path(path).open("a", encoding="utf-8") as file:
        for row, payload in zip(rows, payloads, strict=True):
            file.write(json.dumps({**row, "completion": payload.text}, ensure_ascii=False) + "\n")


class RayPayloads:
    """`Payloads` over Ray. The tasks need no CPU of their own: they wait for a disk."""

    async def save(self, path: Path, refs: list[Ref]) -> None:
        await ray.remote(num_cpus=0)(save_payloads).remote(str(path), *refs)

    async def load(self, path: Path, count: int) -> list[Ref]:
        if count == 0:
            return []
        refs = ray.remote(num_cpus=0, num_returns=count)(load_payloads).remote(str(path), count)
        return refs if isinstance(refs, list) else [refs]

    async def log_texts(self, path: Path, rows: list[dict[str, Any]], refs: list[Ref]) -> None:
        await ray.remote(num_cpus=0)(append_texts).remote(str(path), rows, *refs)
