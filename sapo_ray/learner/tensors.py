"""Rows of a micro-batch as padded tensors.

All per-token tensors are aligned with the tokens they speak of: column t is token t + 1 of the row, so a row of
length L has L - 1 columns, and completion tokens fill columns prompt_tokens - 1 to L - 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sapo_ray.learner.batching import MicroBatch, Row
from sapo_ray.types import CompletionPayload


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A micro-batch; B rows, L the length of the longest."""

    input_ids: Tensor
    """int64 [B, L], padded on the right."""
    selected: Tensor
    """bool [B, L-1], tokens whose log-probs are computed: completions, or one token of an empty micro-batch."""
    mask: Tensor
    """bool [B, L-1], completion tokens."""
    rollout_logp: Tensor
    """float32 [B, L-1]"""
    advantages: Tensor
    """float32 [B]"""
    loss_weights: Tensor
    """float32 [B]"""
    groups: Tensor
    """int64 [B]"""
    ages: Tensor
    """int64 [B, L-1]"""


def collate(rows: MicroBatch, payloads: Sequence[CompletionPayload], device: torch.device) -> Batch:
    """Pad the rows' payloads into tensors.

    An empty micro-batch becomes one row of two tokens outside the mask: its forward and backward passes take part in
    every collective and add exactly zero.
    """
    width = max((row.length for row in rows), default=2)
    count = max(1, len(rows))
    ids = np.zeros((count, width), dtype=np.int64)
    mask = np.zeros((count, width - 1), dtype=np.bool_)
    logp = np.zeros((count, width - 1), dtype=np.float32)
    ages = np.zeros((count, width - 1), dtype=np.int64)
    for place, row in enumerate(rows):
        payload = payloads[row.slot]
        _check(row, payload)
        start, end = row.prompt_tokens, row.length
        ids[place, :start] = payload.prompt_token_ids
        ids[place, start:end] = payload.token_ids
        mask[place, start - 1 : end - 1] = True
        logp[place, start - 1 : end - 1] = payload.logprobs
        for first, last, age in row.ages:
            ages[place, start - 1 + first : start - 1 + last] = age
    selected = mask.copy()
    if not rows:
        selected[0, 0] = True
    return Batch(
        input_ids=torch.from_numpy(ids).to(device),
        selected=torch.from_numpy(selected).to(device),
        mask=torch.from_numpy(mask).to(device),
        rollout_logp=torch.from_numpy(logp).to(device),
        advantages=torch.tensor([row.advantage for row in rows] or [0.0], dtype=torch.float32, device=device),
        loss_weights=torch.tensor([row.weight for row in rows] or [0.0], dtype=torch.float32, device=device),
        groups=torch.tensor([row.group for row in rows] or [0], device=device),
        ages=torch.from_numpy(ages).to(device),
    )


def _check(row: Row, payload: CompletionPayload) -> None:
    """A payload is the one that its metadata promised."""
    sizes = (len(payload.prompt_token_ids), len(payload.token_ids), len(payload.logprobs))
    assert sizes == (row.prompt_tokens, row.tokens, row.tokens), (row.id, sizes, row.prompt_tokens, row.tokens)
    assert row.prompt_tokens > 0, f"{row.id}: a completion without a prompt has no first token to condition on"
