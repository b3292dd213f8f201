"""Published weights: the model's own bytes whatever the ZeRO stage, in bounded memory, and a folder made of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from learner_probe import Learners, ask, job, make_samples, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from sapo_ray.errors import ResourceError, WeightsRefused
from sapo_ray.learner.export import export_hf
from sapo_ray.learner.room import check_object_store
from sapo_ray.models.publish import canary_of
from sapo_ray.types import PolicyVersion, Published
from sapo_ray.weights.fingerprint import checksum64, fingerprint

pytestmark = pytest.mark.integration

V1 = PolicyVersion(1, 1)
CANARY = ((5, 9, 2, 33, 41, 7), (8, 3, 11), (4, 4, 4, 4, 4), (90, 17, 3, 60, 61, 62, 63, 64))


def own_tensors(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The folder's tensors as transformers loads them, tied ones once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: p.detach().to(dtype) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4.1M parameters, 16.4 MB in float32; a head of its own, of 2.3 MB."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=4500,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
async def test_published_bytes_are_those_of_the_model_folder(learners: Learners, stage: int) -> None:
    group = await learners.with_job(job(learners.model, zero_stage=stage, ranks=2))
    published = await group.publish(V1)
    expected = own_tensors(learners.model, torch.float32)
    got = tensors(published)
    assert list(got) == list(expected), "the model's own names, tied heads once"
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    for meta in published.manifest.tensors:
        assert meta.checksum == checksum64(expected[meta.name])
    assert published.manifest.fingerprint == fingerprint(V1, published.manifest.tensors)
    assert published.manifest.version == V1


@pytest.mark.parametrize("stage", [2, 3])
async def test_float32_weights_are_cast_on_the_wire_when_the_rollout_is_bfloat16(
    learners: Learners, stage: int
) -> None:
    spec = job(learners.model, zero_stage=stage, ranks=2, rollout_dtype="bfloat16")
    got = tensors(await (await learners.with_job(spec)).publish(V1))
    for name, tensor in own_tensors(learners.model, torch.bfloat16).items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("stage", [2, 3])
async def test_bfloat16_publishes_the_very_weights_it_computes_with(learners: Learners, stage: int) -> None:
    """After training, too: the module's bf16 weights, not a fresh rounding of the float32 masters' neighbours."""
    spec = job(learners.model, zero_stage=stage, ranks=2, dtype="bfloat16")
    group = await learners.with_job(spec)
    await group.set_canary(CANARY)
    await group.train(0, make_samples())
    published = await group.publish(V1)
    model = AutoModelForCausalLM.from_pretrained(learners.model, dtype=torch.bfloat16)
    model.load_state_dict(tensors(published), strict=False)
    model.tie_weights()
    own = canary_of(model, CANARY).logprobs
    for mine, theirs in zip(published.manifest.canary.logprobs, own, strict=True):
        assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < 0.05


@pytest.mark.parametrize("stage", [0, 3])
async def test_the_canary_is_what_the_published_model_says_at_temperature_1(learners: Learners, stage: int) -> None:
    group = await learners.with_job(job(learners.model, zero_stage=stage, ranks=2))
    await group.set_canary(CANARY)
    canary = (await group.publish(V1)).manifest.canary
    model = AutoModelForCausalLM.from_pretrained(learners.model, dtype=torch.float32)
    assert canary.sequences == CANARY
    for mine, theirs in zip(canary.logprobs, canary_of(model, CANARY).logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("rollout_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [2, 3])
async def test_a_learner_process_holds_one_bucket_beyond_its_shards(
    learners: Learners, untied_model: Path, stage: int, rollout_dtype: str
) -> None:
    spec = job(untied_model, zero_stage=stage, ranks=2, bucket_mb=4, rollout_dtype=rollout_dtype)
    group = await learners.with_job(spec, untied_model)
    published = await group.publish(V1)
    assert len(published.buckets) >= 2
    assert max(published.manifest.bucket_nbytes) <= 4 << 20
    peaks = await group.peak_publish_bytes()
    assert all(peak <= 4 << 20 for peak in peaks), peaks
    assert peaks[1] == 0 or stage == 3


@pytest.mark.parametrize("stage", [2, 3])
async def test_a_tensor_larger_than_a_bucket_is_one_of_its_own_and_not_copied(
    learners: Learners, untied_model: Path, stage: int
) -> None:
    spec = job(untied_model, zero_stage=stage, ranks=2, bucket_mb=1)
    group = await learners.with_job(spec, untied_model)
    published = await group.publish(V1)
    embeddings = 4500 * 128 * 4
    alone = [meta for meta in published.manifest.tensors if meta.nbytes == embeddings]
    assert [meta.name for meta in alone] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert all(published.manifest.bucket_nbytes[meta.bucket] == embeddings for meta in alone)
    limit = embeddings if stage == 3 else 1 << 20
    assert all(peak <= limit for peak in await group.peak_publish_bytes())
    got = tensors(published)
    for name, tensor in own_tensors(untied_model, torch.float32).items():
        assert torch.equal(got[name], tensor), name


async def test_memory_that_torch_really_allocates_for_publishing_is_bounded(
    learners: Learners, untied_model: Path
) -> None:
    """ZeRO-3, 16.4 MB of weights, buckets of 4 MB; measured by torch's own allocation events."""
    spec = job(untied_model, zero_stage=3, ranks=2, bucket_mb=4)
    group = await learners.with_job(spec, untied_model)
    peaks = await ask(group, "measured_publish")
    assert all(0 < peak < 7 << 20 for peak in peaks), peaks


