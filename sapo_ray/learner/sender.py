"""Publishing: the policy's weights leave the learners as buckets of bytes in the rollout dtype, then a manifest.

Under ZeRO-3 all ranks gather the same parameters in the same order; only rank 0 copies. A wire bucket and the
parameters gathered for it are each at most half of learner.bucket_mb, so that a learner process never holds more than
one bucket beyond its shards. A single larger tensor is a bucket of its own; on CPUs, and if no cast is needed, it is
sent from where it was gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from sapo_ray.config.spec import JobSpec
from sapo_ray.learner.engine import Place
from sapo_ray.learner.zero import gathered, is_partitioned, whole_shape
from sapo_ray.types import Canary, PolicyVersion, TensorMeta, WeightsManifest
from sapo_ray.weights.buckets import Bucket, Slot, plan_buckets, tensor_at, tensor_meta
from sapo_ray.weights.fingerprint import fingerprint


class Sender:
    """One rank's side of publishing."""

    def __init__(self, engine: Any, spec: JobSpec, place: Place) -> None:
        self.engine = engine
        self.place = place
        self.dtype: torch.dtype = getattr(torch, spec.rollout_dtype)
        self.tensors: dict[str, nn.Parameter] = engine.module.tensors()
        shapes = [(name, whole_shape(parameter)) for name, parameter in self.tensors.items()]
        self.parameters = sum(prod(shape) for _, shape in shapes)
        self.gathers = any(is_partitioned(parameter) for parameter in self.tensors.values())
        limit = spec.learner.bucket_mb << 20
        widest = max(parameter.dtype.itemsize for parameter in self.tensors.values())
        # Gathered in the learner's dtype, copied in the wire's: the two together stay under the limit.
        share = self.dtype.itemsize / (self.dtype.itemsize + widest) if self.gathers else 1.0
        self.buckets = plan_buckets(shapes, self.dtype, int(limit * share))
        self.canary_sequences: tuple[tuple[int, ...], ...] = ()
        self.peak_bytes = 0

    def publish(self, version: PolicyVersion, pushed: bool = False) -> Iterator[np.ndarray | WeightsManifest]:
        """On rank 0 yield each bucket, uint8 [nbytes], and at last the manifest; elsewhere only gather. Collective.

        `pushed`: workers that are up have the weights already; the buckets are for those that join later.

        Whoever iterates must be done with a bucket before asking for the next: a gathered parameter may lie under it.
        (Ray copies each into its object store on the way out.)
        """
        sends = self.place.rank == 0
        metas: list[TensorMeta] = []
        for number, bucket in enumerate(self.buckets):
            with self._filled(bucket, sends) as raw:
                if sends:
                    metas += [tensor_meta(slot, number, raw, self.dtype) for slot in bucket.slots]
                    yield raw.numpy()
        # Only under ZeRO-3 is a forward pass a collective; elsewhere the other ranks have nothing to add.
        canary = self._canary() if sends or self.gathers else None
        if canary and sends:
            yield WeightsManifest(
                version=version,
                fingerprint=fingerprint(version, metas),
                tensors=tuple(metas),
                bucket_nbytes=tuple(bucket.nbytes for bucket in self.buckets),
                canary=canary,
                transport=self.place.transport if pushed else "shared_memory",
            )

    @contextmanager
    def _filled(self, bucket: Bucket, copies: bool) -> Iterator[torch.Tensor]:
        """The bucket's bytes on rank 0 (nothing elsewhere), while its parameters are gathered."""
        parameters = [self.tensors[slot.name] for slot in bucket.slots]
        direct = self._is_direct(bucket)
        raw = torch.empty(bucket.nbytes if copies and not direct else 0, dtype=torch.uint8)
        with gathered(parameters):
            whole = sum(p.numel() * p.element_size() for p in parameters) if self.gathers else 0
            self.peak_bytes = max(self.peak_bytes, whole + raw.nbytes)
            if copies and direct:
                raw = parameters[0].detach().view(-1).view(torch.uint8)
            elif copies:
                end = 0
                for slot, parameter in zip(bucket.slots, parameters, strict=True):
                    raw[end : slot.offset] = 0  # no stray memory between tensors
                    self._view(slot, raw).copy_(parameter.detach())
                    end = slot.offset + slot.nbytes
                raw[end:] = 0
            yield raw

    def _is_direct(self, bucket: Bucket) -> bool:
        """One tensor, in host memory, in the wire's dtype: its own bytes are the bucket."""
        parameter = self.tensors[bucket.slots[0].name]
        on_host = parameter.device.type == "cpu"
        return len(bucket.slots) == 1 and on_host and parameter.dtype == self.dtype

    def _view(self, slot: Slot, raw: torch.Tensor) -> torch.Tensor:
        return tensor_at(raw, slot.offset, slot.nbytes, self.dtype, slot.shape)

    @torch.no_grad()
    def _canary(self) -> Canary:
        """What the learner says of the canary sequences in the rollout dtype, at temperature 1. Collective."""
        sequences = self.canary_sequences
        if not sequences:
            return Canary(sequences=(), logprobs=())
        device = self.engine.device
        width = max(len(sequence) for sequence in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.int64, device=device)
        selected = torch.zeros(len(sequences), width - 1, dtype=torch.bool, device=device)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            selected[row, : len(sequence) - 1] = True
        # engine() would switch autocast off again; the module carries all of DeepSpeed's hooks.
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype == torch.bfloat16):
            logp, _ = self.engine.module(ids, selected, 1.0)
        rows = tuple(tuple(logp[row, : len(sequence) - 1].tolist()) for row, sequence in enumerate(sequences))
        return Canary(sequences=sequences, logprobs=rows)
