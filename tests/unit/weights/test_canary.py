"""Prompts of any length make a canary that can be answered."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sapo_ray.errors import DataError
from sapo_ray.models.publish import publish_model
from sapo_ray.rollout.attestation import canary_differences
from sapo_ray.types import PolicyVersion, WeightsManifest
from sapo_ray.weights.canary import canary_sequences


def test_a_single_token_is_doubled_and_longer_prompts_stay() -> None:
    assert canary_sequences([[5], (1, 2, 3), [7, 8]]) == ((5, 5), (1, 2, 3), (7, 8))


def test_prompts_without_tokens_are_left_out_but_not_all_of_them() -> None:
    assert canary_sequences([[], [5]]) == ((5, 5),)
    with pytest.raises(DataError, match="have no tokens"):
        canary_sequences([[], []])


def test_a_model_published_with_prompts_of_one_token_has_a_canary_to_compare() -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=11, **shape, **heads))
    *_, manifest = publish_model(model, PolicyVersion(1, 0), torch.float32, ((5,), (3,)))
    assert isinstance(manifest, WeightsManifest)
    assert manifest.canary.sequences == ((5, 5), (3, 3))
    assert [len(row) for row in manifest.canary.logprobs] == [1, 1]
    assert canary_differences(manifest.canary, manifest.canary.logprobs) == (0.0, 0.0)
