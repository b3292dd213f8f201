"""Starts DeepSpeed for one rank: process group, configuration, engine. Nothing is compiled just in time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ConfigError
from sapo_ray.learner.policy import Policy, check_head, load_policy

REDUCE_BUCKET = 50_000_000
"""Elements reduced at once: a buffer of 200 MB in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A rank's place in the group."""

    rank: int
    ranks: int
    gpu: bool
    """The actor owns one GPU."""
    transport: Literal["shared_memory", "nccl", "ipc"]
    """How weights reach workers that are up."""


def check_settings(spec: JobSpec, place: Place) -> None:
    """Refuse what only the machine shows to have no meaning; the job's own contradictions JobSpec has refused."""
    if place.transport != "shared_memory" and not place.gpu:
        raise ConfigError(
            f"learner.transport: {place.transport} needs GPUs, the cluster has none; use auto or shared_memory"
        )
    if spec.learner.offload_optimizer and not place.gpu:
        raise ConfigError(
            "learner.offload_optimizer needs ZeRO stage 1-3 on GPUs, got a learner without GPUs; set it to false"
        )


def join(place: Place, store: Any, timeout_s: float) -> None:
    """Join the learners' process group through a store that is already listening (so no port is raced for)."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.ranks),
        # Ray shows each actor only its own GPU.
        LOCAL_RANK="0" if place.gpu else str(place.rank),
        LOCAL_SIZE="1" if place.gpu else str(place.ranks),
    )
    if not place.gpu:
        # Its just-in-time build takes half a minute and a compiler; gloo serves as well.
        __compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    backend = "nccl" if place.gpu else "gloo"
    torch.distributed.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.ranks, timeout=timedelta(seconds=timeout_s)
    )
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def build_engine(spec: JobSpec, model_path: str, place: Place) -> Any:
    """DeepSpeed engine around the policy. Collective.

    Raises
        ModelError: see load_policy and check_head
    """
    import deepspeed

    torch.manual_seed(spec.seed)
    config = deepspeed_config(spec, place)
    policy = _load(spec, model_path, config)
    vocabulary = policy.causal_lm.config.get_text_config().vocab_size
    engine, *_ = deepspeed.initialize(model=policy, model_parameters=policy.parameters(), config=config)
    check_head(engine.module, vocabulary)
    return engine


class _ShardedLoading:
    """What transformers asks for under ZeRO-3 (its own HfDeepSpeedConfig wants accelerate installed)."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


def _load(spec: JobSpec, model_path: str, config: dict[str, Any]) -> Policy:
    """Under ZeRO-3 parameters are sharded as they are read, so that no rank ever holds the whole model."""
    if spec.learner.zero_stage < 3:
        return load_policy(model_path, spec.model, spec.learner.gradient_checkpointing)
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    sharded = _ShardedLoading(config)
    set_hf_deepspeed_config(sharded)  # keeps a weak reference only
    try:
        return load_policy(model_path, spec.model, spec.learner.gradient_checkpointing)
    finally:
        unset_hf_deepspeed_config()


def deepspeed_config(spec: JobSpec, place: Place) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes are formal: accumulation, its boundary and its scale are the worker's."""
    learner = spec.learner
    bf16 = spec.model.dtype == "bfloat16"
    zero: dict[str, Any] = {
        "stage": learner.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": REDUCE_BUCKET,
        "allgather_bucket_size": REDUCE_BUCKET,
    }
    if learner.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.grad_clip,
        "steps_per_print": 1 << 60,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": learner.lr,
                "betas": list(learner.betas),
                "eps": learner.eps,
                "weight_decay": learner.weight_decay,
                # torch's own: DeepSpeed's are compiled just in time.
                "torch_adam": True,
            },
        },
    }
    if bf16 and learner.zero_stage > 0:
        # Sums of bf16 gradients over micro-batches and ranks are kept in float32. (Stage 0 cannot.)
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config
