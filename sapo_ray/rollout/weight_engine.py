"""vLLM's side of a weight update: runs inside every process that holds a part of a model.

vLLM finds `register` through the `vllm.general_plugins` entry point; the rollout worker names `Attestation` as
`worker_extension_cls`, which also imports this module. Three backends, all of which can take over from shared memory:

    sapo_shared_memory   buckets through a scratch buffer of the rollout worker
    sapo_nccl            vLLM's packed broadcast from the learner's first rank
    sapo_ipc             vLLM's CUDA IPC from learners on the same GPUs

Whatever the transport, each tensor's checksum is taken over the bytes that arrived, before the model repacks them.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.synchronize import SemLock
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from sapo_ray.errors import WeightsRefused
from sapo_ray.weights.buckets import tensor_at
from sapo_ray.weights.fingerprint import checksum64

SHARED_MEMORY = "sapo_shared_memory"
NCCL = "sapo_nccl"
IPC = "sapo_ipc"


def register() -> None:
    """Make the backends known to vLLM in this process; may be called any number of times."""
    for name, engine in ((SHARED_MEMORY, SharedMemoryEngine), (NCCL, NcclEngine), (IPC, IpcEngine)):
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, engine)
    # It warns of every layer without weights of its own; what did not arrive is refused here.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


@dataclass
class NoInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Shared memory needs no rendezvous."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One bucket that lies in a scratch file."""

    path: str
    """Readable by this process for the duration of the call."""
    nbytes: int
    tensors: list[tuple[str, str, list[int], int, int, int]]
    """(name, dtype, shape, offset, nbytes, checksum) of each."""


class _Loader:
    """Stands before a model while weights arrive: notes each tensor's checksum, then loads it."""

    def __init__(self, engine: _Attesting, model: torch.nn.Module) -> None:
        self._engine, self._model = engine, model

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        return self._engine.load(self._model, weights)


class _Attesting:
    """What the backends have in common: checksums of what arrived, completeness, and the tied-embeddings repair.

    Mixed in before a vLLM engine class, whose `model`, `model_config`, `device` it uses.
    """

    model: Any
    model_config: Any
    device: torch.device

    def begin(self) -> None:
        """A new update: nothing has arrived yet."""
        self.received: dict[str, tuple[str, list[int], int]] = {}
        self._loaded: set[str] = set()
        self._expected = {name for name, _ in self.model.named_parameters()}
        self._reports_names = True

    def load(self, model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load tensors into `model` and note what arrived. Raises WeightsRefused when a name arrives twice."""

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name in self.received:
                    raise WeightsRefused(f"{name} arrived twice in one weight update")
                dtype = str(tensor.dtype).removeprefix("torch.")
                self.received[name] = (dtype, list(tensor.shape), checksum64(tensor))
                yield name, tensor

        loaded = model.load_weights(noted())  # type: ignore[operator]
        # Most models say which of their parameters a tensor filled; those that do not cannot be checked this way.
        self._reports_names &= loaded is not None
        self._loaded |= set(loaded or ())
        return loaded

    def load_bucket(self, update: BucketUpdate) -> None:
        """Check every tensor of a bucket against the manifest, then load them all."""
        with open(update.path, "r+b") as file:
            shared = mmap.mmap(file.fileno(), update.nbytes)  # unmapped with the last view of it
        flat = torch.frombuffer(shared, dtype=torch.uint8)
        views = [
            (name, checksum, tensor_at(flat, offset, nbytes, getattr(torch, dtype), shape))
            for name, dtype, shape, offset, nbytes, checksum in update.tensors
        ]
        for name, checksum, view in views:
            if checksum64(view) != checksum:
                raise WeightsRefused(f"{name} arrived damaged: its checksum is not that of the manifest")
        # A fused layer waits for all its parts, so they must outlive this bucket: copies, not views.
        self.load(self.model, ((name, view.to(self.device, copy=True)) for name, _, view in views))

    def complete(self) -> None:
        """After the last tensor. Raises WeightsRefused when a parameter of the model got nothing."""
        if current_platform.is_cpu() and getattr(self.model_config.hf_text_config, "tie_word_embeddings", False):
            # The CPU's repacked copy of a tied head is not renewed by vLLM's reload: it would go on with old weights.
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(self.model.lm_head, remove_weight=False)
        missing = sorted({name.replace(".base_layer.", ".") for name in self._expected} - self._loaded)
        if self._reports_names and missing:
            raise WeightsRefused(f"weights of {len(missing)} parameters did not arrive: {', '.join(missing[:3])}")


class SharedMemoryEngine(_Attesting, WeightTransferEngine[NoInit, BucketUpdate]):  # type: ignore[misc]
    """Takes weights over from buckets in shared memory, on CPU and GPU."""

    init_info_cls = NoInit
    update_info_cls = BucketUpdate

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        self.begin()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: BucketUpdate) -> None:
        self.load_bucket(update_info)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self.complete()

    def shutdown(self) -> None:
        """Nothing to release."""


class _NativeAttesting(_Attesting):
    """A native backend of vLLM that also takes buckets, for workers that join after the learner's push."""

    def start_weight_update(self) -> None:
        self.begin()
        super().start_weight_update()  # type: ignore[misc]

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        return BucketUpdate(**update_dict) if "path" in update_dict else super().parse_update_info(update_dict)  # type: ignore[misc]

    def receive_weights(self, update_info: Any) -> None:
        if isinstance(update_info, BucketUpdate):
            self.load_bucket(update_info)
            return
        model = self.model
        self.model = _Loader(self, model)
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        super().finish_weight_update()  # type: ignore[misc]
        self.complete()


class NcclEngine(_NativeAttesting, NCCLWeightTransferEngine):  # type: ignore[misc]
    """vLLM's NCCL broadcast, attested."""


class IpcEngine(_NativeAttesting, IPCWeightTransferEngine):  # type: ignore[misc]
    """vLLM's CUDA IPC, attested."""


class Attestation:
    """Mixed into vLLM's worker class: what a rollout worker asks each of its engine's processes."""

    weight_transfer_engine: _Attesting

    def received_weights(self) -> list[tuple[str, str, list[int], int]]:
        """(name, dtype, shape, checksum) of each tensor of the last update, as this process received it."""
        return [(name, *what) for name, what in self.weight_transfer_engine.received.items()]

    def release_semaphore_names(self) -> None:
        """Take this process's semaphores out of /dev/shm; they go on working, and no kill -9 can leave them there."""
        for finalizer in list(util._finalizer_registry.values()):  # type: ignore[attr-defined]
            if finalizer._callback is SemLock._cleanup:  # type: ignore[attr-defined]
                finalizer()


register()
