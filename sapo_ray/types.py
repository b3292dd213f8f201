"""The data that moves between the parts, one record per stage.

A sample's way:

    Prompt -> GroupRequest -> (CompletionMeta, CompletionPayload) -> Grading -> TrainSample -> update -> Published

Glossary
    group       the completions sampled from one prompt; its size is G
    completion  one sampled answer, tokens y_1..y_T
    attempt     number of the driver process of a run, from 1; a resume is a new attempt
    lineage     restores of the learner within an attempt, from 0: what came after a restore's point is abandoned
    version     (attempt, number, lineage): number counts publishes since the run began; 0 is the initial policy
    age         version number of the learner at the start of the step minus that of a completion's oldest token
    ref         a Ray object reference; the driver passes payload refs on and never opens them
    `error`     a verdict that says nothing about the answer (timeout, crash, bad gold); never a reward of 0

Nothing here imports torch, ray or vllm; arrays are numpy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np  # not at run time: grading processes, which start often, do without it


class Verdict(StrEnum):
    """What a verifier says of one completion."""

    CORRECT = "correct"
    WRONG = "wrong"
    ERROR = "error"


class DropReason(StrEnum):
    """Why an issued group or completion was not trained on. A drop is data, not a log line."""

    VERIFIER_ERRORS = "verifier_errors"
    STALE = "stale"
    ZERO_SIGNAL = "zero_signal"
    QUARANTINED = "quarantined"
    NONFINITE = "nonfinite"
    ROLLED_BACK = "rolled_back"


class PolicyVersion(NamedTuple):
    """Identity of published weights. Compare by `order` only: after a restore numbers come again.

    Written as `attempt.number`, and as `attempt.number.lineage` once the learner was restored within the attempt: the
    numbers after the restore's point come again, the versions do not.
    """

    attempt: int
    number: int
    lineage: int = 0

    def __str__(self) -> str:
        return f"{self.attempt}.{self.number}" + (f".{self.lineage}" if self.lineage else "")

    @property
    def order(self) -> tuple[int, int, int]:
        """Increases from one publish of a run to the next."""
        return self.attempt, self.lineage, self.number

    @classmethod
    def parse(cls, text: str) -> PolicyVersion:
        attempt, number, *lineage = (int(part) for part in text.split("."))
        return cls(attempt, number, *lineage)


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled under `version`."""

    version: PolicyVersion
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt, ready to be sampled from."""

    id: str
    """`source:row:epoch`, unique within a run."""
    index: int
    """Position in issue order, from 0."""
    source: str
    text: str
    """As the model sees it, for display."""
    token_ids: tuple[int, ...]
    gold: str
    """Reference answer as the data set gives it, after gold extraction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One completion wanted: its index within the group [0, G) and its sampling seed (63 bits)."""

    index: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRequest:
    """Completions of one prompt wanted from one worker."""

    group_id: str
    prompt_token_ids: tuple[int, ...]
    samples: tuple[SampleRequest, ...]
    max_new_tokens: int
    temperature: float
    """0 is greedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionMeta:
    """What the driver sees of a finished completion."""

    group_id: str
    sample_index: int
    prompt_tokens: int
    tokens: int
    """Sampled tokens, the end-of-sequence token included."""
    finish_reason: str
    """`stop` (end of sequence) or `length` (cut at max_new_tokens: truncated)."""
    spans: tuple[VersionSpan, ...]
    """Contiguous, cover [0, tokens)."""
    worker: str
    seconds: float

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def oldest(self) -> PolicyVersion:
        """Version of the oldest token."""
        return min((span.version for span in self.spans), key=lambda version: version.order)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionPayload:
    """A finished completion itself; travels by ref from rollout worker to verifier and learner."""

    prompt_token_ids: np.ndarray
    """int32 [P]"""
    token_ids: np.ndarray
    """int32 [T]"""
    logprobs: np.ndarray
    """float32 [T], log-probability of each sampled token under the sampler at the sampling temperature."""
    text: str
    """Decoded once by the worker, special tokens skipped; for grading and display only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grading:
    """A verifier's answer. `reward` is None exactly when the verdict is `error`."""

    verdict: Verdict
    reward: float | None
    parts: dict[str, float] = field(default_factory=dict)
    """Named summands of the reward, e.g. {"answer": 1.0, "format": 0.5}."""
    reason: str = ""
    """Machine-readable: `match`, `mismatch`, `no_answer`, `timeout`, `too_long`, `died` (the completion ended
    the grading process), `crash` (a reward function raised), `gold_unparseable`, ..."""
    detail: str = ""
    """For people: the exception of a reward function, the exit status of a process; at most 500 characters."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert (self.reward is None) == (self.verdict is Verdict.ERROR), self


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSample:
    """A graded completion with its advantage, chosen for a step."""

    group_id: str
    sample_index: int
    prompt_tokens: int
    tokens: int
    reward: float
    advantage: float
    truncated: bool
    masked: bool
    """Counts in denominators but carries no loss (truncated and masked on request)."""
    spans: tuple[VersionSpan, ...]
    payload: Any
    """Ref to the CompletionPayload."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMeta:
    """Where one tensor of a published policy lies."""

    name: str
    dtype: str
    """Wire dtype, e.g. `bfloat16`."""
    shape: tuple[int, ...]
    bucket: int
    offset: int
    """Bytes from the bucket's start; aligned to 64."""
    nbytes: int
    checksum: int
    """64-bit checksum of the wire bytes (weights.fingerprint.checksum64)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """Fixed sequences and what the learner says of them; a worker must agree before it is used."""

    sequences: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    """Of tokens 1.. of each sequence at temperature 1, learner forward in the rollout dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsManifest:
    """Everything about published weights but the bytes."""

    version: PolicyVersion
    fingerprint: str
    """16 hex digits over (version, then name, dtype, shape, checksum in name order)."""
    tensors: tuple[TensorMeta, ...]
    bucket_nbytes: tuple[int, ...]
    canary: Canary
    transport: str
    """`shared_memory`, `nccl` or `ipc`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A manifest and the refs of its buckets (uint8 [nbytes] each; empty for who was pushed them another way)."""

    manifest: WeightsManifest
    buckets: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Takeover:
    """What a worker reports after it took weights over and passed the canary."""

    worker: str
    version: PolicyVersion
    seconds: float
    canary_max: float
    """Largest |difference| of canary log-probs."""
    canary_mean: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerCount:
    """Rollout workers at one moment."""

    wanted: int
    ready: int
    """They sample, or are just taking newer weights over."""
    starting: int
    """Placed, and not ready yet, or left behind until it has the newest weights."""
    pending: int
    """The cluster has no room for them."""
    draining: int
    """Surplus; they finish what they have."""
    given_up: int
    """Wanted, but lost too often to be replaced."""
    asked: str
    """If some are pending: what the cluster has no room for, in words."""
    last_loss: str
    """Why a worker was lost last."""
    nodes: tuple[str, ...] = ()
    """Hosts of those that were started, each once: nodes that cannot be given back."""


def sampling_seed(job_seed: int, prompt_id: str, sample_index: int) -> int:
    """Seed of one completion: a hash of who it is, never of when or where it is sampled. In [0, 2**63)."""
    digest = hashlib.blake2b(f"{job_seed}/{prompt_id}/{sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
