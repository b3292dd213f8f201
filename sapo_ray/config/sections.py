"""The sections of a job that say what is trained and how; spec.py puts them together.

The text under each attribute is its reference documentation (unit, range, meaning). Unknown keys are refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

Gate = Literal["sigmoid", "erf", "arctan", "softsign", "clip"]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all parts of a job: unknown keys refused, defaults validated, attribute docstrings kept."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts True as 1; a job that says `workers: yes` means something else."""
        kinds = str(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and "bool" not in kinds and re.search(r"\b(int|float)\b", kinds):
            raise PydanticCustomError("bool_for_a_number", "a number is wanted")
        return value


class ModelSpec(Section):
    """The policy."""

    path: str
    """Hugging Face id, local folder, or a tiny model made on the spot: `builtin:addition`, `builtin:bytes`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the learner's weights and activations; log-probs and the loss are float32 always."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    warm_start_accuracy: Fraction | None = None
    """Only for `builtin:addition`: supervised warm start until sampled training accuracy reaches this."""


class SourceSpec(Section):
    """One data set. Rows are mappings; `prompt_field` and `answer_field` say where to look."""

    path: str
    """JSONL or Parquet file, folder of such files, Hugging Face data set id, or `builtin:addition`."""
    config: str | None = None
    """Configuration of a Hub data set, e.g. `main` of openai/gsm8k."""
    split: str = "train"
    """Split of a Hub data set, of a folder with `<split>.jsonl|parquet`, or of a builtin (`train`, `heldout`)."""
    name: str | None = None
    """Short name used in prompt ids and metrics; from the path if not given."""
    weight: Positive = 1.0
    """Share of this source in the mixture, relative to the others."""
    prompt_field: str = "question"
    """Field that holds the question; dots reach into nested mappings."""
    answer_field: str = "answer"
    """Field that holds the reference answer."""
    gold: Literal["as_is", "gsm8k", "boxed", "auto"] = "auto"
    """Where the reference stands in the answer field: all of it, after `####`, in `\\boxed{}`, whichever is there."""
    limit: Count | None = None
    """Use only the first so many rows."""


class DataSpec(Section):
    """Prompts."""

    train: Annotated[list[SourceSpec], Field(min_length=1)]
    """Training sources, mixed by weight in a seeded, resumable order."""
    template: Literal["chat", "plain"] = "chat"
    """`chat`: the tokenizer's chat template, the question as user message; `plain`: the rendered prompt as it is."""
    prompt: str = "{question}"
    """Rendered around each question; must contain `{question}`."""
    system: str | None = None
    """System message (chat only)."""
    max_prompt_tokens: Count = 1024
    """Longest prompt in tokens."""
    overlong: Literal["error", "skip"] = "error"
    """A longer prompt is an error at the start, or is skipped and counted."""
    unusable_gold: Literal["error", "skip"] = "error"
    """A reference answer that does not parse is an error at the start, or its row is skipped and counted."""
    shuffle: bool = True
    """Seeded order that is new in every epoch; else file order."""

    @model_validator(mode="after")
    def _prompt_has_a_place(self) -> DataSpec:
        if "{question}" not in self.prompt:
            raise ValueError(
                f"data.prompt must contain {{question}}, got {self.prompt!r}; put it where the question belongs"
            )
        if self.system is not None and self.template == "plain":
            raise ValueError("data.system needs data.template: chat; with plain, write it into data.prompt")
        return self


class AlgorithmSpec(Section):
    """Objective, gate, advantage and mismatch correction (docs/algorithm.md)."""

    loss: Literal["sapo", "grpo", "dr_grpo", "gspo", "cispo"] = "sapo"
    """Objective. `sapo` takes any gate; the others are baselines on the same interface."""
    gate: Gate = "sigmoid"
    """Gate of `sapo`."""
    tau_preset: Literal["qwen", "study"] | None = "qwen"
    """Temperatures by name: `qwen` 1.0 / 1.05 (2511.20347), `study` 10 / 12 (2602.19345)."""
    tau_pos: Positive | None = None
    """Gate temperature where the advantage is positive; over the preset."""
    tau_neg: Positive | None = None
    """Gate temperature where the advantage is negative; below tau_pos it has been seen to go unstable."""
    match_width: bool = False
    """Scale tau so that every gate has the half-width of the sigmoid at that tau."""
    restoring: bool = False
    """Keep the full pull back towards r = 1 (docs/algorithm.md); for training with r far from 1."""
    restoring_cap: Annotated[float, Field(ge=1)] = 3.0
    """Largest coefficient on the restoring side where the advantage is negative."""
    eps_low: Positive | None = None
    """Lower clip distance; default 0.2, gspo 3e-4, cispo none. With sapo, grpo: also what the clip metrics ask."""
    eps_high: Positive | None = None
    """Upper clip distance; default 0.2, gspo 4e-4, cispo 4.0 (weights above 1 + eps_high are cut)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """grpo only: bound of r where the advantage is negative (3 is usual)."""
    aggregation: Literal["sequence_mean", "token_mean", "constant"] | None = None
    """Token weights. Default: sequence_mean (sapo, grpo, gspo), token_mean (cispo), constant (dr_grpo)."""
    advantage: Literal["group_std", "group_mean", "rloo", "batch_std"] | None = None
    """Baseline and scale of rewards; default group_std, dr_grpo group_mean."""
    old_logprobs: Literal["decoupled", "bypass"] = "decoupled"
    """`decoupled`: recomputed by the learner at the start of the step; `bypass`: the sampler's own."""
    correction: Literal["tis", "icepop", "sequence_mask", "sequence_mask_tis", "product_mask", "none"] = "tis"
    """Train-inference mismatch correction (decoupled only)."""
    correction_cap: Annotated[float, Field(gt=1)] | None = None
    """Bound C. Default: tis 2.0, icepop 5.0 (keeps [0.5, C]), sequence masks 1.05, product_mask 3.0."""
    mask_truncated: bool = False
    """Truncated completions count in denominators but carry no loss."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Tokens before max_new_tokens over which a reward penalty falls linearly to -1; 0 is off."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by further prompts."""
    dynamic_sampling_limit: Annotated[float, Field(ge=1)] = 4.0
    """At most so many times prompts_per_step are issued for one step; then the step goes on with what it has."""

    @model_validator(mode="after")
    def _taus(self) -> AlgorithmSpec:
        if self.tau_preset is None and (self.tau_pos is None or self.tau_neg is None):
            raise ValueError(
                "algorithm.tau_preset is null: give both algorithm.tau_pos and tau_neg, or a preset (qwen, study)"
            )
        if self.restoring and (self.loss != "sapo" or self.gate == "clip"):
            raise ValueError("algorithm.restoring needs loss: sapo and a smooth gate (sigmoid, erf, arctan, softsign)")
        if self.dual_clip is not None and self.loss != "grpo":
            raise ValueError(f"algorithm.dual_clip belongs to loss: grpo, got loss: {self.loss}; remove it")
        if self.old_logprobs == "bypass" and self.correction not in ("none", "tis"):
            raise ValueError(
                f"algorithm.correction {self.correction!r} needs old_logprobs: decoupled; with bypass set it to none"
            )
        return self


class RolloutSpec(Section):
    """Sampling by vLLM."""

    workers: Count = 1
    """Rollout actors to begin with, each with an engine of its own."""
    min_workers: Count = 1
    """Fewest with which the run goes on: below them it fails."""
    max_workers: Count | None = None
    """Most that it may be scaled to; `workers` if not given."""
    drain_timeout_s: NonNegative = 60.0
    """A worker that is scaled away may finish what it samples for so long; the rest is then re-issued elsewhere."""
    autoscale: bool = False
    """Choose the number of workers, between min_workers and max_workers, by how long the learner waits for them."""
    autoscale_wait: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a step that the learner should wait for completions; default 0.4 if max_staleness is 0, else 0.1."""
    autoscale_steps: Count = 5
    """Steps measured for each decision."""
    prompts_per_step: Count = 64
    """Groups in one batch."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt, G."""
    max_new_tokens: Count = 1024
    """Completions are cut here."""
    temperature: Positive = 1.0
    """Of training samples; log-probs are taken at the same temperature."""
    top_p: Annotated[float, Field(ge=1, le=1)] = 1.0
    """Must be 1: log-probs are over the full vocabulary."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Age in publishes (one a step) a sample may have in training. 0: synchronous; k: generation k batches ahead."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the engine's weights, and of published weights; model.dtype if not given."""
    max_num_seqs: Count = 256
    """Sequences an engine decodes at once."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """GPU only."""
    kv_cache_mb: Count = 256
    """CPU only: memory for keys and values, MB per worker."""
    tensor_parallel: Count = 1
    """GPUs per worker."""
    enforce_eager: bool = False
    """No CUDA graphs (always so on CPU)."""
    group_deadline_s: Positive = 600.0
    """A group not finished by then is re-issued elsewhere; after the second time its prompt is quarantined."""

    @model_validator(mode="after")
    def _workers_are_within_their_bounds(self) -> RolloutSpec:
        if self.autoscale and self.max_workers is None:
            raise ValueError("rollout.autoscale needs rollout.max_workers, the most it may ask for; give it")
        if not self.min_workers <= self.workers <= self.most_workers:
            raise ValueError(
                f"rollout.workers must be between rollout.min_workers ({self.min_workers}) and rollout.max_workers "
                f"({self.most_workers}), got {self.workers}; change it, or the bound"
            )
        return self

    @property
    def most_workers(self) -> int:
        """What the number of workers may grow to."""
        return self.max_workers or self.workers


class VerifierSpec(Section):
    """Grading."""

    workers: Count = 1
    """Verifier actors."""
    processes: Count = 2
    """Grading processes of each; one hangs, one is killed, the others go on."""
    deadline_s: Positive = 5.0
    """Per answer; then SIGKILL and verdict `error`."""
    answer: Literal["auto", "boxed", "gsm8k", "tag"] = "auto"
    """Where the answer stands: last `\\boxed{}`, after `####`, in `<answer>`; auto: whichever comes last."""
    format_reward: Literal["none", "think_answer"] = "none"
    """think_answer: {0, .25, .5, 1} for `<think>...</think> <answer>...</answer>`."""
    reward: str | None = None
    """`module:function` of your own: f(completion=, gold=, prompt=) -> float or {part: float}; same isolation."""
    unverifiable: Literal["exclude", "wrong"] = "exclude"
    """An error of the completion itself, reproduced once (no answer in time, too long, it ended the grading process):
    leave it out, or reward 0. What a reward function raises or returns amiss is always left out."""
    max_answer_chars: Count = 1000
    """Longer answers are not parsed (verdict error, too_long)."""
    memory_mb: Count = 2048
    """Address space of one grading process."""

    @model_validator(mode="after")
    def _reward_names_a_function(self) -> VerifierSpec:
        if self.reward is not None and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", self.reward):
            raise ValueError(
                f"verifier.reward must be `module:function`, got {self.reward!r}; "
                "for def score(...) in rewards/math.py write rewards.math:score"
            )
        return self


class LearnerSpec(Section):
    """Optimization by DeepSpeed."""

    ranks: Count = 1
    """Learner actors (data parallel)."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed ZeRO stage."""
    mini_batches: Count = 1
    """Optimizer updates per pass over a batch."""
    epochs: Count = 1
    """Passes over a batch."""
    tokens_per_micro_batch: Count = 16384
    """Upper bound of rows x longest row, padding included, of one forward pass per rank."""
    lr: Positive = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant, or down to lr x lr_end over the run."""
    lr_end: Fraction = 0.0
    """Final learning rate as a share of lr."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates of linear warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW."""
    eps: Positive = 1e-8
    """AdamW."""
    weight_decay: NonNegative = 0.0
    """AdamW."""
    grad_clip: Positive = 1.0
    """Global norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward."""
    offload_optimizer: bool = False
    """Optimizer state in host memory (ZeRO 1-3 on GPUs)."""
    transport: Literal["auto", "shared_memory", "nccl", "ipc"] = "auto"
    """How weights reach the workers; auto is shared_memory, on GPUs too: it is the transport that was tested."""
    bucket_mb: Count = 256
    """Weights are gathered and sent in buckets of this size; a larger tensor is a bucket of its own."""
    max_nonfinite: Count = 3
    """Updates skipped in a row for a non-finite gradient before the run fails."""
