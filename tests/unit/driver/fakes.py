"""Fakes of the pools: they keep the pools' promises, in memory and at once, and record what was asked of them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sapo_ray.algorithms.settings import resolve as resolve_objective
from sapo_ray.audit import audit
from sapo_ray.config.load import resolve
from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.checkpoint import Checkpoints
from sapo_ray.driver.driver import Driver
from sapo_ray.driver.hold import DiskHold
from sapo_ray.driver.journal import Journal, read_journal
from sapo_ray.driver.orders import StandingOrders
from sapo_ray.driver.parts import Material, Parts
from sapo_ray.driver.payloads import load_payloads, save_payloads
from sapo_ray.driver.pulse import Pulse
from sapo_ray.errors import PayloadLost, WorkerLost
from sapo_ray.types import (
    Canary,
    CompletionMeta,
    CompletionPayload,
    Grading,
    PolicyVersion,
    Prompt,
    Published,
    Takeover,
    Verdict,
    VersionSpan,
    WeightsManifest,
    WorkerCount,
)


def job(**changes: Any) -> JobSpec:
    """Four groups of four a step, three steps."""
    base: dict[str, Any] = {
        "steps": 3,
        "model": {"path": "builtin:addition"},
        "data": {"train": [{"path": "builtin:addition"}], "template": "plain", "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 16, "group_deadline_s": 1.0},
        "learner": {"tokens_per_micro_batch": 64},
        "checkpoint": {"every": 1, "min_free_gb": 0},
        "deadlines": {"batch_s": 5, "step_s": 5, "publish_s": 5, "checkpoint_s": 5},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            base[section] = {**base.get(section, {}), key: value}
        else:
            base[section] = value
    return resolve(base)


class FakePrompts:
    """An endless source: prompt i is `t:i:0`."""

    def __init__(self, fingerprint: str = "data-1") -> None:
        self.fingerprint = fingerprint
        self.taken = 0

    def take(self) -> Prompt:
        i = self.taken
        self.taken += 1
        return Prompt(id=f"t:{i}:0", index=i, source="t", text=f"{i}=", token_ids=(1, 2, i), gold=str(i))

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


@dataclass
class FakeRollouts:
    """Completions after random short delays, so that arrival order differs from issue order."""

    jitter: random.Random = field(default_factory=lambda: random.Random(0))
    version: PolicyVersion | None = None
    requests: list[Any] = field(default_factory=list)
    die: dict[str, list[int]] = field(default_factory=dict)
    """Group id -> completions delivered before each death of its worker."""
    hang: set[str] = field(default_factory=set)
    learner: Any = None
    workers: int = 1
    scaled: list[tuple[int, int]] = field(default_factory=list)
    """(workers, minimum) of each call."""
    slowness: float = 0.003
    """Longest time of one completion, seconds."""
    under_way: int = 0
    most_under_way: int = 0
    completions_under_way: int = 0
    overlap: int = 0
    """Completions finished while the learner was training."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def living(self) -> int:
        return self.workers

    def count(self) -> WorkerCount:
        return WorkerCount(
            wanted=self.workers,
            ready=self.workers,
            starting=0,
            pending=0,
            draining=0,
            given_up=0,
            asked="",
            last_loss="",
        )

    def scale(self, workers: int, minimum: int) -> None:
        self.workers = workers
        self.scaled.append((workers, minimum))

    def push_targets(self) -> list[Any]:
        return []

    def push_failed(self) -> None: ...

    async def update(self, published: Published) -> list[Takeover]:
        self.version = published.manifest.version
        return [Takeover(worker="w0", version=self.version, seconds=0.0, canary_max=0.0, canary_mean=0.0)]

    async def generate(self, request: Any) -> AsyncIterator[tuple[CompletionMeta, Any]]:
        self.requests.append(request)
        assert self.version is not None, "generated before any weights were taken over"
        version = self.version
        self.under_way += 1
        self.completions_under_way += len(request.samples)
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            async for completion in self._sample(request, version):
                yield completion
        finally:
            self.under_way -= 1
            self.completions_under_way -= len(request.samples)

    async def _sample(self, request: Any, version: PolicyVersion) -> AsyncIterator[tuple[CompletionMeta, Any]]:
        deaths = self.die.get(request.group_id)
        survive = deaths.pop(0) if deaths else None
        for delivered, sample in enumerate(request.samples):
            if request.group_id in self.hang:
                await asyncio.sleep(3600)
            await asyncio.sleep(self.jitter.random() * self.slowness)
            if survive == delivered:
                raise WorkerLost("worker w0 died")
            if self.learner is not None and self.learner.busy:
                self.overlap += 1
            tokens = 1 + sample.seed % 5
            meta = CompletionMeta(
                group_id=request.group_id,
                sample_index=sample.index,
                prompt_tokens=3,
                tokens=tokens,
                finish_reason="stop",
                spans=(VersionSpan(version=version, start=0, end=tokens),),
                worker="w0",
                seconds=0.001,
            )
            payload = CompletionPayload(
                prompt_token_ids=np.array(request.prompt_token_ids, np.int32),
                token_ids=np.arange(tokens, dtype=np.int32),
                logprobs=np.zeros(tokens, np.float32),
                text=f"{request.group_id}/{sample.index}/{sample.seed}",
            )
            yield meta, payload


