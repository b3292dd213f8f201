"""Native pushes of weights into vLLM on GPUs: NCCL broadcast or CUDA IPC, by vLLM's own trainer-side engines.

The one module of the learner that knows vLLM, imported only where such a transport is used. A push reaches the workers
that are up; who joins later, and an export, take the buckets that every publish leaves in the object store. What
arrived is attested as ever: the receiver takes checksums of the tensors and compares them with the manifest, whose
checksums are of the same bytes.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from sapo_ray.learner.sender import Sender
from sapo_ray.learner.zero import gathered, whole_shape


class ZeroSource(WeightSource):  # type: ignore[misc]
    """The policy's tensors in wire dtype, gathered bucket by bucket; every rank iterates in the same order."""

    def __init__(self, sender: Sender) -> None:
        self.sender = sender

    def metadata(self) -> list[ParamMeta]:
        """Name, wire dtype and whole shape of every tensor, without gathering."""
        return [ParamMeta(name, self.sender.dtype, whole_shape(p)) for name, p in self.sender.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for bucket in self.sender.buckets:
            parameters = [self.sender.tensors[slot.name] for slot in bucket.slots]
            with gathered(parameters):
                for slot, parameter in zip(bucket.slots, parameters, strict=True):
                    yield slot.name, parameter.detach().to(self.sender.dtype)
                if torch.cuda.is_available():
                    # The consumer copies on a stream of its own; the gathered memory is given back after this.
                    torch.cuda.synchronize()


class Replicas:
    """vLLM's weight-sync client for independent engines.

    vLLM's own Ray client gives every engine the same place in the NCCL group, which suits the data-parallel parts of
    one engine; replicas each need their own.
    """

    def __init__(self, actors: Sequence[Any], ranks_each: int) -> None:
        self.actors, self.ranks_each = list(actors), ranks_each

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        calls = []
        for number, actor in enumerate(self.actors):
            info = init_info
            if "rank_offset" in init_info:
                info = init_info | {"rank_offset": 1 + number * self.ranks_each}
            calls.append(actor.init_weight_transfer_engine.remote(WeightTransferInitRequest(init_info=info)))
        ray.get(calls)

    def shutdown_weight_transfer_engine(self) -> None:
        self._all("shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._all("update_weights", WeightTransferUpdateRequest(update_info=update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        # The version comes with the manifest.
        self._all("finish_weight_update")

    def _all(self, verb: str, *args: Any) -> None:
        ray.get([getattr(actor, verb).remote(*args) for actor in self.actors])


class NativePush:
    """One learner rank's side of native pushes."""

    def __init__(self, sender: Sender, transport: str, tensor_parallel: int) -> None:
        self.source = ZeroSource(sender)
        self.rank = sender.place.rank
        self.transport, self.tensor_parallel = transport, tensor_parallel
        self._receivers: list[Any] = []
        self._engine: Any = None

    def push(self, receivers: Sequence[Any]) -> None:
        """Weights into the engines of `receivers` (rollout actors), which stay paused until their takeover. Collective.

        Another set of receivers is another NCCL group; the old one is shut down first, for vLLM would leak it.
        """
        if list(receivers) != self._receivers:
            if self._engine is not None:
                self._engine.shutdown()
            self._receivers = list(receivers)
            self._engine = self._connect()
        self._engine.send_weights()

    def _connect(self) -> Any:
        if self.transport == "ipc":
            info: Any = IPCTrainerInitInfo(rank=self.rank, packed=True)
        else:
            info = NCCLTrainerInitInfo(
                rank=self.rank,
                master_address=ray.util.get_node_ip_address(),
                master_port=_free_port(),
                world_size=1 + len(self._receivers) * self.tensor_parallel,
            )
        client = Replicas(self._receivers, self.tensor_parallel)
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=self.source)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
