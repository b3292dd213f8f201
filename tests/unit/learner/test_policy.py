"""The wrapped model: log-probs against the model's own logits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sapo_ray.config.spec import ModelSpec
from sapo_ray.errors import ModelError
from sapo_ray.learner.policy import Policy, check_head, load_policy, refuse_unsupported

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}


def qwen(**changes: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL | changes)).eval()


def own_logprobs(model: Any, ids: list[int], temperature: float) -> torch.Tensor:
    """float32 [L-1], from the model's logits of this one unpadded row."""
    row = torch.tensor([ids])
    logits = model(input_ids=row).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_padded_rows_are_those_of_each_row_alone(tied: bool, temperature: float) -> None:
    model = qwen(tie_word_embeddings=tied)
    rows = [[5, 9, 2, 33, 41, 7], [8, 3, 11], [1, 2, 3, 4]]
    ids = torch.zeros(3, 6, dtype=torch.int64)
    selected = torch.zeros(3, 5, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        selected[place, : len(row) - 1] = True
    logp, entropy = Policy(model)(ids, selected, temperature)
    for place, row in enumerate(rows):
        torch.testing.assert_close(logp[place, : len(row) - 1], own_logprobs(model, row, temperature))
        assert not logp[place, len(row) - 1 :].any()
    own = (model(input_ids=ids[:1]).logits[0, :-1] / temperature).softmax(-1)
    torch.testing.assert_close(entropy[0], -(own * own.log()).sum(-1))


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_models_own_logits(tied: bool) -> None:
    model, twin = qwen(tie_word_embeddings=tied), qwen(tie_word_embeddings=tied)
    ids = [5, 9, 2, 33, 41, 7]
    logp, _ = Policy(model)(torch.tensor([ids]), torch.tensor([[False, False, True, True, True]]), 0.7)
    logp.sum().backward()
    own_logprobs(twin, ids, 0.7)[2:].sum().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_tensors_bear_the_models_own_names_and_tied_ones_come_once() -> None:
    tied, untied = qwen(tie_word_embeddings=True), qwen(tie_word_embeddings=False)
    assert list(Policy(tied).tensors()) == [name for name, _ in tied.named_parameters()]
    assert "lm_head.weight" not in Policy(tied).tensors()
    assert "lm_head.weight" in Policy(untied).tensors()


def test_a_model_without_a_head_bias_and_with_plain_logits_is_accepted() -> None:
    refuse_unsupported(qwen())
    check_head(Policy(qwen()), 60)
    refuse_unsupported(GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=1)))


def test_a_head_with_a_bias_is_refused() -> None:
    with pytest.raises(ModelError, match=r"PhiForCausalLM \(phi\).*head with a bias"):
        refuse_unsupported(PhiForCausalLM(PhiConfig(**SMALL | {"num_key_value_heads": 2})))


def test_soft_capped_logits_are_refused() -> None:
    with pytest.raises(ModelError, match=r"final_logit_softcapping = 30.0"):
        refuse_unsupported(Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16)))


def test_fused_experts_are_refused() -> None:
    config = Qwen3MoeConfig(**SMALL, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    with pytest.raises(ModelError, match="choose a dense model"):
        refuse_unsupported(Qwen3MoeForCausalLM(config))


class _Louder(Qwen2ForCausalLM):
    """Multiplies its logits behind the back of any configuration."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def test_a_model_that_changes_logits_in_secret_is_found_out() -> None:
    torch.manual_seed(1)
    model = _Louder(Qwen2Config(**SMALL)).eval()
    refuse_unsupported(model)
    with pytest.raises(ModelError, match=r"_Louder: log-probs .* differ"):
        check_head(Policy(model), 60)


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    qwen(attention_dropout=0.5).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), ModelSpec(path=str(tmp_path), dtype="float32"), gradient_checkpointing=False)
    assert policy.training
    ids, selected = torch.arange(12)[None], torch.ones(1, 11, dtype=torch.bool)
    first, second = (policy(ids, selected, 1.0)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    qwen().save_pretrained(tmp_path)
    spec = ModelSpec(path=str(tmp_path), dtype="float32")
    ids, selected = torch.arange(12)[None], torch.ones(1, 11, dtype=torch.bool)
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(str(tmp_path), spec, gradient_checkpointing=checkpointing)
        policy(ids, selected, 1.0)[0].sum().backward()
        gradients.append({name: p.grad for name, p in policy.tensors().items()})
    assert policy.causal_lm.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.path 'nothing' cannot be loaded"):
        load_policy(str(tmp_path / "nothing"), ModelSpec(path="nothing"), gradient_checkpointing=False)
