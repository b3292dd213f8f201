"""The policy as the learner trains it: a causal language model whose forward pass returns log-probs of given tokens.

The language-model head runs inside the wrapped module's forward pass, chunk by chunk, so that logits [N, V] never
exist at once and so that ZeRO-3 gathers the head's weight, tied or not, in the forward and the backward pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from sapo_ray.algorithms.token_logprobs import token_logprobs
from sapo_ray.config.spec import ModelSpec
from sapo_ray.errors import ModelError

PREFIX = "causal_lm."
"""What the wrapper puts before the model's own parameter names."""

SCALED_HEADS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Configuration fields by which models change logits after the head."""


class Policy(nn.Module):
    """Wraps a Hugging Face causal language model.

    Rows are padded on the right and no attention mask is given: attention is causal, so no real token ever sees the
    padding behind it, positions count from 0 in every row, and fused causal kernels stay usable.
    """

    causal_lm: Any

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, input_ids: Tensor, selected: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs of tokens 1.. of each row at `temperature`, and the entropy of their distributions.

        input_ids: int64 [B, L]. selected: bool [B, L-1], the tokens wanted, at least one.
        Returns two float32 [B, L-1], 0 where not selected; no gradient flows through the entropy.
        """
        hidden = self.causal_lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        # Read here, in the wrapper's own forward pass, so that ZeRO-3 takes note of it as a parameter of the wrapper.
        weight = self.causal_lm.get_output_embeddings().weight
        # Under autocast (the canary) the last norm may leave another dtype than the head's.
        hidden = hidden[:, :-1][selected].to(weight.dtype)
        values, entropies = token_logprobs(hidden, weight, input_ids[:, 1:][selected], temperature)
        empty = torch.zeros(selected.shape, dtype=torch.float32, device=hidden.device)
        return empty.masked_scatter(selected, values), empty.masked_scatter(selected, entropies)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Parameters by the model's own names, in its order; tied ones once."""
        return {name.removeprefix(PREFIX): parameter for name, parameter in self.named_parameters()}


def load_policy(path: str, spec: ModelSpec, gradient_checkpointing: bool) -> Policy:
    """Load a model folder (or Hub id) for training, without dropout.

    Dropout is off because it would make r differ from 1 where the policy has not changed.

    Raises
        ModelError: it cannot be loaded, or its head is of a kind that the log-probs here would be wrong for
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=spec.trust_remote_code)
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, spec.dtype),
            trust_remote_code=spec.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model.path {Path(path).name!r} cannot be loaded as a causal language model: {error}"
        ) from error
    refuse_unsupported(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(model.train())


def refuse_unsupported(model: Any) -> None:
    """Raise ModelError where log-probs are more than log_softmax(hidden @ weight.T / temperature)."""
    head: Any = model.get_output_embeddings()
    kind = f"{type(model).__name__} ({getattr(model.config, 'model_type', '?')})"
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{kind}: the language-model head must be a linear layer, got {type(head).__name__}")
    bias: object = head.bias
    if bias is not None:
        raise ModelError(f"{kind}: a language-model head with a bias is not supported; choose a model without")
    converted = get_model_conversion_mapping(model, add_legacy=False)
    if converted:
        raise ModelError(
            f"{kind}: its weights have other names and shapes in memory than on disk (as of fused experts), so what is "
            "published would not load; choose a dense model"
        )
    config = model.config.get_text_config()
    for name in SCALED_HEADS:
        value = getattr(config, name, None)
        if value not in (None, 1, 1.0):
            raise ModelError(f"{kind}: {name} = {value} changes the logits after the head, which is not supported")


@torch.no_grad()
def check_head(policy: Policy, vocabulary: int) -> None:
    """Compare `Policy.forward` with the model's own logits on a few tokens, through whatever wraps its modules.

    Collective under ZeRO-3. Raises ModelError where the two differ: the model does something to its logits that
    refuse_unsupported does not know.
    """
    device = next(policy.parameters()).device
    ids = torch.arange(8, device=device)[None] % vocabulary
    logp, _ = policy(ids, torch.ones(1, 7, dtype=torch.bool, device=device), 1.0)
    logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[:, :-1].float()
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    difference = (logp - expected).abs().max().item()
    if not difference < 0.1:
        raise ModelError(
            f"{type(policy.causal_lm).__name__}: log-probs from its last hidden states and its head differ from those "
            f"of its own logits by {difference:.3g}; it changes logits after the head, which is not supported"
        )
