"""Who is blamed when a group is not delivered, and what waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakePrompts, FakeRollouts, FakeVerifiers, job

from sapo_ray.driver.admission import Admission
from sapo_ray.driver.collector import Collector, GradedGroup
from sapo_ray.driver.evaluation import evaluate
from sapo_ray.driver.journal import Journal, read_journal
from sapo_ray.errors import NoWorker, WorkerLost
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


class OneDeath(FakeRollouts):
    """The first call of each group loses its worker; then `again` calls more lose theirs. Counts repeats at once."""

    def __init__(self, again: int = 0) -> None:
        super().__init__(version=PolicyVersion(1, 0))
        self.again = again
        self.calls: dict[str, int] = {}
        self.now: dict[int, int] = {}
        self.most: dict[int, int] = {}

    async def generate(self, request: Any) -> AsyncIterator[tuple[CompletionMeta, Any]]:
        call = self.calls[request.group_id] = self.calls.get(request.group_id, -1) + 1
        self.now[call] = self.now.get(call, 0) + 1
        self.most[call] = max(self.most.get(call, 0), self.now[call])
        try:
            await asyncio.sleep(0.02)
            if call <= self.again:
                raise WorkerLost("w0 died")
            async for completion in super().generate(request):
                yield completion
        finally:
            self.now[call] -= 1


async def test_64_groups_of_one_dead_worker_are_repeated_side_by_side(journal: Journal) -> None:
    rollouts = OneDeath()
    spec = job(rollout__group_deadline_s=60.0, rollout__max_num_seqs=256)
    groups = await collect(Collector(spec, rollouts, FakeVerifiers(), journal), taken(64))
    assert [group.reissues for group in groups] == [1] * 64
    assert all(len(group.completions) == 4 for group in groups)
    assert rollouts.most == {0: 64, 1: 64}


async def test_groups_that_lost_two_workers_are_repeated_one_at_a_time_and_none_is_blamed(journal: Journal) -> None:
    rollouts = OneDeath(again=1)
    groups = await collect(Collector(job(), rollouts, FakeVerifiers(), journal), taken(6))
    assert [(group.reissues, group.failed) for group in groups] == [(2, None)] * 6
    assert rollouts.most == {0: 6, 1: 6, 2: 1}


async def test_suspects_that_wait_for_their_turn_take_no_room_from_others(journal: Journal) -> None:
    """Room for one group of four: were the waiting suspects to hold it, nothing would ever be sampled."""
    rollouts = OneDeath(again=1)
    spec = job(rollout__max_num_seqs=2, rollout__group_deadline_s=60.0)
    async with asyncio.timeout(30):
        groups = await collect(Collector(spec, rollouts, FakeVerifiers(), journal), taken(6))
    assert [group.failed for group in groups] == [None] * 6


async def test_training_and_evaluation_share_the_room_of_the_workers_that_live(journal: Journal) -> None:
    """Two configured workers of which one lives, with room for 2 x 8 completions, asked for 24 and for 12 of one."""
    rollouts = FakeRollouts(version=PolicyVersion(1, 0), workers=1, slowness=0.02)
    spec = job(rollout__workers=2, rollout__max_num_seqs=8)
    collector = Collector(spec, rollouts, FakeVerifiers(), journal)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, rollouts.completions_under_way)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    await asyncio.gather(
        collect(collector, taken(6)),
        *(collector.collect(p, samples=1, temperature=0.0, max_new_tokens=8, stream="e/") for p in taken(12)),
    )
    watching.cancel()
    assert most == 16


async def test_a_group_larger_than_all_room_has_its_turn_and_a_cancelled_one_gives_its_place_back() -> None:
    admission = Admission(lambda: 4)
    order: list[str] = []

    async def run(name: str, size: int, seconds: float) -> None:
        async with admission.admitted(size):
            order.append(name)
            await asyncio.sleep(seconds)

    first = asyncio.create_task(run("first", 4, 60))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(run("given up", 1, 0))
    large = asyncio.create_task(run("large", 9, 0.01))
    small = asyncio.create_task(run("small", 1, 0))
    await asyncio.sleep(0)
    waiting.cancel()
    first.cancel()
    async with asyncio.timeout(30):
        await asyncio.gather(large, small)
    assert order == ["first", "large", "small"]
