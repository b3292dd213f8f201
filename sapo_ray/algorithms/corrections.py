"""Train-inference mismatch: the sampler's log-probs are not the learner's.

rho = exp(old_logp - rollout_logp), per token, the learner's old policy against the sampler. A correction turns rho
into a detached factor on the token's loss. What it rejects gets factor 0 and stays in every denominator.

    tis                 min(rho, C)                                       truncated importance sampling
    icepop              rho where 0.5 <= rho <= C, else 0                 two-sided token mask
    sequence_mask       1 where 1/C <= exp(mean log rho) <= C, else 0     geometric mean over the sequence
    sequence_mask_tis   that mask, and min(rho, 2) on what it keeps
    product_mask        1 where 1/C <= product of rho <= C, else 0        drops long sequences by chance alone
    none                1
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from sapo_ray.algorithms.gates import MAX_LOG_RATIO
from sapo_ray.algorithms.presets import CorrectionKind

ICEPOP_LOW = 0.5
MASKED_TIS_CAP = 2.0


class Correction(NamedTuple):
    """What a correction does to a micro-batch."""

    factor: Tensor
    """[B, T], detached; multiplies the loss of each token. 1 on padding."""
    rejected: Tensor
    """[B, T] bool: tokens whose factor was made 0."""
    rejected_sequences: Tensor
    """[B] bool: completions rejected as a whole."""


def correct(kind: CorrectionKind, cap: float, *, old_logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Correction:
    """Factors of a correction.

    old_logp, rollout_logp: [B, T] float32; mask: [B, T] bool, tokens of the completions. What lies outside the mask
    is never looked at. cap: C of the table above (> 1); ignored by `none`; defaults in presets.py.
    """
    mask = mask.bool()
    log_rho = torch.where(mask, old_logp.detach() - rollout_logp.detach(), 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    keep = torch.ones_like(mask)
    factor = torch.ones_like(log_rho)
    if kind == "tis":
        factor = log_rho.exp().clamp(max=cap)
    elif kind == "icepop":
        factor = log_rho.exp()
        keep = (factor >= ICEPOP_LOW) & (factor <= cap)
    elif kind in ("sequence_mask", "sequence_mask_tis", "product_mask"):
        total = log_rho.sum(dim=1, keepdim=True)
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        distance = total if kind == "product_mask" else total / lengths
        keep = (distance.abs() <= math.log(cap)).expand_as(mask)
        if kind == "sequence_mask_tis":
            factor = log_rho.exp().clamp(max=MASKED_TIS_CAP)
    elif kind != "none":
        raise ValueError(f"correction must be one of {', '.join(get_args(CorrectionKind))}, got {kind!r}")
    rejected = mask & ~keep
    whole = mask.any(dim=1) & ~keep.any(dim=1) if "mask" in kind else torch.zeros_like(mask.any(dim=1))
    return Correction(torch.where(rejected, 0.0, factor), rejected, whole)
