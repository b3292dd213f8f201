"""`sapo-ray ...` with faults that only its inside can make, as the environment asks for them.

CHAOS_DAMAGE=rollout-1@3     one bit of the weights of version 3 is wrong on their way to that worker, once
CHAOS_POISON=addition:5:0    whatever samples this prompt is killed
CHAOS_REPLACEMENTS=1000      of each rollout worker within an hour, in place of 3: a soak kills more than a job may lose
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import ray

from sapo_ray.cli import main
from sapo_ray.rollout import replacements
from sapo_ray.rollout.remote import RemoteWorker
from sapo_ray.types import Published, Takeover

take_over, generate = RemoteWorker.take_over, RemoteWorker.generate
damaged: list[str] = []


async def take_over_damaged(self: RemoteWorker, published: Published, deadline_s: float) -> Takeover:
    worker, _, number = os.environ["CHAOS_DAMAGE"].partition("@")
    if self.id == worker and published.manifest.version.number >= int(number) and not damaged and published.buckets:
        damaged.append(self.id)
        first, *rest = published.buckets
        bucket = (await first).copy()
        bucket[17] ^= 4
        published = replace(published, buckets=(ray.put(bucket), *rest))
    return await take_over(self, published, deadline_s)


async def generate_poisoned(self: RemoteWorker, request: Any, deadline: float) -> AsyncGenerator[Any, None]:
    if request.group_id == os.environ["CHAOS_POISON"]:
        os.kill(self._info["pid"], signal.SIGKILL)
    async for one in generate(self, request, deadline):
        yield one


if __name__ == "__main__":
    if "CHAOS_DAMAGE" in os.environ:
        RemoteWorker.take_over = take_over_damaged  # type: ignore[method-assign]
    if "CHAOS_POISON" in os.environ:
        RemoteWorker.generate = generate_poisoned  # type: ignore[method-assign]
    if "CHAOS_REPLACEMENTS" in os.environ:
        replacements.REPLACEMENTS = int(os.environ["CHAOS_REPLACEMENTS"])
    main()
