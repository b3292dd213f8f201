"""JobSpec: the one description of a training job, for file, command line and API alike.

Here are the whole, the rules between its sections, and the sections about how a run is looked after; what is trained
and how stands in sections.py. The text under each attribute is its reference documentation (unit, range, meaning).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sapo_ray.config.sections import (
    AlgorithmSpec,
    Count,
    DataSpec,
    Fraction,
    Gate,
    LearnerSpec,
    ModelSpec,
    NonNegative,
    Positive,
    RolloutSpec,
    Section,
    SourceSpec,
    VerifierSpec,
)

__all__ = [
    "AlgorithmSpec",
    "CheckpointSpec",
    "DataSpec",
    "DeadlinesSpec",
    "EvaluationSpec",
    "Gate",
    "GuardSpec",
    "JobSpec",
    "LearnerSpec",
    "LoggingSpec",
    "ModelSpec",
    "OutputSpec",
    "RolloutSpec",
    "Section",
    "SourceSpec",
    "VerifierSpec",
]


SECRET_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,127}")
"""Of a secret: an environment variable."""
SecretName = Annotated[str, Field(pattern=f"^{SECRET_NAME.pattern}$")]


class CheckpointSpec(Section):
    """Checkpoints."""

    every: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints; 0: only at the end."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest ones kept."""
    min_free_gb: NonNegative = 1.0
    """Free space required on the run's disk before each checkpoint, above the checkpoint's own size."""


class EvaluationSpec(Section):
    """Held-out accuracy."""

    data: list[SourceSpec] = Field(default_factory=list)
    """Sources; empty: no evaluation."""
    every: Annotated[int, Field(ge=0)] = 10
    """Steps between evaluations; 0: only before and after."""
    limit: Count | None = None
    """Prompts used of each source, the first so many."""
    samples: Annotated[int, Field(ge=0)] = 1
    """Sampled completions per prompt, beside the greedy one, before and after; 0: greedy only."""
    temperature: Positive = 1.0
    """Of the sampled completions."""
    max_new_tokens: Count | None = None
    """rollout.max_new_tokens if not given."""


class LoggingSpec(Section):
    """Where metrics go beside metrics.jsonl and TensorBoard, which are always written."""

    sample_groups: Annotated[int, Field(ge=0)] = 4
    """Groups per step whose texts are kept in samples.jsonl."""
    wandb_project: str | None = None
    """Weights & Biases project; needs `pip install wandb`."""
    mlflow_uri: str | None = None
    """MLflow tracking URI; needs `pip install mlflow`."""


class OutputSpec(Section):
    """Where the trained model goes, beside `export/` of the run."""

    uri: str | None = None
    """Folder for a copy: an absolute path, or a URL as `s3://bucket/models/mine` (the driver's machine needs fsspec's
    package for it, e.g. s3fs; credentials are `secrets`). Files of the same names there are overwritten."""

    @field_validator("uri")
    @classmethod
    def _a_folder_somewhere(cls, uri: str | None) -> str | None:
        if uri is not None and (problem := _what_is_wrong_with(uri)):
            raise ValueError(f"output.uri {problem}")
        return uri


_PASSWORD = re.compile(r"[^:]+://[^@]*:[^@]*@")


def _what_is_wrong_with(uri: str) -> str | None:
    """Of a place for a copy, which an operator's list of what is allowed is to be compared with. Shows no password."""
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", uri)
    if "://" in uri and (_PASSWORD.match(uri) or "?" in uri or "#" in uri):
        return "must hold no user, password or query: name the credentials in `secrets`, as environment variables"
    if len(uri) > 1000 or not uri.isprintable():
        return "must be at most 1000 printable characters"
    if "::" in uri or ".." in uri.split("/"):
        return f"must lead to one folder, without `::` and `..`, got {uri!r}"
    local = scheme is not None and scheme.group(1) in ("file", "local")
    if uri.startswith("/") or (scheme and not local and len(uri) > scheme.end()):
        return None
    if local and re.fullmatch(r"[a-z]+:///[^/].*", uri):
        return None
    return f"must be an absolute path or a URL as s3://bucket/models/mine, got {uri!r}"


class DeadlinesSpec(Section):
    """Bounds of the driver's waits, in seconds. Each names what it waits for when it runs out."""

    start_s: Positive = 900.0
    """Every actor up and ready."""
    step_s: Positive = 3600.0
    """One learner step."""
    publish_s: Positive = 600.0
    """Weights gathered, sent, taken over and attested."""
    checkpoint_s: Positive = 1800.0
    """One checkpoint written."""
    batch_s: Positive = 3600.0
    """Next batch of graded groups complete."""
    evaluation_s: Positive = 3600.0
    """One evaluation: every completion sampled and graded."""
    output_s: Positive = 3600.0
    """The trained model copied to output.uri; a run that has ended well is none the worse if not."""


