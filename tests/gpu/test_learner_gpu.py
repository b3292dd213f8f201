"""Learners on GPUs: NCCL between ranks, native pushes into vLLM. Not run on machines without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sapo_ray.config.spec import JobSpec
from sapo_ray.learner.group import LearnerGroup
from sapo_ray.models.builtin import make_addition_model
from sapo_ray.rollout.pool import RolloutPool
from sapo_ray.types import GroupRequest, PolicyVersion, SampleRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.integration,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

CANARY = ((5, 9, 2, 33, 41, 7), (8, 3, 11), (4, 4, 4, 4, 4), (90, 17, 3, 60, 61, 62, 63, 64))


def job(model: Path, **learner: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "steps": 2,
            "model": {"path": str(model), "dtype": "bfloat16"},
            "data": {"train": [{"path": "none"}], "max_prompt_tokens": 16},
            "rollout": {"max_new_tokens": 24, "gpu_memory_utilization": 0.3, "enforce_eager": True},
            "learner": {"zero_stage": 3, "lr": 1e-2} | learner,
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_addition_model(folder, 0)
    return folder


@pytest.mark.parametrize("transport", ["shared_memory", "nccl"])
async def test_pushed_weights_are_attested_and_sampled_from(ray_session: None, model: Path, transport: str) -> None:
    spec = job(model, transport=transport)
    learners, pool = LearnerGroup(spec, str(model)), RolloutPool(spec, str(model))
    request = GroupRequest(
        group_id="g",
        prompt_token_ids=(5, 6, 7),
        samples=(SampleRequest(index=0, seed=1), SampleRequest(index=1, seed=2)),
        max_new_tokens=8,
        temperature=1.0,
    )
    try:
        await learners.start()
        await pool.start()
        await learners.set_canary(CANARY)
        for number in range(20):
            published = await learners.publish(PolicyVersion(1, number), receivers=pool.push_targets())
            assert published.manifest.transport == transport
            assert published.buckets, "workers that join later need them"
            (takeover,) = await pool.update(published)
            assert takeover.version == PolicyVersion(1, number)
        metas = [meta async for meta, _ in pool.generate(request)]
        assert {meta.oldest for meta in metas} == {PolicyVersion(1, 19)}
    finally:
        await learners.close()
        await pool.close()
