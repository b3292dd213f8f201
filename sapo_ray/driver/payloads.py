"""Payload files, written and read by Ray tasks so that the driver handles references only.

A file is a `.npz` of plain arrays, read with `allow_pickle=False`: for each field of a payload its values, all payloads
one after the other, and the length of each. Bits are kept as they are; texts are UTF-8 bytes.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import ray
from ray.exceptions import RayError

from sapo_ray.driver.files import append, fsync
from sapo_ray.driver.journal import json_line
from sapo_ray.driver.parts import Ref
from sapo_ray.errors import CheckpointError, PayloadLost
from sapo_ray.lost_payloads import payload_lost
from sapo_ray.types import CompletionPayload

_FIELDS: dict[str, np.dtype[Any]] = {
    "prompt_token_ids": np.dtype(np.int32),
    "token_ids": np.dtype(np.int32),
    "logprobs": np.dtype(np.float32),
    "text": np.dtype(np.uint8),
}


def save_payloads(path: str, *payloads: CompletionPayload) -> None:
    """Write payloads to one file; runs as a Ray task."""
    arrays: dict[str, np.ndarray] = {}
    for name, dtype in _FIELDS.items():
        rows = [_as_array(getattr(payload, name)) for payload in payloads]
        assert all(row.dtype == dtype for row in rows), f"{name} of a payload must be {dtype}"
        arrays[name] = np.concatenate(rows) if rows else np.empty(0, dtype)
        arrays[f"{name}_lengths"] = np.array([len(row) for row in rows], np.int64)
    np.savez(path, allow_pickle=False, **arrays)
    fsync(Path(path))


def load_payloads(path: str, count: int) -> list[CompletionPayload] | CompletionPayload:
    """Read them back; runs as a Ray task that returns `count` objects, so a single one comes without a list.

    Raises:
        CheckpointError: the file is not what `save_payloads` writes, or holds another number of payloads.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: _split(file[name], file[f"{name}_lengths"], dtype) for name, dtype in _FIELDS.items()}
        texts = [row.tobytes().decode("utf-8", "surrogatepass") for row in columns["text"]]
    except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
        raise CheckpointError(f"{path} holds no payloads that can be read ({error})") from error
    counts = {len(rows) for rows in columns.values()}
    if counts != {count}:
        raise CheckpointError(f"{path} holds {sorted(counts)} payloads, the checkpoint names {count}")
    payloads = [
        CompletionPayload(prompt_token_ids=prompt, token_ids=tokens, logprobs=logprobs, text=text)
        for prompt, tokens, logprobs, text in zip(
            columns["prompt_token_ids"], columns["token_ids"], columns["logprobs"], texts, strict=True
        )
    ]
    return payloads[0] if count == 1 else payloads


def _as_array(value: np.ndarray | str) -> np.ndarray:
    return np.frombuffer(value.encode("utf-8", "surrogatepass"), np.uint8) if isinstance(value, str) else value


def _split(values: np.ndarray, lengths: np.ndarray, dtype: np.dtype[Any]) -> list[np.ndarray]:
    if values.dtype != dtype or values.ndim != 1 or (lengths < 0).any() or lengths.sum() != len(values):
        raise ValueError(f"expected {dtype} values with lengths that cover them")
    return [part.copy() for part in np.split(values, np.cumsum(lengths)[:-1])] if len(lengths) else []


def append_texts(path: str, rows: list[dict[str, Any]], *payloads: CompletionPayload) -> None:
    """Append one JSON line a completion, all or none; runs as a Ray task."""
    lines = [json_line({**row, "completion": payload.text}) for row, payload in zip(rows, payloads, strict=True)]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        append(file, "".join(line + "\n" for line in lines))
    finally:
        os.close(file)


def _look(*_: CompletionPayload) -> None:
    """Runs if all of them are there."""


class RayPayloads:
    """`Payloads` over Ray. The tasks need no CPU of their own: they wait for a disk."""

    async def save(self, path: Path, refs: list[Ref]) -> None:
        try:
            await ray.remote(num_cpus=0)(save_payloads).remote(str(path), *refs)
        except RayError as error:
            if not payload_lost(error):
                raise
            raise PayloadLost(
                f"{path} cannot be written: finished samples went with the node that held them"
            ) from error

    async def lost(self, groups: list[list[Ref]]) -> list[int]:
        looks = [ray.remote(num_cpus=0)(_look).remote(*refs) for refs in groups]
        errors = await asyncio.gather(*looks, return_exceptions=True)
        if other := [error for error in errors if error is not None and not payload_lost(error)]:
            raise other[0]
        return [place for place, error in enumerate(errors) if error is not None]

    async def load(self, path: Path, count: int) -> list[Ref]:
        if count == 0:
            return []
        refs = ray.remote(num_cpus=0, num_returns=count)(load_payloads).remote(str(path), count)
        return refs if isinstance(refs, list) else [refs]

    async def log_texts(self, path: Path, rows: list[dict[str, Any]], refs: list[Ref]) -> None:
        await ray.remote(num_cpus=0)(append_texts).remote(str(path), rows, *refs)
