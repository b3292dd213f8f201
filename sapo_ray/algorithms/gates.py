"""Gates: what a token's probability ratio r = exp(log_ratio) is worth, and how fast that worth grows.

With u = tau (r - 1), every smooth gate has f(1) = 1, slope f'(1) = 1 at its one maximum, and a slope that falls
on both sides. Departures from the papers (Soft Adaptive Policy Optimization, arXiv 2511.20347; A Systematic Study
of Gate Functions in SAPO, arXiv 2602.19345):

- f is shifted so that f(1) = 1 for every gate and tau. The papers' sigmoid, (4/tau) sigma(u), is f - 1 + 2/tau:
  same gradient, but loss curves of different tau could not be compared.
- "softsign" is the algebraic sigmoid u/sqrt(1+u^2), as the papers use the word, not u/(1+|u|).
- `restoring` is this project's own: min(r A, f(r) A), as PPO does with clipping, so that the pull back to r = 1
  keeps its full slope. Where A < 0 and r > 1 its coefficient is bounded by `restoring_cap`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sapo_ray.algorithms.presets import HALF_WIDTH, SMOOTH_GATES, TAU_PRESETS, matched_tau

__all__ = ["HALF_WIDTH", "MAX_LOG_RATIO", "SMOOTH_GATES", "TAU_PRESETS", "GateValue", "evaluate", "matched_tau"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20: exp(88.8) is infinite in float32, and infinite times zero is NaN."""


class GateValue(NamedTuple):
    """A gate at some ratios; all of the shape of the log-ratios, without gradient."""

    value: Tensor
    """f(r), or its restoring variant; 1 at r = 1."""
    weight: Tensor
    """coefficient / r: f'(r), or 1 where the restoring variant keeps slope r."""
    coefficient: Tensor
    """d value / d log r = r * weight; what multiplies -A in the gradient of the loss."""


def evaluate(
    name: str,
    log_ratio: Tensor,
    tau: float | Tensor,
    *,
    positive: bool | Tensor = True,
    restoring: bool = False,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    restoring_cap: float = 3.0,
) -> GateValue:
    """Value, weight and coefficient of a gate.

    log_ratio: any shape, float32 or float64 (half precisions are computed in float32); clamped to +-MAX_LOG_RATIO.
    tau: > 0; a number or a tensor that broadcasts (tau_pos where A > 0, else tau_neg). `clip` ignores it.
    positive: whether A > 0; decides the branch of `clip` and of `restoring`.
    eps_low, eps_high: clip only. restoring_cap: >= 1, restoring only.

    Raises ValueError for a name that is no gate.
    """
    lr = log_ratio.detach()
    if lr.dtype not in (torch.float32, torch.float64):
        lr = lr.float()
    lr = lr.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    side = torch.as_tensor(positive, dtype=torch.bool, device=lr.device)
    if name == "clip":
        return _clip(lr, side, eps_low, eps_high)
    if isinstance(tau, Tensor):
        tau = tau.detach().to(lr)
    gate = _smooth(name, lr, tau)
    return _restoring(gate, lr, side, restoring_cap) if restoring else gate


def _smooth(name: str, lr: Tensor, tau: float | Tensor) -> GateValue:
    distance = torch.expm1(lr)
    u = tau * distance
    if name == "sigmoid":
        size = u.abs()
        value = 1.0 + 2.0 / tau * torch.tanh(0.5 * u)
        log_weight = math.log(4.0) - size - 2.0 * torch.log1p(torch.exp(-size))
    elif name == "erf":
        value = 1.0 + math.sqrt(0.5 * math.pi) / tau * torch.erf(u * math.sqrt(0.5))
        log_weight = -0.5 * u.square()
    elif name == "arctan":
        value = 1.0 + torch.atan(u) / tau
        log_weight = -torch.log1p(u.square())
    elif name == "softsign":
        value = 1.0 + distance / torch.hypot(u, torch.ones_like(u))
        log_weight = -1.5 * torch.log1p(u.square())
    else:
        raise ValueError(f"gate must be one of {', '.join((*SMOOTH_GATES, 'clip'))}, got {name!r}")
    # One exp of a sum: r alone may be huge where the weight underflows.
    return GateValue(value, torch.exp(log_weight), torch.exp(lr + log_weight))


def _clip(lr: Tensor, positive: Tensor, eps_low: float, eps_high: float) -> GateValue:
    """PPO's clipping: min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) / A."""
    ratio, distance = torch.exp(lr), torch.expm1(lr)
    inside = torch.where(positive, distance <= eps_high, distance >= -eps_low)
    bound = torch.where(positive, torch.full_like(ratio, 1.0 + eps_high), torch.full_like(ratio, 1.0 - eps_low))
    return GateValue(torch.where(inside, ratio, bound), inside.to(ratio), torch.where(inside, ratio, 0.0))


def _restoring(gate: GateValue, lr: Tensor, positive: Tensor, cap: float) -> GateValue:
    """min(r A, f(r) A) / A: f lies above r below 1, and below r above 1, so the minimum is r on the way back."""
    assert cap >= 1.0, f"restoring_cap must be >= 1, got {cap}"
    ratio = torch.exp(lr)
    log_cap = math.log(cap)
    beyond = lr > log_cap
    capped_value = torch.where(beyond, cap * (1.0 + lr - log_cap), ratio)
    capped_weight = torch.where(beyond, cap * torch.exp(-lr), 1.0)
    up, down = positive & (lr < 0), ~positive & (lr > 0)
    value = torch.where(up, ratio, torch.where(down, capped_value, gate.value))
    weight = torch.where(up, 1.0, torch.where(down, capped_weight, gate.weight))
    coefficient = torch.where(up, ratio, torch.where(down, ratio.clamp(max=cap), gate.coefficient))
    return GateValue(value, weight, coefficient)
