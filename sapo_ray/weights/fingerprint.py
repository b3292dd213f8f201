"""One definition of what "the same weights" means, for every sender, receiver and transport.

A tensor's checksum is taken over its bytes in wire dtype (after the cast to the rollout dtype, before any engine
repacks them), with the same integer arithmetic on CPU and GPU:

    checksum = sum_i  x_i * m(i)   mod 2**64

where x_i are the bytes read as 64-bit words (the last one padded with zeros) and m(i) is a fixed odd 64-bit
multiplier of position i. Odd multipliers are units modulo 2**64, so any change of a single word changes the sum.
Changes of several words can cancel: for random ones, exchanged words included, the chance is 2**-64; an even number of
words that change in their highest bit alone always do. It detects damage, not malice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import torch

from sapo_ray.types import PolicyVersion, TensorMeta

_BLOCK = 1 << 18  # words hashed at once: 2 MB of multipliers


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64 (wraps); arithmetic shifts serve as well as logical ones here."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)


@lru_cache(maxsize=4)
def _multipliers(device: torch.device) -> torch.Tensor:
    """Odd multipliers of the positions within a block, int64 [_BLOCK]."""
    return _mix(torch.arange(1, _BLOCK + 1, dtype=torch.int64, device=device)) | 1


def checksum64(tensor: torch.Tensor) -> int:
    """Checksum of a tensor's bytes in [0, 2**64), on the device where it lies.

    Temporary memory is bounded by one block (2 MB), whatever the tensor's size, if it is contiguous.
    """
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    tail = raw.new_zeros(8)
    tail[: raw.numel() - whole] = raw[whole:]
    multipliers = _multipliers(raw.device)
    total, words = 0, [*torch.split(raw[:whole].view(torch.int64), _BLOCK), tail.view(torch.int64)]
    for number, block in enumerate(words):
        factors = multipliers[: block.numel()]
        # dot is the faster form, but CUDA has none for integers.
        part = torch.dot(block, factors) if block.device.type == "cpu" else (block * factors).sum()
        # Each block has an odd factor of its own, so that blocks cannot be exchanged unnoticed.
        total += int(part.item()) * (number * 0x9E3779B97F4A7C15 * 2 + 1)
    return total % 2**64


def fingerprint(version: PolicyVersion, tensors: Iterable[TensorMeta]) -> str:
    """Identity of a whole set of weights: 16 hex digits over the version and each tensor in name order."""
    digest = hashlib.blake2b(str(version).encode(), digest_size=8)
    for meta in sorted(tensors, key=lambda meta: meta.name):
        digest.update(f"|{meta.name}|{meta.dtype}|{list(meta.shape)}|{meta.checksum:016x}".encode())
    return digest.hexdigest()
