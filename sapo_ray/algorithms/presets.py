"""Names and default numbers of the algorithm. Plain numbers: reading a job needs no torch."""

from __future__ import annotations

import math
from typing import Literal

LossKind = Literal["sapo", "grpo", "dr_grpo", "gspo", "cispo"]
CorrectionKind = Literal["tis", "icepop", "sequence_mask", "sequence_mask_tis", "product_mask", "none"]

SMOOTH_GATES = ("sigmoid", "erf", "arctan", "softsign")

TAU_PRESETS: dict[str, tuple[float, float]] = {
    "qwen": (1.0, 1.05),  # Soft Adaptive Policy Optimization, arXiv 2511.20347
    "study": (10.0, 12.0),  # A Systematic Study of Gate Functions in SAPO, arXiv 2602.19345
}
"""(tau_pos, tau_neg) by name."""

HALF_WIDTH: dict[str, float] = {
    "sigmoid": 2.0 * math.acosh(math.sqrt(2.0)),  # sech^2(u/2) = 1/2
    "erf": math.sqrt(2.0 * math.log(2.0)),  # exp(-u^2/2) = 1/2
    "arctan": 1.0,  # 1/(1+u^2) = 1/2
    "softsign": math.sqrt(2.0 ** (2.0 / 3.0) - 1.0),  # (1+u^2)^(-3/2) = 1/2
}
"""|u| = tau |r - 1| at which a gate's weight is 1/2."""

CORRECTION_CAP: dict[CorrectionKind, float] = {
    "tis": 2.0,
    "icepop": 5.0,
    "sequence_mask": 1.05,
    "sequence_mask_tis": 1.05,
    "product_mask": 3.0,
    "none": 1.0,
}
"""Bound C of each mismatch correction (corrections.py)."""


def matched_tau(gate: str, tau: float) -> float:
    """The temperature that gives `gate` the half-width of the sigmoid at `tau` (clip has none: tau unchanged)."""
    if gate not in HALF_WIDTH:
        return tau
    return tau * HALF_WIDTH[gate] / HALF_WIDTH["sigmoid"]
