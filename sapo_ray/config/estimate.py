"""What a job will need, by arithmetic alone: memory per actor, object store, disk, tokens. No network, no weights.

All sizes are bytes. What the arithmetic takes for granted is listed with the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sapo_ray.config.architecture import Architecture, find_architecture
from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ConfigError

_BYTES = {"float32": 4, "bfloat16": 2}
_LOGIT_SHARE, _LOGIT_ELEMENTS = 32, 1 << 21
"""The learner holds logits of 1/32 of a micro-batch's tokens at once, or of as many as fill 2M elements."""
_MB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """One learner rank under one ZeRO stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    """Master weights where there are any, and both moments of AdamW; 0 where offloaded."""
    activations: int
    """Upper bound for one micro-batch, logits included."""
    bucket: int
    """Largest bucket gathered while weights are published."""
    host_optimizer: int
    """Optimizer state in host memory instead."""

    @property
    def total(self) -> int:
        """On the device of the rank."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerMemory:
    """One rollout worker (all its GPUs together)."""

    weights: int
    kv_per_token: int
    kv_wanted: int
    """Keys and values if all sequences that it may decode at once had full length."""
    sequences: int
    """Sequences that it may decode at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a job needs."""

    parameters: int
    learner: tuple[RankMemory, ...]
    """One for each ZeRO stage 0-3, with the job's number of ranks."""
    stage: int
    """The job's ZeRO stage."""
    rollout: WorkerMemory
    object_store: int
    """Two buffers of published weights and the payloads of all outstanding batches."""
    gpus: int
    """Of all actors together; a cluster without GPUs runs them on CPUs."""
    checkpoint: int
    """One checkpoint on disk."""
    disk: int
    """All checkpoints that are kept, the one being written, and the exported model; logs and downloads apart."""
    completions_per_step: int
    tokens_per_step: int
    """Sampled tokens of one step if every completion ran to its limit."""
    updates: int
    """Optimizer updates of the whole run."""
    assumptions: tuple[str, ...]

    @property
    def rank(self) -> RankMemory:
        """Memory of one learner rank under the job's own stage."""
        return self.learner[self.stage]

    def table(self) -> list[tuple[str, str]]:
        """Label and value, for people."""
        rank, worker = self.rank, self.rollout
        parts = f"weights {size(rank.weights)}, gradients {size(rank.gradients)}, optimizer {size(rank.optimizer)}, "
        parts += f"activations <= {size(rank.activations)}, bucket {size(rank.bucket)}"
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("optimizer updates", f"{self.updates:,}"),
            ("completions per step", f"{self.completions_per_step:,}"),
            ("sampled tokens per step", f"<= {self.tokens_per_step:,}"),
            (f"learner rank, ZeRO {self.stage}", f"{size(rank.total)} ({parts})"),
            ("  by stage", ", ".join(f"{one.stage}: {size(one.total)}" for one in self.learner)),
            ("rollout worker, weights", size(worker.weights)),
            ("  keys and values", f"{size(worker.kv_per_token)} a token, {size(worker.kv_wanted)} for all sequences"),
            ("object store", size(self.object_store)),
            ("GPUs", f"{self.gpus}; where there are none, CPUs do the work"),
            ("disk for the run", f"{size(self.disk)} (one checkpoint {size(self.checkpoint)})"),
        ]
        if rank.host_optimizer:
            rows.insert(6, ("  in host memory", f"optimizer {size(rank.host_optimizer)}"))
        return rows


def estimate(spec: JobSpec, architecture: Mapping[str, Any] | None = None) -> Estimate:
    """Needs of a job. `architecture` is the model's Hugging Face configuration; None looks where no network is needed.

    Raises:
        ConfigError: the model's sizes are not known, or it is of a kind that is not estimated.
    """
    config = architecture if architecture is not None else find_architecture(spec.model)
    if config is None:
        raise ConfigError(
            f"model.path {spec.model.path!r}: its size is not known without network; "
            "download it and give model.path the local folder"
        )
    model = Architecture.from_config(config)
    rollout_bytes = _BYTES[spec.rollout_dtype]
    completions = spec.rollout.prompts_per_step * spec.rollout.group_size
    optimizer_bytes = _optimizer_bytes(spec.model.dtype, spec.learner.zero_stage)
    checkpoint = model.parameters * (_BYTES[spec.model.dtype] + optimizer_bytes)
    return Estimate(
        parameters=model.parameters,
        learner=tuple(_rank(spec, model, stage) for stage in range(4)),
        stage=spec.learner.zero_stage,
        rollout=_worker(spec, model),
        object_store=2 * model.parameters * rollout_bytes + _payloads(spec, completions),
        gpus=_gpus(spec),
        checkpoint=checkpoint,
        disk=(spec.checkpoint.keep + 1) * checkpoint + model.parameters * rollout_bytes,
        completions_per_step=completions,
        tokens_per_step=completions * spec.rollout.max_new_tokens,
        updates=spec.steps * spec.updates_per_step,
        assumptions=_assumptions(spec, model),
    )


