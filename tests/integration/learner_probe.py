"""Learner groups for tests: real ranks whose engines are rebuilt in place, and an independent reference of the loss."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.cloudpickle
import torch
from transformers import AutoModelForCausalLM

from sapo_ray.config.spec import JobSpec
from sapo_ray.learner import group as group_module
from sapo_ray.learner.batching import SampleId
from sapo_ray.learner.engine import build_engine
from sapo_ray.learner.group import LearnerGroup
from sapo_ray.learner.worker import LearnerWorker
from sapo_ray.types import CompletionPayload, PolicyVersion, Published, TrainSample, VersionSpan

TEMPERATURE = 0.7
FORMER = 0.7
"""old_logp - rollout_logp of the made-up completions is about this far from 0: corrections have something to do."""

# Actors cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Probe(LearnerWorker):
    """A rank that can be given another job, and asked for what it holds."""

    def rebuild(self, spec: JobSpec, model_path: str) -> None:
        from sapo_ray.learner.sender import Sender

        store, place = self._store, self.place
        LearnerWorker.__init__(self, spec, model_path, place)
        self._store = store
        self.engine = build_engine(spec, model_path, place)
        self.sender = Sender(self.engine, spec, place)

    def gradients(self) -> dict[str, np.ndarray]:
        """The whole reduced gradient, between the last backward pass and the update."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).float().numpy().copy() for name, p in self.sender.tensors.items()}

    def deepspeed_norm(self) -> float:
        """Gradient norm of the last update as DeepSpeed's optimizer computed it."""
        return float(self.engine.get_global_grad_norm())

    def measured_publish(self) -> int:
        """Most bytes that torch held at once above what it held before publishing, by its own allocation events."""
        import gc

        from torch.profiler import ProfilerActivity, profile

        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            for _ in self.sender.publish(PolicyVersion(1, 1)):
                pass
        held = peak = 0
        for event in trace.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    def through_vllms_source(self) -> tuple[Any, list[list[str]], dict[str, torch.Tensor]]:
        """(metadata, names by group, tensors) as vLLM's trainer-side engines would see them."""
        from sapo_ray.learner.vllm_transport import ZeroSource

        source = ZeroSource(self.sender)
        declared = [(meta.name, str(meta.dtype), meta.shape) for meta in source.metadata()]
        groups = [names for names, _ in source.iter_groups()]
        return declared, groups, {name: tensor.clone() for name, tensor in source}

    def refused_settings(self, spec: JobSpec) -> str:
        """What check_settings says of another job in this rank's place."""
        from sapo_ray.errors import ConfigError
        from sapo_ray.learner.engine import check_settings

        try:
            check_settings(spec, dataclasses.replace(self.place, transport=spec.transport))
        except ConfigError as error:
            return str(error)
        return ""

    def files(self) -> list[str]:
        """Shared libraries built just in time by DeepSpeed in this process."""
        return [line.split()[-1] for line in open("/proc/self/maps") if "torch_extensions" in line]


class Learners:
    """One group of each size, started on first use."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self._groups: dict[int, LearnerGroup] = {}

    async def with_job(self, spec: JobSpec, model: Path | None = None) -> LearnerGroup:
        """The group of the job's size, fresh for this job."""
        ranks, path = spec.learner.ranks, str(model or self.model)
        group = self._groups.get(ranks)
        if group is None or not group._actors:
            if group is not None:
                await group.close()
            group = self._groups[ranks] = probes(spec, path)
            await group.start()
            return group
        group.spec, group._version = spec, PolicyVersion(0, 0)
        await group._on_all("rebuild", "rebuild", time.monotonic() + 120, spec, path)
        return group

    async def close(self) -> None:
        for group in self._groups.values():
            await group.close()


def probes(spec: JobSpec, model: str) -> LearnerGroup:
    """A group whose ranks are probes."""
    group_module.LearnerWorker = Probe  # type: ignore[misc]
    return LearnerGroup(spec, model)


async def ask(group: LearnerGroup, verb: str, *args: Any) -> list[Any]:
    """A verb on all ranks."""
    return await group._on_all(verb, verb, time.monotonic() + 120, *args)


