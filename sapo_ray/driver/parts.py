"""What the driver needs of the parts it runs, as protocols: real pools of actors, or fakes in tests and simulations.

`Ref` stands for a Ray object reference to a payload; the driver passes it on and never opens it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sapo_ray.algorithms.settings import Objective
from sapo_ray.types import (
    CompletionMeta,
    Grading,
    GroupRequest,
    PolicyVersion,
    Prompt,
    Published,
    Takeover,
    TrainSample,
    WorkerCount,
)

Ref = Any


class Prompts(Protocol):
    """Prompts in a seeded order that can be taken up again."""

    @property
    def fingerprint(self) -> str:
        """Identity of the data and of the settings that make prompts of it."""
        ...

    def take(self) -> Prompt: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Rollouts(Protocol):
    """Samples completions. Unblocked by: an attested worker being free."""

    async def start(self) -> None: ...

    def living(self) -> int:
        """Workers that sample, or are just taking newer weights over."""
        ...

    def count(self) -> WorkerCount:
        """How many workers are wanted, and what those that exist are at."""
        ...

    def scale(self, workers: int, minimum: int) -> None:
        """Aim at so many workers, of which `minimum` are what the pool must not fall below. Returns at once."""
        ...

    def generate(self, request: GroupRequest) -> AsyncIterator[tuple[CompletionMeta, Ref]]:
        """Completions as they finish; what came before an error stays good.

        Raises WorkerLost when the worker dies, WorkerDrained when it is scaled away.
        """
        ...

    def push_targets(self) -> list[Any]:
        """Actors that a native transport may push weights into; `update` must follow, or `push_failed`."""
        ...

    def push_failed(self) -> None:
        """The learner was lost while it published: who may hold half a push is used no more."""
        ...

    async def update(self, published: Published) -> list[Takeover]:
        """Bring all live workers to the published weights; returns once they are attested."""
        ...

    async def close(self) -> None: ...


class Verifiers(Protocol):
    """Grades completions, each within the verifier's deadline."""

    async def start(self) -> None: ...

    async def grade(self, prompt: str, gold: str, payloads: list[Ref]) -> list[Grading]: ...

    async def close(self) -> None: ...


class StepReport(Protocol):
    """What a learner step did."""

    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def updates(self) -> int: ...

    @property
    def dropped(self) -> tuple[tuple[str, int], ...]:
        """(group id, sample index) of samples in skipped updates."""
        ...


class Learner(Protocol):
    """Owns the weights."""

    @property
    def lost(self) -> bool:
        """A verb failed because a rank died or did not finish: none of them is left."""
        ...

    async def start(self) -> None: ...

    async def restart(self) -> None:
        """New ranks with the initial weights, in the place of lost ones."""
        ...

    async def set_canary(self, sequences: tuple[tuple[int, ...], ...]) -> None: ...

    async def train(self, step: int, samples: list[TrainSample]) -> StepReport:
        """Raises PayloadLost, with nothing done, if one of the samples is gone."""
        ...

    async def publish(self, version: PolicyVersion, receivers: list[Any]) -> Published:
        """Weights of this moment. `receivers` are actors that a native transport pushes into."""
        ...

    async def save(self, folder: Path) -> None: ...

    async def load(self, folder: Path) -> None: ...

    async def close(self) -> None: ...


class Payloads(Protocol):
    """Moves completion payloads between the object store and files, without the driver seeing them."""

    async def save(self, path: Path, refs: list[Ref]) -> None:
        """Raises PayloadLost if one of them is gone."""
        ...

    async def lost(self, groups: list[list[Ref]]) -> list[int]:
        """Places of the groups of which a payload is gone."""
        ...

    async def load(self, path: Path, count: int) -> list[Ref]: ...

    async def log_texts(self, path: Path, rows: list[dict[str, Any]], refs: list[Ref]) -> None:
        """Append `rows`, each with the `completion` text of its payload, to a JSONL file."""
        ...


class Tracker(Protocol):
    """Takes one row of metrics a step. `log` is called in the loop: it must not wait for anybody."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def rewind(self, step: int) -> None:
        """Rows of later steps are void."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The pools a driver runs."""

    rollouts: Rollouts
    verifiers: Verifiers
    learner: Learner
    payloads: Payloads


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What an attempt trains on, and towards."""

    prompts: Prompts
    evaluation: list[Prompt]
    objective: Objective
