"""Weights without a learner: a model folder, changed at random, published as a learner would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import torch
from transformers import AutoModelForCausalLM

from sapo_ray.models.publish import publish_model
from sapo_ray.types import CompletionPayload, PolicyVersion, Published, WeightsManifest
from sapo_ray.weights.fingerprint import fingerprint

CANARY = ((5, 6, 7, 8, 9, 10), (20, 3, 41, 7, 13), (9, 9, 8, 61, 70, 71, 72), (4, 5))
BUCKET_BYTES = 100_000
"""Several buckets, and layers that lie in two of them."""


class Policy:
    """One version of a model: what is published, and the reference for what is sampled under it."""

    def __init__(self, folder: Path, number: int, *, attempt: int = 1, noise: float = 0.0) -> None:
        self.version = PolicyVersion(attempt, number)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(1000 * attempt + number)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
        buckets: list[np.ndarray] = []
        for item in publish_model(self.model, self.version, torch.float32, CANARY, BUCKET_BYTES):
            if isinstance(item, WeightsManifest):
                self.manifest = item
            else:
                buckets.append(item)
        self.buckets = tuple(buckets)

    def published(self) -> Published:
        """With the buckets in Ray's object store."""
        return Published(manifest=self.manifest, buckets=tuple(ray.put(bucket) for bucket in self.buckets))

    def damaged(self) -> Published:
        """One bit of one byte is wrong."""
        buckets = [bucket.copy() for bucket in self.buckets]
        buckets[1][17] ^= 4
        return Published(manifest=self.manifest, buckets=tuple(ray.put(bucket) for bucket in buckets))

    def without(self, name: str) -> Published:
        """Everything but one tensor, with a fingerprint to match."""
        tensors = tuple(meta for meta in self.manifest.tensors if meta.name != name)
        manifest = replace(self.manifest, tensors=tensors, fingerprint=fingerprint(self.version, tensors))
        return Published(manifest=manifest, buckets=tuple(ray.put(bucket) for bucket in self.buckets))

    def misjudged(self) -> Published:
        """The canary's log-probs are off by a hundredth: the bytes are right, but the model computes otherwise."""
        canary = self.manifest.canary
        rows = tuple(tuple(value + 0.01 for value in row) for row in canary.logprobs)
        manifest = replace(self.manifest, canary=replace(canary, logprobs=rows))
        return Published(manifest=manifest, buckets=tuple(ray.put(bucket) for bucket in self.buckets))

    @torch.no_grad()
    def logprobs(self, payload: CompletionPayload, temperature: float = 1.0) -> np.ndarray:
        """log_softmax(logits / temperature) of the completion's tokens, float32 [T]."""
        prompt = len(payload.prompt_token_ids)
        ids = torch.from_numpy(np.concatenate([payload.prompt_token_ids, payload.token_ids]).astype(np.int64))
        logits = self.model(input_ids=ids[None]).logits[0, prompt - 1 : -1].float()
        return (logits / temperature).log_softmax(-1).gather(-1, ids[prompt:, None])[:, 0].numpy()

    @torch.no_grad()
    def greedy(self, payload: CompletionPayload) -> np.ndarray:
        """Most probable token at each place of the completion, given what stands before it."""
        prompt = len(payload.prompt_token_ids)
        ids = torch.from_numpy(np.concatenate([payload.prompt_token_ids, payload.token_ids]).astype(np.int64))
        return self.model(input_ids=ids[None]).logits[0, prompt - 1 : -1].argmax(-1).numpy()
