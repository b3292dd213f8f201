"""Rollout workers on GPUs: buckets through shared memory, and native pushes by vLLM's own trainer side."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from sapo_ray.config.spec import JobSpec
from sapo_ray.models.builtin import make_addition_model
from sapo_ray.models.publish import publish_model
from sapo_ray.rollout.pool import RolloutPool
from sapo_ray.types import GroupRequest, PolicyVersion, Published, SampleRequest, WeightsManifest

pytestmark = [pytest.mark.gpu, pytest.mark.integration]
needs = pytest.mark.skipif
CANARY = ((5, 6, 7, 8, 9, 10), (20, 3, 41, 7, 13), (9, 9, 8, 61, 70, 71, 72), (4, 5))


class Trainer:
    """A learner of one rank, on the GPU it sees."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)

    def publish(self, number: int) -> tuple[WeightsManifest, list[np.ndarray]]:
        host = AutoModelForCausalLM.from_config(self.model.config, dtype=torch.bfloat16).eval()
        host.load_state_dict(self.model.state_dict())
        *buckets, manifest = publish_model(host, PolicyVersion(1, number), torch.bfloat16, CANARY, 100_000)
        assert isinstance(manifest, WeightsManifest)
        return manifest, [bucket for bucket in buckets if isinstance(bucket, np.ndarray)]

    def connect(self, transport: str, actors: list[Any], port: int) -> None:
        from vllm.distributed.weight_transfer import ModuleSource, RayVLLMWeightSyncClient, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info: Any = IPCTrainerInitInfo(rank=0, packed=True)
        if transport == "nccl":
            address = ray.util.get_node_ip_address()
            info = NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=1 + len(actors))
        self.sender = WeightTransferTrainerFactory.trainer_init(
            info, client=RayVLLMWeightSyncClient(actors), source=ModuleSource(self.model)
        )

    def push(self) -> None:
        self.sender.send_weights()

    def disconnect(self) -> None:
        self.sender.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_addition_model(tmp_path, 0)
    return tmp_path


async def pool_of(folder: Path, transport: str) -> AsyncIterator[RolloutPool]:
    spec = JobSpec.model_validate(
        {
            "steps": 1,
            "model": {"path": str(folder)},
            "data": {"train": [{"path": "d"}], "max_prompt_tokens": 16},
            "rollout": {"max_new_tokens": 28, "gpu_memory_utilization": 0.3, "enforce_eager": True},
            "learner": {"transport": transport},
        }
    )
    pool = RolloutPool(spec, str(folder))
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def versions(pool: RolloutPool) -> set[PolicyVersion]:
    samples = tuple(SampleRequest(index=i, seed=i) for i in range(4))
    request = GroupRequest(
        group_id="g", prompt_token_ids=(5, 6, 7), samples=samples, max_new_tokens=28, temperature=1.0
    )
    return {span.version async for meta, _ in pool.generate(request) for span in meta.spans}


@needs(torch.cuda.device_count() < 1, reason="needs a CUDA device")
async def test_buckets_reach_an_engine_on_a_gpu(ray_session: None, folder: Path) -> None:
    trainer = ray.remote(num_cpus=1)(Trainer).options(**_on_gpu(0)).remote(str(folder))
    async for pool in pool_of(folder, "shared_memory"):
        for number in range(3):
            manifest, buckets = await trainer.publish.remote(number)
            refs = tuple(ray.put(bucket) for bucket in buckets)
            (takeover,) = await pool.update(Published(manifest=manifest, buckets=refs))
            assert takeover.canary_max < 0.3
            assert await versions(pool) == {PolicyVersion(1, number)}
            await trainer.step.remote(number)


@pytest.mark.parametrize(
    ("transport", "gpu"),
    [
        pytest.param("ipc", 0, marks=needs(torch.cuda.device_count() < 1, reason="needs a CUDA device")),
        pytest.param("nccl", 1, marks=needs(torch.cuda.device_count() < 2, reason="needs two CUDA devices")),
    ],
)
async def test_native_pushes_are_attested_and_a_group_is_left_before_another_is_joined(
    ray_session: None, folder: Path, transport: str, gpu: int
) -> None:
    trainer = ray.remote(num_cpus=1)(Trainer).options(**_on_gpu(gpu)).remote(str(folder))
    async for pool in pool_of(folder, transport):
        for number in range(20):
            await trainer.connect.remote(transport, pool.push_targets(), 29_600 + number)
            await trainer.push.remote()
            manifest, _ = await trainer.publish.remote(number)
            (takeover,) = await pool.update(Published(manifest=manifest, buckets=()))
            assert takeover.canary_max < 0.3
            assert await versions(pool) == {PolicyVersion(1, number)}
            await trainer.disconnect.remote()
            await trainer.step.remote(number)


def _on_gpu(number: int) -> dict[str, Any]:
    """Without a claim on it in Ray, so that an engine may share it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    device = visible[number] if len(visible) > number and visible[0] else str(number)
    variables = {"CUDA_VISIBLE_DEVICES": device, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return {"runtime_env": {"env_vars": variables}, "num_gpus": 0}
