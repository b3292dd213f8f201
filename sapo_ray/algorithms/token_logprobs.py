"""Log-probabilities of sampled tokens straight from hidden states: the [N, V] logits never exist at once.

At a vocabulary of 152k, the logits, their softmax and their gradient take gigabytes for a few thousand tokens; only
one number per token is wanted. Forward keeps the hidden states, the head's weight, the targets and one
log-sum-exp per token; backward computes logits again, block by block.

Forward goes over blocks of tokens (all of the vocabulary: one softmax per token). Backward goes over blocks of the
vocabulary (all tokens), which it may because the log-sum-exp is known: each block of the weight's gradient is then
one matrix product, written once. Nothing is summed up in half precision, and no second [V, H] buffer is needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_BLOCK_ELEMENTS = 1 << 21
"""Blocks of logits are not made smaller than this many elements (8 MB in float32)."""
BLOCKS = 32
"""A block is at most this part of the logits, above the minimum."""


class TokenLogprobs(NamedTuple):
    """Of each target token, float32 (float64 for float64 inputs)."""

    logp: Tensor
    """[N]"""
    entropy: Tensor
    """[N] of the whole distribution, nats; no gradient."""


def default_chunk_tokens(tokens: int, vocabulary: int) -> int:
    """Tokens whose logits exist at once: 1/32 of all, or as many as fill 8 MB of float32 logits."""
    wanted = max(-(-tokens // BLOCKS), MIN_BLOCK_ELEMENTS // vocabulary, 1)
    return max(min(tokens, wanted), 1)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int | None = None
) -> TokenLogprobs:
    """log_softmax(hidden @ weight.T / temperature) at `targets`, and the entropy of that distribution.

    hidden: [N, H]; weight: [V, H] of the same dtype, the head's parameter itself (a ZeRO-3 parameter must be gathered
    here and when backward runs; it is saved as it is, never as a copy or view). targets: [N] int64 in [0, V).
    temperature: > 0. chunk_tokens: tokens whose logits may exist at once; chosen from N and V if None.

    Logits are computed in the dtype of the inputs, all that follows in float32. Differentiable once, in hidden and
    weight. Extra memory: about two float32 blocks of chunk_tokens x V, and the gradients themselves.
    """
    assert hidden.dim() == weight.dim() == 2, (hidden.shape, weight.shape)
    assert targets.shape == hidden.shape[:1], (targets.shape, hidden.shape)
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    chunk = chunk_tokens or default_chunk_tokens(hidden.shape[0], weight.shape[0])
    logp, entropy = _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk)  # type: ignore[no-untyped-call]
    return TokenLogprobs(logp, entropy)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        tokens = hidden.shape[0]
        logp, entropy, lse = hidden.new_empty((3, tokens), dtype=_softmax_dtype(hidden.dtype)).unbind()
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            logp[part], entropy[part], lse[part] = _block_forward(hidden[part], weight, targets[part], temperature)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.block_elements = chunk * weight.shape[0]
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logp is None:
            return None, None, None, None, None
        grad_hidden, grad_weight = _backward(ctx, grad_logp)
        return grad_hidden, grad_weight, None, None, None


def _block_forward(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """logp, entropy and log-sum-exp [n] of a block of tokens; at most two [n, V] buffers in the softmax's dtype."""
    logits = (hidden @ weight.t()).to(_softmax_dtype(hidden.dtype)).div_(temperature)
    largest = logits.amax(dim=1, keepdim=True)
    logits.sub_(largest)
    at_target = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    weights = logits.exp()
    total = weights.sum(dim=1)
    log_total = total.log()
    # H = log Z - E[logit]: the product is formed in place.
    entropy = log_total - weights.mul_(logits).sum(dim=1) / total
    return at_target - log_total, entropy, largest.squeeze(1) + log_total


def _backward(ctx: Any, grad_logp: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """d logp_i / d logit_ij = (1[j = target_i] - p_ij) / temperature, a block of the vocabulary at a time."""
    hidden, weight, targets, lse = ctx.saved_tensors
    wants_hidden, wants_weight = ctx.needs_input_grad[:2]
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    # The sum over blocks of the vocabulary is kept in the softmax's dtype and rounded once.
    grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if wants_hidden else None
    grad_weight = torch.empty_like(weight) if wants_weight else None
    scale = (grad_logp / ctx.temperature).to(lse.dtype).unsqueeze(1)
    width = max(ctx.block_elements // max(tokens, 1), 1)
    for start in range(0, vocabulary, width):
        rows = weight[start : start + width]
        grad_logits = _block_grad(hidden, rows, targets - start, lse, scale, ctx.temperature)
        if grad_hidden is not None:
            grad_hidden += grad_logits @ rows
        if grad_weight is not None:
            torch.mm(grad_logits.t(), hidden, out=grad_weight[start : start + width])
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def _block_grad(
    hidden: Tensor, rows: Tensor, columns: Tensor, lse: Tensor, scale: Tensor, temperature: float
) -> Tensor:
    """Gradient in the logits [N, v] of a block of the vocabulary, in the dtype of the inputs.

    columns: [N] place of each target within the block; outside [0, v) for targets of other blocks.
    """
    logits = (hidden @ rows.t()).to(lse.dtype).div_(temperature)
    grad = logits.sub_(lse.unsqueeze(1)).exp_().mul_(-scale)
    inside = (columns >= 0) & (columns < rows.shape[0])
    at_target = scale * inside.unsqueeze(1)
    grad.scatter_add_(1, columns.clamp(0, rows.shape[0] - 1).unsqueeze(1), at_target)
    return grad.to(hidden.dtype)
