"""What does a group cost the driver, with 10, 100 and 1,000 rollout workers?

The real driver loop, collector, admission, journal, pulse, and rollout pool; simulated are what lies behind the pools:
a worker answers after a while and delivers its completions together, gradings and training take no time. Four groups
of eight completions a worker and step, so the number of groups grows with the workers; the claim is that the driver's
time grows no faster. Each size runs in a process of its own. Processor time is that of the whole process: the
simulation's own part, which is small, included. Memory is the most that the process held beyond what it held before.

    python benchmarks/scale.py [--workers 10 100 1000] [--steps 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import resource
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from report import report

from sapo_ray.algorithms.settings import resolve as resolve_objective
from sapo_ray.config.load import resolve
from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.checkpoint import Checkpoints
from sapo_ray.driver.driver import Driver
from sapo_ray.driver.hold import DiskHold
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.orders import StandingOrders
from sapo_ray.driver.parts import Material, Parts
from sapo_ray.driver.pulse import pulse_of
from sapo_ray.rollout import membership
from sapo_ray.rollout.pool import RolloutPool
from sapo_ray.rollout.remote import RemoteWorker
from sapo_ray.temporary import temporary_folder
from sapo_ray.types import (
    Canary,
    CompletionMeta,
    Grading,
    GroupRequest,
    PolicyVersion,
    Prompt,
    Published,
    Takeover,
    Verdict,
    VersionSpan,
    WeightsManifest,
)

GROUPS, SIZE = 4, 8
"""Groups of a worker in a step; completions of a group."""
WORKERS, STEPS = [10, 100, 1000], 5
"""Of the whole benchmark."""
ANSWER_S = (0.05, 0.25)


class SimulatedWorker(RemoteWorker):
    """The pool's handle of a worker; nothing is behind it."""

    async def placed(self, wait_s: float) -> bool:
        return True

    async def start(self, noise: Takeover | None, deadline_s: float) -> None: ...

    async def heartbeat(self, deadline_s: float) -> None: ...

    async def until_broken(self) -> Any:
        await asyncio.Event().wait()

    async def take_over(self, published: Published, deadline_s: float) -> Takeover:
        await asyncio.sleep(0.01)
        version = published.manifest.version
        return Takeover(worker=self.id, version=version, seconds=0.01, canary_max=0.0, canary_mean=0.0)

    async def generate(  # type: ignore[override]
        self, request: GroupRequest, deadline: float
    ) -> AsyncGenerator[tuple[CompletionMeta, Any], None]:
        assert self.takeover is not None
        version = self.takeover.version
        await asyncio.sleep(random.uniform(*ANSWER_S))
        self.last_progress = asyncio.get_running_loop().time()
        for sample in request.samples:
            tokens = 20 + sample.seed % 100
            meta = CompletionMeta(
                group_id=request.group_id,
                sample_index=sample.index,
                prompt_tokens=8,
                tokens=tokens,
                finish_reason="stop",
                spans=(VersionSpan(version=version, start=0, end=tokens),),
                worker=self.id,
                seconds=0.1,
            )
            yield meta, sample.seed

    async def stop(self) -> None: ...

    async def kill(self) -> None: ...


class Prompts:
    fingerprint = "simulation"

    def __init__(self) -> None:
        self._taken = 0

    def take(self) -> Prompt:
        i, self._taken = self._taken, self._taken + 1
        return Prompt(id=f"s:{i}:0", index=i, source="s", text=f"{i}=", token_ids=(1, 2, 3), gold=str(i))

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        self._taken = state["taken"]


class Verifiers:
    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def grade(self, prompt: str, gold: str, payloads: list[int]) -> list[Grading]:
        await asyncio.sleep(0)
        verdicts = [Verdict.CORRECT if seed % 2 else Verdict.WRONG for seed in payloads]
        return [Grading(verdict=one, reward=float(one is Verdict.CORRECT), reason="match") for one in verdicts]


