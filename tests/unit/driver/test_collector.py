"""Who is blamed when a group is not delivered, and what waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakePrompts, FakeRollouts, FakeVerifiers, job

from sapo_ray.driver.collector import Collector, GradedGroup
from sapo_ray.driver.evaluation import evaluate
from sapo_ray.driver.journal import Journal, read_journal
from sapo_ray.errors import NoWorker
from sapo_ray.types import CompletionMeta, PolicyVersion, Prompt


class Replacing(FakeRollouts):
    """Its only worker is being replaced; until `back` is set every wait for one runs out."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(version=PolicyVersion(1, 0))
        self.deadline_s = deadline_s
        self.back = asyncio.Event()

    async def generate(self, request: Any) -> AsyncIterator[tuple[CompletionMeta, Any]]:
        try:
            await asyncio.wait_for(self.back.wait(), self.deadline_s)
        except TimeoutError:
            raise NoWorker(f"no attested rollout worker for group {request.group_id}") from None
        async for completion in super().generate(request):
            yield completion


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl", 1)


async def collect(collector: Collector, prompts: list[Prompt]) -> list[GradedGroup]:
    groups = [collector.collect(p, samples=4, temperature=1.0, max_new_tokens=8) for p in prompts]
    return list(await asyncio.gather(*groups))


def taken(number: int) -> list[Prompt]:
    source = FakePrompts()
    return [source.take() for _ in range(number)]


async def test_a_replacement_that_takes_longer_than_two_group_deadlines_is_no_strike_against_any_prompt(
    journal: Journal,
) -> None:
    rollouts = Replacing(deadline_s=0.1)
    collector = Collector(job(rollout__group_deadline_s=0.1), rollouts, FakeVerifiers(), journal)
    asyncio.get_running_loop().call_later(0.45, rollouts.back.set)
    groups = await collect(collector, taken(4))
    journal.close()
    assert [(len(group.completions), group.reissues, group.failed) for group in groups] == [(4, 0, None)] * 4
    records = list(read_journal(journal.path))
    assert {record["kind"] for record in records} == {"waited"}
    assert {record["group"] for record in records} == {"t:0:0", "t:1:0", "t:2:0", "t:3:0"}


async def test_an_evaluation_outlives_a_replacement_without_an_error(journal: Journal) -> None:
    rollouts = Replacing(deadline_s=0.05)
    spec = job(rollout__group_deadline_s=0.05)
    collector = Collector(spec, rollouts, FakeVerifiers(), journal)
    asyncio.get_running_loop().call_later(0.25, rollouts.back.set)
    found = await evaluate(collector, taken(3), spec, step=0, version="1.0", sampled=False)
    journal.close()
    assert (found.greedy.completions, found.greedy.errors) == (3, 0)
