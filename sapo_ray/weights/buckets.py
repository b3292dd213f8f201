"""Layout of published weights: tensors in parameter order, packed into buckets of bounded size.

A bucket is the unit that is gathered from the shards, sent and loaded; whoever handles weights holds one at a time.
A tensor larger than a bucket is a bucket of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from sapo_ray.types import TensorMeta
from sapo_ray.weights.fingerprint import checksum64

ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Place of one tensor in its bucket."""

    name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Tensors that travel together."""

    slots: tuple[Slot, ...]
    nbytes: int


def plan_buckets(shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype, limit: int) -> list[Bucket]:
    """Pack `shapes`, in the order given, into buckets of at most `limit` bytes each (more for one larger tensor)."""
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    used = 0
    for name, shape in shapes:
        nbytes = prod(shape) * dtype.itemsize
        if slots and used + nbytes > limit:
            buckets.append(Bucket(slots=tuple(slots), nbytes=used))
            slots, used = [], 0
        slots.append(Slot(name=name, shape=shape, offset=used, nbytes=nbytes))
        used += -(-nbytes // ALIGNMENT) * ALIGNMENT
    if slots:
        buckets.append(Bucket(slots=tuple(slots), nbytes=used))
    return buckets


def tensor_at(buffer: torch.Tensor, offset: int, nbytes: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """View of one tensor inside a bucket's bytes (uint8 [N])."""
    return buffer[offset : offset + nbytes].view(dtype).view(*shape)


def tensor_meta(slot: Slot, bucket: int, buffer: torch.Tensor, dtype: torch.dtype) -> TensorMeta:
    """What a manifest says of the tensor that lies in `slot` of bucket number `bucket`, whose bytes are `buffer`."""
    return TensorMeta(
        name=slot.name,
        dtype=str(dtype).removeprefix("torch."),
        shape=slot.shape,
        bucket=bucket,
        offset=slot.offset,
        nbytes=slot.nbytes,
        checksum=checksum64(tensor_at(buffer, slot.offset, slot.nbytes, dtype, slot.shape)),
    )