def job(model: Path, **learner: Any) -> JobSpec:
    """8 groups of 4, clipping in force, AdamW nearly linear in the gradient."""
    top = {key: learner.pop(key) for key in ("steps", "run_dir", "deadlines", "algorithm") if key in learner}
    dtype = learner.pop("dtype", "float32")
    rollout_dtype = learner.pop("rollout_dtype", None)
    return JobSpec.model_validate(
        {
            "steps": 10,
            "model": {"path": str(model), "dtype": dtype},
            "data": {"train": [{"path": "none"}], "max_prompt_tokens": 8},
            "rollout": {
                "prompts_per_step": 8,
                "group_size": 4,
                "max_new_tokens": 24,
                "temperature": TEMPERATURE,
                "dtype": rollout_dtype,
            },
            "learner": {"lr": 1e-3, "eps": 0.1, "tokens_per_micro_batch": 4096} | learner,
        }
        | top
    )


def make_samples(seed: int = 0, groups: int = 8, size: int = 4) -> list[TrainSample]:
    """Random completions of uneven lengths with uneven advantages; payloads are owned by this process."""
    chance = np.random.default_rng(seed)
    samples = []
    for group in range(groups):
        prompt = chance.integers(3, 90, chance.integers(2, 8)).astype(np.int32)
        for index in range(size):
            tokens = int(chance.integers(2, 24))
            payload = CompletionPayload(
                prompt_token_ids=prompt,
                token_ids=chance.integers(3, 90, tokens).astype(np.int32),
                logprobs=(-4.5 - FORMER * chance.random(tokens)).astype(np.float32),
                text="",
            )
            samples.append(
                TrainSample(
                    group_id=f"g{group}",
                    sample_index=index,
                    prompt_tokens=len(prompt),
                    tokens=tokens,
                    reward=0.0,
                    advantage=float(chance.normal()),
                    truncated=False,
                    masked=index == 3 and group == 2,
                    spans=(VersionSpan(version=PolicyVersion(1, 0), start=0, end=tokens),),
                    payload=ray.put(payload),
                )
            )
    return samples


class Reference:
    """SAPO with the sigmoid gate (tau 1.0 / 1.05) and truncated importance sampling at 2, in plain torch.

    One row at a time, through the model's own logits, differentiated by autograd through the exponential; nothing of
    the package takes part.
    """

    def __init__(self, model: Path, spec: JobSpec) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.spec = spec
        learner = spec.learner
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=learner.lr,
            betas=learner.betas,
            eps=learner.eps,
            weight_decay=learner.weight_decay,
        )
        self.norms: list[float] = []

    def logp(self, payload: CompletionPayload) -> torch.Tensor:
        prompt, completion = payload.prompt_token_ids.tolist(), payload.token_ids.tolist()
        logits = self.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        return (logits / TEMPERATURE).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]

    def train(self, samples: Sequence[TrainSample], mini_batches: Sequence[Sequence[SampleId]]) -> list[float]:
        """One epoch; returns the losses."""
        by_id = {(s.group_id, s.sample_index): s for s in samples}
        payloads = {id: ray.get(s.payload) for id, s in by_id.items()}
        with torch.no_grad():
            old = {id: self.logp(payload) for id, payload in payloads.items()}
        losses = []
        for members in mini_batches:
            loss = self.loss(members, by_id, payloads, old)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.norms.append(
                float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.learner.grad_clip))
            )
            self.optimizer.step()
            losses.append(float(loss))
        return losses

    def loss(
        self,
        members: Sequence[SampleId],
        by_id: dict[SampleId, TrainSample],
        payloads: dict[SampleId, CompletionPayload],
        old: dict[SampleId, torch.Tensor],
    ) -> torch.Tensor:
        total = torch.zeros(())
        for id in members:
            if by_id[id].masked:
                continue
            advantage = by_id[id].advantage
            tau = 1.0 if advantage > 0 else 1.05
            ratio = (self.logp(payloads[id]) - old[id]).exp()
            gate = 1 + (2 / tau) * torch.tanh(tau * (ratio - 1) / 2)
            rho = (old[id] - torch.from_numpy(payloads[id].logprobs)).exp().clamp(max=2.0)
            total = total - (gate * advantage * rho).mean() / len(members)
        return total

    def gradients(self) -> dict[str, np.ndarray]:
        """Of the last loss, before clipping."""
        return {name: p.grad.numpy().copy() for name, p in self.model.named_parameters() if p.grad is not None}

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: p.detach().numpy() for name, p in self.model.named_parameters()}


def tensors(published: Published) -> dict[str, torch.Tensor]:
    """Published tensors by name."""
    buckets = ray.get(list(published.buckets))
    return {
        meta.name: torch.from_numpy(buckets[meta.bucket][meta.offset : meta.offset + meta.nbytes].copy())
        .view(getattr(torch, meta.dtype))
        .view(*meta.shape)
        for meta in published.manifest.tensors
    }
