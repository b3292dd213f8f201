"""The loss of a micro-batch: one weighted sum over tokens, exact under any packing or split.

    loss = sum over tokens of  -A * (f + c * (logp - stop_grad(logp))) * correction * loss_weight

Its value is that of the objective, its gradient in logp is -A * c * correction * loss_weight. f, c and everything
else are detached, so no exponential lies in the backward pass.

    sapo      f a gate of the token's ratio (arXiv 2511.20347, 2602.19345)
    grpo      clipping (arXiv 2402.03300; eps_high 0.28 and token_mean are DAPO's, 2503.14476); dual_clip c bounds
              the loss where A < 0 and r > c, with no gradient beyond (1912.09729)
    dr_grpo   as grpo; other advantage and aggregation (2503.20783)
    gspo      clipping of the sequence ratio s = exp(mean log r), in the paper's token form s * pi/stop_grad(pi),
              whose gradient is that of the sequence form (2507.18071)
    cispo     min(r, 1 + eps_high) as a weight on logp, so no token loses its gradient (2506.13585). The value
              reported is that weight, 1 at r = 1 like the others', not the paper's weight * logp.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sapo_ray.algorithms.corrections import Correction, correct
from sapo_ray.algorithms.diagnostics import Tokens, TokenStats
from sapo_ray.algorithms.gates import MAX_LOG_RATIO, GateValue, evaluate
from sapo_ray.algorithms.settings import Objective


class TokenLoss(NamedTuple):
    """A micro-batch's part of the loss."""

    loss: Tensor
    """Scalar float32, already weighted: the update's loss is the sum over micro-batches and ranks."""
    stats: TokenStats


def token_loss(
    objective: Objective,
    *,
    logp: Tensor,
    old_logp: Tensor | None,
    rollout_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss_weights: Tensor,
    entropy: Tensor | None = None,
    ages: Tensor | None = None,
    groups: Tensor | None = None,
) -> TokenLoss:
    """Loss and diagnostics of one micro-batch.

    logp, old_logp, rollout_logp: [B, T] log-probs of the sampled tokens in training, at the start of the step, and
        as the sampler reported them. old_logp is not used in bypass mode and may be None there.
    mask: [B, T] bool, tokens of completions. Padding, and rows that only fill up a micro-batch, are False; what
        lies there is never looked at, be it infinite or NaN.
    advantages, loss_weights: [B] or [B, T]; see advantages.loss_weights. A weight of 0 takes a completion out of
        the loss and of the gate's statistics.
    For diagnostics only: entropy [B, T] nats, ages [B] or [B, T] of tokens, groups [B] integer names in the step.

    The loss hangs on logp even if everything is masked, so that backward runs on every rank.
    """
    mask = mask.bool()
    logp = torch.where(mask, logp, 0.0)
    reference = rollout_logp if objective.bypass else old_logp
    assert reference is not None, "old_logp is needed in decoupled mode"
    log_ratio = torch.where(mask, logp.detach() - reference.detach(), 0.0)
    advantage = torch.where(mask, _per_token(advantages, mask), 0.0)
    weights = torch.where(mask, _per_token(loss_weights, mask), 0.0)
    ratio, gate = _gate(objective, log_ratio, advantage > 0, mask)
    kind, cap = objective.correction, objective.correction_cap
    correction = correct(kind, cap, old_logp=reference, rollout_logp=rollout_logp, mask=mask)
    factor = weights * correction.factor
    loss = -(advantage * factor * (gate.value + gate.coefficient * (logp - logp.detach()))).sum()
    flat = _Flat(mask)
    tokens = Tokens(
        active=flat(weights > 0),
        advantage=flat(advantage),
        weight=flat(gate.weight),
        log_ratio=flat(ratio),
        mass=flat((advantage * factor * gate.coefficient).abs()),
        clamped=flat(ratio.abs() > MAX_LOG_RATIO),
        hard_clipped=flat(_hard_clipped(objective, log_ratio, advantage)),
        capped=flat(_capped(objective, ratio, advantage)),
        rejected=flat(correction.rejected),
        correction=flat(correction.factor),
        # In bypass mode the learner's old log-probs are not known: the policy in training stands for them.
        log_rho=flat((logp if objective.bypass else reference).detach() - rollout_logp),
        group=None if groups is None else flat(_per_token(groups, mask)),
        age=None if ages is None else flat(_per_token(ages, mask)),
        entropy=None if entropy is None else flat(entropy),
    )
    stats = TokenStats()
    stats.add(tokens, rejected_sequences=_count_rejected(correction, weights))
    return TokenLoss(loss, stats)


def _gate(objective: Objective, log_ratio: Tensor, positive: Tensor, mask: Tensor) -> tuple[Tensor, GateValue]:
    """The log-ratio that the objective looks at (of tokens, or gspo: of their sequence), and its gate there."""
    if objective.loss == "cispo":
        return log_ratio, _cispo(log_ratio, objective.eps_low, objective.eps_high)
    if objective.loss == "gspo":
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = torch.where(mask, log_ratio.sum(dim=1, keepdim=True) / lengths, 0.0)
    gate = evaluate(
        objective.gate,
        log_ratio,
        torch.full_like(log_ratio, objective.tau_neg).masked_fill(positive, objective.tau_pos),
        positive=positive,
        restoring=objective.restoring,
        eps_low=objective.eps_low,
        eps_high=objective.eps_high,
        restoring_cap=objective.restoring_cap,
    )
    return log_ratio, gate if objective.dual_clip is None else _dual_clip(gate, positive, objective.dual_clip)


def _cispo(log_ratio: Tensor, eps_low: float, eps_high: float) -> GateValue:
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    coefficient = log_ratio.exp().clamp(max(1.0 - eps_low, 0.0), 1.0 + eps_high)
    return GateValue(coefficient, coefficient * torch.exp(-log_ratio), coefficient)


def _dual_clip(gate: GateValue, positive: Tensor, bound: float) -> GateValue:
    beyond = ~positive & (gate.value > bound)
    return GateValue(
        torch.where(beyond, bound, gate.value),
        torch.where(beyond, 0.0, gate.weight),
        torch.where(beyond, 0.0, gate.coefficient),
    )


def _hard_clipped(objective: Objective, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """Tokens whose gradient PPO's clipping of the token ratio takes away."""
    distance = torch.expm1(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    above = (advantage > 0) & (distance > objective.clip_high)
    below = (advantage < 0) & (distance < -objective.clip_low)
    return above | below


def _capped(objective: Objective, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    if not objective.restoring:
        return torch.zeros_like(log_ratio, dtype=torch.bool)
    return (advantage < 0) & (log_ratio > math.log(objective.restoring_cap))


def _count_rejected(correction: Correction, weights: Tensor) -> int:
    """Completions rejected as a whole that would have carried loss."""
    return int((correction.rejected_sequences & (weights > 0).any(dim=1)).sum())


def _per_token(values: Tensor, mask: Tensor) -> Tensor:
    """[B] or [B, T] to [B, T]."""
    return values if values.dim() == 2 else values.unsqueeze(1).expand(mask.shape)


class _Flat:
    """Picks the tokens under a mask as a numpy array [n]."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, values: Tensor) -> np.ndarray:
        return values.detach()[self.mask].cpu().numpy()