class GuardSpec(Section):
    """When generation runs less far ahead of training, and when something looks wrong."""

    max_kl: Positive | None = 0.1
    """KL of the sampler to the learner (`mismatch/kl`, nats per token) beyond which generation runs fewer batches ahead
    than rollout.max_staleness allows; null: never."""
    max_age: Positive | None = None
    """Mean age of trained samples (`age/sample_mean`, publishes) beyond which it does so too; null: never."""
    max_ratio: Annotated[float, Field(gt=1)] | None = 1e4
    """Ratio of new to old policy of any token, or its inverse, beyond which there is an alarm; null: never."""
    reward_drop: Fraction | None = 0.5
    """Share of its best by which the mean reward of 5 steps may fall before there is an alarm; null: never."""


class JobSpec(Section):
    """A training job."""

    preset: Literal["quickstart"] | None = None
    """Values to start from; everything written in the job goes over them."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "job"
    """Letters, digits, dot, dash, underscore; at most 63."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of prompt order, sampling, batches and model initialisation."""
    steps: Count
    """Rollout batches consumed. Optimizer updates: steps x mini_batches x epochs."""
    run_dir: str | None = None
    """Folder of this run; `runs/<name>-<time>` if not given."""
    secrets: list[SecretName] = Field(default_factory=list)
    """Environment variables that the driver is to have and no job may hold, e.g. `[HF_TOKEN]`; named here, kept by the
    operator of the service. Without a service they must be set."""
    model: ModelSpec
    data: DataSpec
    algorithm: AlgorithmSpec = AlgorithmSpec()
    rollout: RolloutSpec = RolloutSpec()
    verifier: VerifierSpec = VerifierSpec()
    learner: LearnerSpec = LearnerSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    logging: LoggingSpec = LoggingSpec()
    output: OutputSpec = OutputSpec()
    deadlines: DeadlinesSpec = DeadlinesSpec()
    guard: GuardSpec = GuardSpec()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> JobSpec:
        problems = []
        if self.learner.mini_batches > self.rollout.prompts_per_step:
            problems.append(
                f"learner.mini_batches must be <= rollout.prompts_per_step ({self.rollout.prompts_per_step}), "
                f"got {self.learner.mini_batches}; a mini-batch holds whole groups"
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if self.learner.tokens_per_micro_batch < longest:
            problems.append(
                "learner.tokens_per_micro_batch must be >= "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}, "
                f"got {self.learner.tokens_per_micro_batch}; one sample must fit"
            )
        if self.model.warm_start_accuracy is not None and self.model.path != "builtin:addition":
            problems.append(
                f"model.warm_start_accuracy belongs to model.path: builtin:addition, got {self.model.path!r}; "
                "set model.warm_start_accuracy: null"
            )
        if self.algorithm.overlong_buffer >= self.rollout.max_new_tokens:
            problems.append(
                f"algorithm.overlong_buffer must be < rollout.max_new_tokens ({self.rollout.max_new_tokens}), "
                f"got {self.algorithm.overlong_buffer}; shorten it, or 0 switches the penalty off"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _engines_can_do_it(self) -> JobSpec:
        problems = []
        if self.rollout_dtype == "float32" and self.model.dtype == "bfloat16":
            problems.append(
                "rollout.dtype float32 needs model.dtype float32, got bfloat16: published weights would be bfloat16 "
                "values in wider words, and the canary could not hold; leave rollout.dtype out"
            )
        if self.learner.offload_optimizer and self.learner.zero_stage == 0:
            problems.append(
                "learner.offload_optimizer needs learner.zero_stage >= 1, got 0; set it to false, or zero_stage to 2"
            )
        if self.learner.transport == "ipc" and self.rollout.tensor_parallel > 1:
            problems.append(
                "learner.transport: ipc needs rollout.tensor_parallel 1, got "
                f"{self.rollout.tensor_parallel}: a worker shares one GPU with one learner; use auto or nccl"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates in one step."""
        return self.learner.mini_batches * self.learner.epochs

    @property
    def rollout_dtype(self) -> str:
        """dtype of engines and published weights."""
        return self.rollout.dtype or self.model.dtype

    @property
    def transport(self) -> Literal["shared_memory", "nccl", "ipc"]:
        """How weights reach the workers, `auto` resolved."""
        return "shared_memory" if self.learner.transport == "auto" else self.learner.transport
