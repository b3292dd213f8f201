"""`sapo-ray ...` with faults that only its inside can make, as the environment asks for them.

CHAOS_DAMAGE=rollout-1@3     one bit of the weights of version 3 is wrong on their way to that worker, once
CHAOS_HANG=rollout-0@3       that worker is stopped (SIGSTOP) when it is about to take version 3 over, once
CHAOS_POISON=addition:5:0    whatever samples this prompt is killed
CHAOS_REPLACEMENTS=1000      of each rollout worker within an hour, in place of 3: a soak kills more than a job may lose
CHAOS_RESTARTS=1000          of the learner, in place of 3
CHAOS_DISK_CHECK_S=1         between two looks at a full disk, in place of 30
CHAOS_WORKERS=FILE           "least most target", rollout workers, as a control plane orders them; read again and again
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from sapo_ray.cli import main
from sapo_ray.driver import hold, recovery
from sapo_ray.driver.orders import StandingOrders, Wanted
from sapo_ray.rollout import replacements
from sapo_ray.rollout.remote import RemoteWorker
from sapo_ray.types import Published, Takeover

take_over, generate = RemoteWorker.take_over, RemoteWorker.generate
done: set[str] = set()


def due(fault: str, worker: RemoteWorker, published: Published) -> bool:
    """Whether this takeover is the one that a fault is meant for, or the first after it."""
    victim, _, number = os.environ.get(fault, "").partition("@")
    if worker.id != victim or published.manifest.version.number < int(number) or fault in done:
        return False
    done.add(fault)
    return True


async def take_over_faulty(self: RemoteWorker, published: Published, deadline_s: float) -> Takeover:
    if due("CHAOS_DAMAGE", self, published):
        first, *rest = published.buckets
        bucket = (await first).copy()
        bucket[17] ^= 4
        published = replace(published, buckets=(ray.put(bucket), *rest))
    if due("CHAOS_HANG", self, published):
        os.kill(self._info["pid"], signal.SIGSTOP)
    return await take_over(self, published, deadline_s)


async def generate_poisoned(self: RemoteWorker, request: Any, deadline: float) -> AsyncGenerator[Any, None]:
    if request.group_id == os.environ["CHAOS_POISON"]:
        os.kill(self._info["pid"], signal.SIGKILL)
    async for one in generate(self, request, deadline):
        yield one


def workers_of_a_file(_: StandingOrders) -> Wanted | None:
    file = Path(os.environ["CHAOS_WORKERS"])
    if not file.exists():
        return None
    least, most, target = map(int, file.read_text().split())
    return Wanted(least=least, most=most, target=target)


if __name__ == "__main__":
    RemoteWorker.take_over = take_over_faulty  # type: ignore[method-assign]
    if "CHAOS_POISON" in os.environ:
        RemoteWorker.generate = generate_poisoned  # type: ignore[method-assign]
    if "CHAOS_WORKERS" in os.environ:
        StandingOrders.workers = workers_of_a_file  # type: ignore[method-assign]
    if "CHAOS_REPLACEMENTS" in os.environ:
        replacements.REPLACEMENTS = int(os.environ["CHAOS_REPLACEMENTS"])
    if "CHAOS_RESTARTS" in os.environ:
        recovery.RESTARTS = int(os.environ["CHAOS_RESTARTS"])
    if "CHAOS_DISK_CHECK_S" in os.environ:
        hold.CHECK_S = float(os.environ["CHAOS_DISK_CHECK_S"])
    main()