@dataclass
class FakeVerifiers:
    """Correct where the sample's seed is even; groups named in `errors` get that many errors."""

    errors: dict[str, int] = field(default_factory=dict)
    equal: bool = False
    hang: bool = False

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def grade(self, prompt: str, gold: str, payloads: list[CompletionPayload]) -> list[Grading]:
        if self.hang:
            await asyncio.sleep(3600)
        errors = self.errors.get(gold, 0)
        gradings = []
        for i, payload in enumerate(payloads):
            right = not self.equal and int(payload.text.rsplit("/", 1)[1]) % 2 == 0
            if i < errors:
                gradings.append(Grading(verdict=Verdict.ERROR, reward=None, reason="timeout"))
            else:
                verdict = Verdict.CORRECT if right else Verdict.WRONG
                gradings.append(Grading(verdict=verdict, reward=float(right), parts={"answer": float(right)}))
        return gradings


@dataclass
class FakeLearner:
    """Counts; its weights are the list of batches it was trained on."""

    trained: list[list[tuple[str, int, float]]] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    busy: bool = False
    fail_at: int | None = None
    seconds: float = 0.0
    number: int = 0
    dropped: tuple[tuple[str, int], ...] = ()
    updates: int = 1
    dies: list[tuple[str, int]] = field(default_factory=list)
    """(verb, step) at which a rank dies, each once; verbs are train, publish, save, load, restart."""
    lost: bool = False
    restarts: int = 0

    def live_through(self, verb: str, step: int) -> None:
        assert not self.lost
        if (verb, step) in self.dies:
            self.dies.remove((verb, step))
            self.lost = True
            raise WorkerLost(f"learner {verb}: rank 0 died")

    async def restart(self) -> None:
        self.restarts += 1
        self.lost, self.trained = False, []
        self.live_through("restart", self.restarts)

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def set_canary(self, sequences: Any) -> None: ...

    async def train(self, step: int, samples: list[Any]) -> Any:
        if step == self.fail_at:
            raise WorkerLost("learner rank 0 died")
        self.live_through("train", step)
        self.busy = True
        await asyncio.sleep(self.seconds)
        self.busy = False
        self.ages += [self.number - min(span.version.number for span in sample.spans) for sample in samples]
        self.trained.append([(s.group_id, s.sample_index, s.advantage) for s in samples])
        return SimpleNamespace(metrics={"loss": float(len(samples))}, updates=self.updates, dropped=self.dropped)

    async def publish(self, version: PolicyVersion, receivers: list[Any]) -> Published:
        self.live_through("publish", version.number)
        self.number = version.number
        manifest = WeightsManifest(
            version=version,
            fingerprint=f"{version.attempt:04x}{version.lineage:04x}{version.number:08x}",
            tensors=(),
            bucket_nbytes=(),
            canary=Canary(sequences=(), logprobs=()),
            transport="shared_memory",
        )
        return Published(manifest=manifest, buckets=())

    async def save(self, folder: Path) -> None:
        self.live_through("save", self.number)
        folder.mkdir()
        (folder / "weights.json").write_text(json.dumps(self.trained))

    async def load(self, folder: Path) -> None:
        self.live_through("load", int(folder.parent.name.removeprefix("step-")))
        self.trained = [[tuple(s) for s in batch] for batch in json.loads((folder / "weights.json").read_text())]


