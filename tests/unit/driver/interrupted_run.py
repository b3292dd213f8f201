"""A whole run with parts that are no engines, told to end several times: `interrupted_run.py RUN_DIR SIGNAL HOW`.

HOW is `orderly`, or `stuck`: one part cannot be closed. Prints what the parts do; the rest is the real thing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer
from fakes import job

from sapo_ray.driver import run, stages
from sapo_ray.ending import user_errors

starting, closing = threading.Event(), threading.Event()
stuck = sys.argv[3] == "stuck"


class Part:
    def __init__(self, *_: Any) -> None:
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.name = type(self).__name__.lower()

    def activity(self) -> list[Any]:
        return []

    async def start(self) -> None:
        try:
            starting.set()
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.1)
            print(f"{self.name} start ended", flush=True)

    async def close(self) -> None:
        closing.set()
        await asyncio.sleep(1)
        if stuck and self.name == "learner":
            raise RuntimeError("rank 0 does not end")
        print(f"{self.name} closed", flush=True)


class Rollouts(Part): ...


class Verifiers(Part): ...


class Learner(Part): ...


@contextmanager
def no_ray(*_: Any) -> Iterator[None]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray does
    try:
        yield
    finally:
        print("ray ended", flush=True)


def insist() -> None:
    """Once while the parts start, twice while they are closed."""
    for moment in (starting, closing, closing):
        assert moment.wait(60)
        os.kill(os.getpid(), signal.Signals[sys.argv[2]])
        threading.Event().wait(0.2)


stages.RolloutPool, stages.VerifierPool, stages.LearnerGroup = Rollouts, Verifiers, Learner  # type: ignore[misc, assignment]
stages.ray_for, stages.published_bytes = no_ray, lambda *_: 0  # type: ignore[assignment]
stages.prepare_inputs = lambda *_: SimpleNamespace(model_path=Path("m"), canary=())  # type: ignore[assignment, return-value]
threading.Thread(target=insist, daemon=True).start()
try:
    with user_errors() as heard:
        run.train(job(run_dir=sys.argv[1]), heard.listener(None))
except typer.Exit as ended:
    sys.exit(ended.exit_code)