async def test_old_buckets_stay_readable_while_and_after_new_ones_are_published(learners: Learners) -> None:
    group = await learners.with_job(job(learners.model, zero_stage=2, ranks=2))
    first = await group.publish(PolicyVersion(1, 0))
    await group.train(0, make_samples())
    second = await group.publish(V1)
    assert first.manifest.fingerprint != second.manifest.fingerprint
    for published in (first, second):
        for meta in published.manifest.tensors:
            assert checksum64(tensors(published)[meta.name]) == meta.checksum


async def test_buckets_survive_the_death_of_the_learners(learners: Learners, ray_session: None) -> None:
    """The driver owns them: a worker that joins while learners restart can still be served."""
    group = await learners.with_job(job(learners.model, zero_stage=2, ranks=2))
    published = await group.publish(V1)
    await group.close()
    assert torch.equal(tensors(published)["model.norm.weight"], torch.ones(64))


async def test_an_object_store_too_small_for_two_sets_is_named_with_the_remedy(
    learners: Learners, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = await learners.with_job(job(learners.model, ranks=1))
    publisher = dataclasses.replace(group.ranks[0], published_bytes=1 << 30)
    with pytest.raises(ResourceError, match=r"1\.07 GB.*two sets .* 2\.15 GB.*--object-store-memory of at least"):
        check_object_store(publisher)


async def test_vllms_weight_source_yields_the_same_tensors(learners: Learners) -> None:
    """What NCCL and IPC pushes would send, on CPUs."""

    group = await learners.with_job(job(learners.model, zero_stage=3, ranks=2))
    declared, groups, sent = (await ask(group, "through_vllms_source"))[0]
    expected = own_tensors(learners.model, torch.float32)
    assert declared == [(name, "torch.float32", tuple(tensor.shape)) for name, tensor in expected.items()]
    assert [name for names in groups for name in names] == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(sent[name], tensor), name


def exported(published: Published, source: Path, folder: Path) -> Path:
    """As the driver does it: in a Ray task, buckets by reference."""
    task = ray.remote(export_hf).options(num_cpus=0)
    return ray.get(task.remote(published.manifest, str(source), folder, *published.buckets), timeout=120)


async def test_an_export_loads_in_transformers_and_equals_the_policy(learners: Learners, tmp_path: Path) -> None:
    group = await learners.with_job(job(learners.model, zero_stage=3, ranks=2))
    await group.train(0, make_samples())
    published = await group.publish(V1)
    folder = exported(published, learners.model, tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in tensors(published).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(folder)("17+25=").input_ids
    assert {file.name for file in folder.iterdir()} >= {file.name for file in learners.model.iterdir()}
    assert [entry.name for entry in tmp_path.iterdir()] == ["export"]


async def test_an_export_of_several_buckets_is_sharded_and_replaces_an_older_one(
    learners: Learners, untied_model: Path, tmp_path: Path
) -> None:
    spec = job(untied_model, zero_stage=2, ranks=2, bucket_mb=4, dtype="bfloat16")
    published = await (await learners.with_job(spec, untied_model)).publish(V1)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "of-an-older-run").touch()
    folder = exported(published, untied_model, tmp_path / "export")
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(shards) == len(published.buckets) > 1
    assert set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()) == set(shards)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    for name, tensor in own_tensors(untied_model, torch.bfloat16).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not (folder / "of-an-older-run").exists()


async def test_an_export_of_damaged_bytes_is_refused_and_leaves_the_older_one(
    learners: Learners, tmp_path: Path
) -> None:
    published = await (await learners.with_job(job(learners.model, ranks=1))).publish(V1)
    folder = exported(published, learners.model, tmp_path / "export")
    damaged = [np.array(bucket) for bucket in ray.get(list(published.buckets))]
    damaged[0][12345] ^= 1
    with pytest.raises(WeightsRefused, match="not those that were published"):
        export_hf(published.manifest, str(learners.model), folder, *damaged)
    AutoModelForCausalLM.from_pretrained(folder)


async def test_receivers_are_not_looked_at_where_weights_go_through_shared_memory(learners: Learners) -> None:
    group = await learners.with_job(job(learners.model, ranks=2))
    assert (await group.publish(V1, receivers=["nobody"])).manifest.transport == "shared_memory"
    assert await ask(group, "peak_bytes")