@dataclass
class FakePayloads:
    """Real files; the refs are the payloads themselves."""

    gone: list[Any] = field(default_factory=list)
    """Payloads that went with their node."""

    async def save(self, path: Path, refs: list[Any]) -> None:
        if await self.lost([refs]):
            raise PayloadLost("a node died")
        save_payloads(str(path), *refs)

    async def lost(self, groups: list[list[Any]]) -> list[int]:
        return [i for i, refs in enumerate(groups) if any(ref is gone for ref in refs for gone in self.gone)]

    async def load(self, path: Path, count: int) -> list[Any]:
        loaded = load_payloads(str(path), count)
        return loaded if isinstance(loaded, list) else [loaded]

    async def log_texts(self, path: Path, rows: list[dict[str, Any]], refs: list[Any]) -> None:
        with path.open("a") as file:
            for row, ref in zip(rows, refs, strict=True):
                file.write(json.dumps({**row, "completion": ref.text}) + "\n")


class RowKeeper:
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows[step] = metrics

    def rewind(self, step: int) -> None:
        self.rows = {number: row for number, row in self.rows.items() if number <= step}

    def close(self) -> None: ...


@dataclass
class Bench:
    """A driver with fakes around it; one attempt after another on the same run directory."""

    run_dir: Path
    spec: JobSpec
    rollouts: FakeRollouts = field(default_factory=FakeRollouts)
    verifiers: FakeVerifiers = field(default_factory=FakeVerifiers)
    learner: FakeLearner = field(default_factory=FakeLearner)
    prompts: FakePrompts = field(default_factory=FakePrompts)
    rows: RowKeeper = field(default_factory=RowKeeper)
    evaluation: list[Prompt] = field(default_factory=list)
    trackers: list[Any] = field(default_factory=list)
    orders: StandingOrders = field(default_factory=StandingOrders)
    payloads: FakePayloads = field(default_factory=FakePayloads)

    async def attempt(self, number: int = 1) -> Any:
        self.rollouts.learner = self.learner
        (self.run_dir / "attempt").write_text(str(number))
        journal = Journal(self.run_dir / "journal.jsonl", number)
        checkpoints = Checkpoints(self.run_dir / "checkpoints", keep=2, min_free_gb=0)
        hold = DiskHold(self.run_dir, journal, self.orders)
        driver = Driver(
            Attempt(
                spec=self.spec,
                number=number,
                run_dir=self.run_dir,
                journal=journal,
                orders=self.orders,
                hold=hold,
                pulse=Pulse(),
            ),
            Material(
                prompts=self.prompts,  # type: ignore[arg-type]
                evaluation=self.evaluation,
                objective=resolve_objective(self.spec.algorithm, 16, 1.0),
            ),
            Parts(
                rollouts=self.rollouts,
                verifiers=self.verifiers,
                learner=self.learner,
                payloads=self.payloads,
            ),
            checkpoints,
            [*self.trackers, self.rows],
        )
        try:
            with hold.ready():
                return await driver.run(checkpoints.newest())
        finally:
            journal.close()
            found = audit(self.run_dir).findings  # whatever a test is about, nothing is lost or doubled on the way
            assert found == [], found

    def next_life(self, **changes: Any) -> Bench:
        """The same run after everything but its files is gone."""
        return replace(
            self,
            rollouts=FakeRollouts(jitter=random.Random(99)),
            verifiers=FakeVerifiers(errors=self.verifiers.errors),
            learner=FakeLearner(),
            payloads=FakePayloads(),
            prompts=FakePrompts(self.prompts.fingerprint),
            rows=RowKeeper(),
            orders=StandingOrders(),
            **changes,
        )

    def journal(self, *kinds: str) -> list[dict[str, Any]]:
        return [record for record in read_journal(self.run_dir / "journal.jsonl") if record["kind"] in kinds]