class Learner:
    lost = False

    async def restart(self) -> None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def set_canary(self, sequences: Any) -> None: ...

    async def train(self, step: int, samples: list[Any]) -> Any:
        await asyncio.sleep(0.05)
        return SimpleNamespace(metrics={"learner/loss": 0.0}, updates=1, dropped=())

    async def publish(self, version: PolicyVersion, receivers: list[Any]) -> Published:
        canary = Canary(sequences=(), logprobs=())
        manifest = WeightsManifest(
            version=version,
            fingerprint="0" * 16,
            tensors=(),
            bucket_nbytes=(),
            canary=canary,
            transport="shared_memory",
        )
        return Published(manifest=manifest, buckets=(object(),))

    async def save(self, folder: Path) -> None:
        folder.mkdir()

    async def load(self, folder: Path) -> None: ...


class Payloads:
    async def save(self, path: Path, refs: list[Any]) -> None: ...

    async def load(self, path: Path, count: int) -> list[Any]:
        return [0] * count

    async def log_texts(self, path: Path, rows: list[dict[str, Any]], refs: list[Any]) -> None: ...


class NoTracker:
    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


def no_ray() -> None:
    """What the pool asks of Ray, without Ray."""
    membership.ray = SimpleNamespace(cluster_resources=dict)  # type: ignore[assignment]
    membership.RemoteWorker = SimulatedWorker  # type: ignore[misc]


async def measure(workers: int, steps: int, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    spec = resolve(
        {
            "steps": steps,
            "model": {"path": "builtin:addition"},
            "data": {"train": [{"path": "builtin:addition"}], "template": "plain", "max_prompt_tokens": 16},
            "rollout": {
                "workers": workers,
                "prompts_per_step": GROUPS * workers,
                "group_size": SIZE,
                "max_new_tokens": 128,
                "max_num_seqs": GROUPS * SIZE,
                "max_staleness": 1,
            },
            "checkpoint": {"every": 0, "min_free_gb": 0},
            "logging": {"sample_groups": 0},
        }
    )
    (folder / "attempt").write_text("1")
    journal = Journal(folder / "journal.jsonl", 1)
    pool, orders = RolloutPool(spec, "m"), StandingOrders()
    await pool.start()
    with pulse_of(spec, journal, None) as pulse:
        beats = asyncio.create_task(pulse.beat(pool.activity))
        hold = DiskHold(folder, journal, orders)
        driver = Driver(
            Attempt(spec=spec, number=1, run_dir=folder, journal=journal, orders=orders, hold=hold, pulse=pulse),
            Material(prompts=Prompts(), evaluation=[], objective=resolve_objective(spec.algorithm, 128, 1.0)),
            Parts(rollouts=pool, verifiers=Verifiers(), learner=Learner(), payloads=Payloads()),
            Checkpoints(folder / "checkpoints", keep=2, min_free_gb=0),
            [NoTracker()],
        )
        before, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        await driver.run(None)
        seconds, wall = time.process_time() - before, time.monotonic() - began
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        beats.cancel()
    await pool.close()
    journal.close()
    groups = steps * GROUPS * workers
    return {
        "workers": workers,
        "groups": groups,
        "processor seconds": seconds,
        "ms a group": 1000 * seconds / groups,
        "groups a second": groups / wall,
        "MB more": (most - held) / 1024,
        "kB more a group outstanding": (most - held) / (2 * GROUPS * workers),
        "journal bytes a group": (folder / "journal.jsonl").stat().st_size / groups,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        logging.disable(logging.WARNING)
        no_ray()
        with temporary_folder() as folder:
            print(json.dumps(asyncio.run(measure(arguments.workers[0], arguments.steps, folder))))
        return
    rows = []
    for workers in arguments.workers:
        command = [sys.executable, __file__, "--one", "--workers", str(workers), "--steps", str(arguments.steps)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    cost = [row["ms a group"] for row in rows]
    whole = (arguments.workers, arguments.steps) == (WORKERS, STEPS)
    report("scale", rows, {"ms a group, most workers / fewest": cost[-1] / cost[0]}, whole=whole)


if __name__ == "__main__":
    main()
