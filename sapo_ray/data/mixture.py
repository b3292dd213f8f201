"""The order of prompts: which source comes next, and which of its rows.

A pure function of seed, weights and numbers of rows, so that a position in it is one small number per source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def next_source(weights: Sequence[float], taken: Sequence[int]) -> int:
    """The source that is furthest behind its share after `taken` takes of each; the first of those equally far.

    No chance is involved: after every take each source is within one take or so of its exact share, which draws
    would leave off by the square root of their number.
    """
    takes = sum(taken) + 1
    total = sum(weights)
    behind = [weight / total * takes - count for weight, count in zip(weights, taken, strict=True)]
    return behind.index(max(behind))


@lru_cache(maxsize=64)
def epoch_order(seed: int, name: str, epoch: int, rows: int) -> np.ndarray:
    """int64 [rows]: the order of a source's rows in an epoch, every row once.

    By raw output of a bit generator, which NumPy promises never to change, unlike that of `permutation`.
    """
    digest = hashlib.blake2b(f"{seed}/{name}/{epoch}".encode(), digest_size=16).digest()
    draws = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(rows)
    return np.argsort(draws, kind="stable")
