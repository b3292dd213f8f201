"""Estimates against real models, published parameter counts, and arithmetic done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sapo_ray.algorithms.token_logprobs import default_chunk_tokens
from sapo_ray.config.architecture import Architecture, find_architecture
from sapo_ray.config.estimate import _LOGIT_ELEMENTS, _LOGIT_SHARE, estimate, size
from sapo_ray.config.load import resolve
from sapo_ray.config.spec import ModelSpec
from sapo_ray.errors import ConfigError

QUICK = {"preset": "quickstart"}

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("path", "published"),
    [
        ("builtin:addition", 138_112),
        ("builtin:bytes", 148_352),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-14B", 14_770_033_664),
        ("Qwen/Qwen2.5-32B", 32_763_876_352),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_parameter_counts_of_known_models_are_the_published_ones(path: str, published: int):
    config = find_architecture(ModelSpec(path=path))
    assert config is not None
    assert Architecture.from_config(config).parameters == published


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
        ("qwen3", {"head_dim": 48}),
        ("qwen3", {"head_dim": 48, "attention_bias": True}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("mistral", {}),
    ],
)
def test_parameter_counts_are_those_of_the_model_that_transformers_builds(kind: str, changes: dict[str, Any]):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **(TINY | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ours = Architecture.from_config(config.to_dict())
    assert ours.parameters == sum(p.numel() for p in model.parameters())
    assert ours.layer_parameters == sum(p.numel() for p in model.model.layers[0].parameters())
    assert ours.largest_tensor == max(p.numel() for p in model.parameters())
    assert ours.exact


@pytest.mark.parametrize(("checkpointing", "share"), [(False, 3), (True, 10)])
def test_activations_of_a_real_forward_pass_stay_below_the_bound_and_not_far_below(checkpointing: bool, share: int):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    job = resolve(QUICK, [f"learner.gradient_checkpointing={checkpointing}", "learner.tokens_per_micro_batch=2048"])
    model = Qwen2ForCausalLM(Qwen2Config(**TINY, use_cache=False, attn_implementation="sdpa")).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []  # keeps storages alive, so that no address is counted for two tensors
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), keep(t))[1], lambda t: t):
        model.model(input_ids=torch.zeros(64, 32, dtype=torch.long))
    bound = estimate(job).rank.activations - 3 * 4 * 2048 * 99  # without the logits, which this pass does not make
    measured = sum(kept.values())
    assert measured < bound
    assert measured > bound / share  # under checkpointing one layer's are made only in backward


def test_memory_of_a_rank_by_zero_stage_for_seven_billion_parameters_in_bfloat16():
    job = resolve(
        QUICK,
        [
            "model.path=Qwen/Qwen2.5-7B-Instruct",
            "model.warm_start_accuracy=null",
            "model.dtype=bfloat16",
            "learner.ranks=4",
        ],
    )
    count = 7_615_616_512
    got = estimate(job).learner
    assert [one.weights for one in got[:3]] == [2 * count] * 3
    assert [one.gradients for one in got] == [2 * count, 4 * count, count, count]
    assert [one.optimizer for one in got] == [12 * count, 3 * count, 3 * count, 3 * count]
    embedding = 152_064 * 3584
    assert got[3].weights == 2 * count // 4 + 2 * embedding  # its shard, and the embedding gathered
    assert {one.bucket for one in got} == {2 * embedding}  # larger than learner.bucket_mb: a bucket of its own


def test_float32_without_zero_needs_no_master_copy():
    got = estimate(resolve(QUICK, ["learner.ranks=1"])).learner
    assert [one.optimizer for one in got] == [8 * 138_112] + [12 * 138_112] * 3
    assert {one.weights for one in got} == {4 * 138_112}


def test_an_offloaded_optimizer_moves_to_the_host():
    rank = estimate(resolve(QUICK, ["learner.offload_optimizer=true"])).rank
    assert (rank.optimizer, rank.host_optimizer) == (0, 6 * 138_112)


def test_the_quickstart_by_hand():
    got = estimate(resolve(QUICK))
    assert (got.completions_per_step, got.tokens_per_step, got.updates) == (512, 512 * 28, 240)
    assert got.rollout.weights == 552_448
    assert got.rollout.kv_per_token == 2 * 2 * 2 * 32 * 4
    assert (got.rollout.sequences, got.rollout.kv_wanted) == (256, 256 * 44 * 1024)
    assert got.object_store == 2 * 552_448 + 512 * (4 * 16 + 12 * 28)
    assert got.checkpoint == 138_112 * (4 + 12)
    assert got.disk == 3 * 138_112 * (4 + 12) + 138_112 * 4, "two kept, one being written, the export"


def test_staleness_asks_for_more_outstanding_payloads():
    fresh, stale = (estimate(resolve(QUICK, [f"rollout.max_staleness={k}"])).object_store for k in (0, 2))
    assert stale - fresh == 2 * 512 * (4 * 16 + 12 * 28)


def test_a_local_folder_is_read_and_its_name_does_not_matter(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "qwen2"}))
    job = resolve(QUICK, [f"model.path={tmp_path}", "model.warm_start_accuracy=null"])
    assert estimate(job).parameters == 138_112


def test_a_local_folder_without_a_readable_configuration_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        find_architecture(ModelSpec(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        find_architecture(ModelSpec(path=str(tmp_path)))


def test_a_model_of_unknown_size_is_refused_with_the_way_out():
    job = resolve(QUICK, ["model.path=someone/unheard-of", "model.warm_start_accuracy=null"])
    with pytest.raises(ConfigError, match="'someone/unheard-of': its size is not known without network; download it"):
        estimate(job)
    assert estimate(job, TINY | {"model_type": "qwen2"}).parameters == 138_112


def test_a_configuration_that_lacks_numbers_is_refused_by_their_names():
    with pytest.raises(ConfigError, match="'gpt2' lacks intermediate_size, num_hidden_layers"):
        Architecture.from_config({"model_type": "gpt2", "vocab_size": 9, "hidden_size": 9, "num_attention_heads": 1})


def test_a_mixture_of_experts_is_not_estimated_as_if_it_were_dense():
    with pytest.raises(ConfigError, match="mixture of experts"):
        Architecture.from_config(TINY | {"model_type": "qwen3_moe", "num_experts": 8})


def test_what_is_assumed_is_said():
    job = resolve(QUICK, ["rollout.tensor_parallel=2"])
    notes = " ".join(estimate(job, TINY | {"model_type": "phi9"}).assumptions)
    assert "model type 'phi9' counted as if its layers were LLaMA's" in notes
    assert "for its 2 GPUs together" in notes


def test_sizes_are_written_in_powers_of_ten():
    assert [size(n) for n in (999, 552_448, 15_231_233_024, 2 * 10**12)] == ["999 B", "552.4 kB", "15.2 GB", "2.0 TB"]


def test_the_table_names_the_stage_in_use():
    table = dict(estimate(resolve(QUICK)).table())
    assert table["parameters"] == "138,112"
    assert table["learner rank, ZeRO 2"].startswith("7")
    assert "optimizer 828.7 kB" in table["learner rank, ZeRO 2"]


@pytest.mark.parametrize(("tokens", "vocabulary"), [(2048, 99), (8192, 16_384), (16_384, 151_936), (10, 151_936)])
def test_the_blocks_of_logits_counted_are_those_that_the_learner_makes(tokens: int, vocabulary: int) -> None:
    made = default_chunk_tokens(tokens, vocabulary) * vocabulary
    counted = min(tokens * vocabulary, max(-(-tokens // _LOGIT_SHARE) * vocabulary, _LOGIT_ELEMENTS))
    assert made <= counted < made + vocabulary


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([], 4),
        (["rollout.workers=3", "rollout.tensor_parallel=2"], 8),
        (["learner.transport=ipc"], 2),
        (["learner.transport=ipc", "rollout.workers=1"], 2),
    ],
)
def test_gpus_are_those_that_the_actors_ask_for(overrides: list[str], gpus: int):
    got = estimate(resolve(QUICK, overrides))
    assert got.gpus == gpus
    assert dict(got.table())["GPUs"].startswith(f"{gpus};")
