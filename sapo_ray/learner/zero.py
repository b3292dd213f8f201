"""What the learner reads and clears of DeepSpeed's optimizers, which have no public interface for it.

Between the last backward pass of an update and `engine.step()` the reduced gradient lies in a place that depends on
the ZeRO stage and the dtype. This module is the only one that knows those places (DeepSpeed 0.19.8; the tests compare
the norm with DeepSpeed's own for every stage and dtype). DeepSpeed is imported where it is used, here and in the other
modules: the driver imports them to spawn actors, and should not pay for it.

    stage 0            p.grad of every parameter, whole on every rank
    stage 1 in bf16    BF16_Optimizer: a whole float32 buffer on every rank
    stage 1, 2         averaged_gradients: the rank's partition; with offload the float32 partition's grad
    stage 3            averaged_gradients: the rank's partition; with offload the float32 partition's grad
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor


def gradient_norm(engine: Any) -> float:
    """L2 norm of the reduced gradient, the same number on every rank; nan or inf if any part of it is.

    Collective. Summed in float64, so that finite float32 gradients cannot overflow.
    """
    from deepspeed import comm

    tensors, partitioned = _gradients(engine)
    total = torch.zeros(1, dtype=torch.float64, device=engine.device)
    for tensor in tensors:
        total += torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64) ** 2
    if partitioned:
        comm.all_reduce(total)
    # Whole gradients are equal on all ranks; the decision still has to be one, bit for bit.
    comm.broadcast(total, 0)
    return float(total.sqrt().item())


def clear_gradients(engine: Any) -> None:
    """Forget the accumulated gradient of an update that is not going to be applied."""
    optimizer, kind = engine.optimizer, _kind(engine)
    if kind == "zero3":
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer.zero_grad()
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
        else:
            optimizer.averaged_gradients = {}
    elif kind == "zero12":
        optimizer.zero_grad()
        optimizer.micro_step_id = -1  # DeepSpeed's INITIAL_MICRO_STEP_ID
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
        for group in list(optimizer.averaged_gradients):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
    elif kind == "bf16":
        optimizer.zero_grad()
    else:
        engine.zero_grad()


def gathered(parameters: list[Any]) -> Any:
    """Context in which ZeRO-3 parameters are whole on every rank (others always are). Collective."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters(parameters, enabled=is_partitioned(parameters[0]))


def is_partitioned(parameter: Any) -> bool:
    """Whether a parameter is one of ZeRO-3's, of which this rank holds a shard."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the whole parameter, gathered or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _kind(engine: Any) -> Literal["zero3", "zero12", "bf16", "plain"]:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        return "zero3"
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        return "zero12"
    return "bf16" if isinstance(engine.optimizer, BF16_Optimizer) else "plain"


def _gradients(engine: Any) -> tuple[list[Tensor], bool]:
    """(tensors that make up the reduced gradient on this rank, whether each rank has another part of it)"""
    optimizer, kind = engine.optimizer, _kind(engine)
    if kind == "zero3":
        if optimizer.offload_optimizer:
            return [part.grad for part in optimizer.fp32_partitioned_groups_flat if part.grad is not None], True
        return _flat(optimizer.averaged_gradients), True
    if kind == "zero12":
        if optimizer.cpu_offload:
            return [part.grad for part in optimizer.single_partition_of_fp32_groups if part.grad is not None], True
        return _flat(optimizer.averaged_gradients), True
    if kind == "bf16":
        return list(optimizer.fp32_groups_actual_gradients_flat), False
    return [p.grad for p in engine.module.parameters() if p.grad is not None], False


def _flat(groups: dict[int, list[Tensor] | None]) -> list[Tensor]:
    return [tensor for group in groups.values() if group is not None for tensor in group]
