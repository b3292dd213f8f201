"""Publishes a model folder as it lies on disk: for evaluation and tests, where no learner holds the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from sapo_ray.types import Canary, PolicyVersion, WeightsManifest
from sapo_ray.weights.buckets import plan_buckets, tensor_at, tensor_meta
from sapo_ray.weights.canary import canary_sequences
from sapo_ray.weights.fingerprint import fingerprint


def publish_model(
    model: torch.nn.Module,
    version: PolicyVersion,
    dtype: torch.dtype,
    canary_prompts: tuple[tuple[int, ...], ...],
    bucket_bytes: int = 256 << 20,
) -> Iterator[np.ndarray | WeightsManifest]:
    """Yield each bucket (uint8 [nbytes]) and, last, the manifest with checksums, fingerprint and canary.

    Raises DataError when no canary can be made of `canary_prompts` (see weights.canary).
    """
    parameters = dict(model.named_parameters())
    buckets = plan_buckets([(name, tuple(p.shape)) for name, p in parameters.items()], dtype, bucket_bytes)
    metas = []
    for number, bucket in enumerate(buckets):
        raw = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        for slot in bucket.slots:
            tensor_at(raw, slot.offset, slot.nbytes, dtype, slot.shape).copy_(parameters[slot.name].detach())
            metas.append(tensor_meta(slot, number, raw, dtype))
        yield raw.numpy()
    yield WeightsManifest(
        version=version,
        fingerprint=fingerprint(version, metas),
        tensors=tuple(metas),
        bucket_nbytes=tuple(bucket.nbytes for bucket in buckets),
        canary=canary_of(model, canary_sequences(canary_prompts)),
        transport="shared_memory",
    )


def publish_folder(
    folder: Path,
    version: PolicyVersion,
    dtype_name: str,
    canary_prompts: tuple[tuple[int, ...], ...],
    bucket_bytes: int = 256 << 20,
    trust_remote_code: bool = False,
) -> Iterator[np.ndarray | WeightsManifest]:
    """`publish_model` of a Hugging Face folder, in `dtype_name`."""
    dtype = getattr(torch, dtype_name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    yield from publish_model(model.eval(), version, dtype, canary_prompts, bucket_bytes)


@torch.no_grad()
def canary_of(model: torch.nn.Module, sequences: tuple[tuple[int, ...], ...]) -> Canary:
    """What `model` says of tokens 1.. of each sequence, at temperature 1."""
    rows = []
    for sequence in sequences:
        ids = torch.tensor([sequence])
        logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        rows.append(tuple(logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()))
    return Canary(sequences=sequences, logprobs=tuple(rows))