def size(count: int) -> str:
    """Bytes in words: 15.2 GB (powers of ten)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _optimizer_bytes(dtype: str, stage: int) -> int:
    """Per parameter: two float32 moments, and a float32 master copy unless plain data parallel in float32."""
    return 8 if dtype == "float32" and stage == 0 else 12


def _rank(spec: JobSpec, model: Architecture, stage: int) -> RankMemory:
    ranks, width = spec.learner.ranks, _BYTES[spec.model.dtype]
    count = model.parameters
    weights = count * width
    if stage == 3:  # a shard, and what is gathered to compute: two layers, or the embedding
        weights = min(weights, _share(weights, ranks) + width * max(2 * model.layer_parameters, model.largest_tensor))
    optimizer = count * _optimizer_bytes(spec.model.dtype, stage)
    optimizer = _share(optimizer, ranks) if stage >= 1 else optimizer
    gradients = count * (4 if stage >= 1 else width)  # summed in float32 wherever ZeRO does the summing
    offloaded = spec.learner.offload_optimizer and stage >= 1
    return RankMemory(
        stage=stage,
        weights=weights,
        gradients=_share(gradients, ranks) if stage >= 2 else gradients,
        optimizer=0 if offloaded else optimizer,
        activations=_activations(spec, model),
        bucket=_bucket(spec, model),
        host_optimizer=optimizer if offloaded else 0,
    )


def _activations(spec: JobSpec, model: Architecture) -> int:
    """Bound of what one micro-batch keeps for its backward pass, attention scores never held as a matrix."""
    tokens, width = spec.learner.tokens_per_micro_batch, _BYTES[spec.model.dtype]
    heads = 2 * (model.heads + model.kv_heads) * model.head_dim
    elements = 8 * model.hidden + heads + 4 * model.intermediate
    layer = tokens * (width * elements + 16 * model.hidden)  # the norms compute in float32
    kept = model.layers * layer
    if spec.learner.gradient_checkpointing:
        kept = model.layers * tokens * width * model.hidden + layer
    logits = min(tokens * model.vocab, max(_share(tokens, _LOGIT_SHARE) * model.vocab, _LOGIT_ELEMENTS))
    head = 3 * 4 * logits + tokens * width * 2 * model.hidden
    return kept + head


def _bucket(spec: JobSpec, model: Architecture) -> int:
    width = _BYTES[spec.rollout_dtype]
    return max(model.largest_tensor * width, min(spec.learner.bucket_mb * _MB, model.parameters * width))


def _worker(spec: JobSpec, model: Architecture) -> WorkerMemory:
    width = _BYTES[spec.rollout_dtype]
    outstanding = (spec.rollout.max_staleness + 1) * spec.rollout.prompts_per_step * spec.rollout.group_size
    sequences = min(spec.rollout.max_num_seqs, _share(outstanding, spec.rollout.workers))
    per_token = model.kv_elements * width
    longest = spec.data.max_prompt_tokens + spec.rollout.max_new_tokens
    return WorkerMemory(
        weights=model.parameters * width,
        kv_per_token=per_token,
        kv_wanted=per_token * longest * sequences,
        sequences=sequences,
    )


def _payloads(spec: JobSpec, completions: int) -> int:
    """Token ids (4 bytes), log-probs (4) and text (about 4 a token) of all batches that may be outstanding."""
    one = 4 * spec.data.max_prompt_tokens + 12 * spec.rollout.max_new_tokens
    return (spec.rollout.max_staleness + 1) * completions * one


def _gpus(spec: JobSpec) -> int:
    """One for each learner rank and for each tensor-parallel share of a worker; with ipc two actors share one."""
    if spec.transport == "ipc":
        return _share(spec.learner.ranks + spec.rollout.workers, 2)
    return spec.learner.ranks + spec.rollout.workers * spec.rollout.tensor_parallel


def _share(count: int, among: int) -> int:
    return -(-count // among)


def _assumptions(spec: JobSpec, model: Architecture) -> tuple[str, ...]:
    notes = [
        "every prompt and completion at its limit; real ones are shorter",
        "attention that never holds its score matrix; logits in blocks",
        "without the libraries themselves (about 1 GB an actor) and DeepSpeed's communication buffers",
    ]
    if spec.model.dtype == "bfloat16":
        notes.append(
            "float32 master weights and AdamW moments, and float32 gradients from ZeRO 1 on, beside bfloat16 weights"
        )
    if spec.rollout.tensor_parallel > 1:
        notes.append(f"a rollout worker's numbers are for its {spec.rollout.tensor_parallel} GPUs together")
    if not model.exact:
        notes.append(f"model type {model.model_type!r} counted as if its layers were LLaMA's")
    return tuple(notes)
