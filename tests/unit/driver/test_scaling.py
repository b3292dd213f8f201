"""Rollout workers come and go beside the loop: what is asked of the pool, and what is said about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fake_control import orders
from fakes import Bench, FakeRollouts, FakeVerifiers, job
from test_collector import collect, taken

from sapo_ray.api.link import Orders
from sapo_ray.driver import scaling
from sapo_ray.driver.autoscale import StepLoad
from sapo_ray.driver.collector import Collector
from sapo_ray.driver.journal import Journal, read_journal
from sapo_ray.driver.orders import StandingOrders
from sapo_ray.driver.scaling import Scaling
from sapo_ray.driver.waits import beside
from sapo_ray.errors import TrainingFailed, WorkerDrained
from sapo_ray.types import CompletionMeta, PolicyVersion, WorkerCount


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "LOOK_S", 0.001)


def order(**changes: Any) -> Orders:
    return Orders(**orders(**changes))


@dataclass
class Counted(FakeRollouts):
    """Says of its workers what a test says."""

    said: WorkerCount | None = None

    def count(self) -> WorkerCount:
        return self.said or super().count()


@dataclass
class Watched:
    """A Scaling at work, with a journal and nothing else."""

    path: Path
    rollouts: Counted = field(default_factory=Counted)
    desk: StandingOrders = field(default_factory=lambda: StandingOrders(order()))
    changes: int = 0

    async def until(self, *events: tuple[str, Any]) -> list[dict[str, Any]]:
        """Run until the journal holds an event with these fields; returns all of them."""
        journal = Journal(self.path / "journal.jsonl", 1)

        def changed() -> None:
            self.changes += 1

        keeper = Scaling(spec=job(), orders=self.desk, rollouts=self.rollouts, journal=journal, changed=changed)
        try:
            async with asyncio.timeout(5), beside(keeper.run(), "scaling"):
                while not any(all(one.get(k) == v for k, v in events) for one in self.records(journal)):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
        finally:
            journal.close()
        return list(read_journal(journal.path))

    @staticmethod
    def records(journal: Journal) -> list[dict[str, Any]]:
        journal.sync_now()
        return list(read_journal(journal.path))


async def test_a_new_order_is_followed_in_mid_run_whatever_the_loop_is_at(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job(steps=4), orders=StandingOrders(order()))
    bench.learner.seconds = 0.05
    running = asyncio.create_task(bench.attempt())
    for number in (3, 1, 2):
        await asyncio.sleep(0.03)
        bench.orders.receive(order(rollout_workers=number, rollout_min=1, rollout_max=4))
    await running
    assert [workers for workers, _ in bench.rollouts.scaled] == [3, 1, 2]
    said = [(one["from"], one["to"], one["why"]) for one in bench.journal("scaling")]
    assert said == [(1, 3, "order"), (3, 1, "order"), (1, 2, "order")]
    assert {row["rollout/workers_wanted"] for row in bench.rows.rows.values()} <= {1.0, 2.0, 3.0}
    consumed = [group for record in bench.journal("consumed") for group in record["groups"]]
    assert len(consumed) == len(set(consumed)) == 16


async def test_an_order_with_the_same_target_and_another_minimum_reaches_the_pool_and_scales_nothing(
    tmp_path: Path,
) -> None:
    watched = Watched(tmp_path, desk=StandingOrders(order(rollout_workers=1, rollout_min=1, rollout_max=4)))
    watched.desk.receive(order(rollout_workers=1, rollout_min=1, rollout_max=8))
    records = await watched.until(("kind", "workers"))
    assert watched.rollouts.scaled == [(1, 1)]
    assert [one for one in records if one["kind"] == "scaling"] == []


async def test_the_hosts_of_workers_are_told_so_that_no_other_node_is_kept(tmp_path: Path) -> None:
    watched = Watched(tmp_path, rollouts=Counted(said=counted(ready=3, nodes=("node-a", "node-b"))))
    (said,) = [one for one in await watched.until(("kind", "workers")) if one["kind"] == "workers"]
    assert (said["ready"], said["draining"], said["nodes"]) == (3, 0, ["node-a", "node-b"])


def counted(**numbers: Any) -> WorkerCount:
    nothing = dict.fromkeys(("ready", "starting", "pending", "draining", "given_up"), 0)
    return WorkerCount(**{"wanted": 3, "asked": "", "last_loss": "", **nothing, **numbers})


CASES = [
    ("NoCapacity", "no room for 2 of 3", counted(ready=1, pending=2, asked="each asks for 1 CPU")),
    ("BelowTarget", "1 of 3 rollout workers were lost too often", counted(ready=2, given_up=1)),
    ("BelowMinimum", "0 rollout workers are ready, at least 1 are to be", counted(starting=3)),
]


@pytest.mark.parametrize(("condition", "words", "said"), CASES)
async def test_what_is_wrong_with_the_workers_is_a_condition_and_is_taken_back_when_it_is_over(
    tmp_path: Path, condition: str, words: str, said: WorkerCount
) -> None:
    watched = Watched(tmp_path, rollouts=Counted(said=counted(ready=3)))
    running = asyncio.create_task(watched.until(("condition", condition), ("cleared", True)))
    for now in (said, counted(ready=3)):
        await asyncio.sleep(0.05)
        watched.rollouts.said = now
    told = [one for one in await running if one.get("condition") == condition]
    assert [one.get("cleared", False) for one in told] == [False, True]
    assert words in told[0]["reason"]
    assert watched.changes == 3, "whoever waits for room was told"


async def test_scaling_is_in_progress_until_the_number_is_reached_and_nothing_drains(tmp_path: Path) -> None:
    watched = Watched(tmp_path, rollouts=Counted(said=counted(wanted=1, ready=1)))
    running = asyncio.create_task(watched.until(("condition", "ScaleInProgress"), ("cleared", True)))
    await asyncio.sleep(0.02)
    watched.rollouts.said = counted(ready=1, starting=2)
    watched.desk.receive(order(rollout_workers=3, rollout_max=4))
    for said in (counted(ready=2, starting=1), counted(ready=3, draining=1), counted(ready=3)):
        await asyncio.sleep(0.02)
        watched.rollouts.said = said
    told = [one for one in await running if one.get("condition") == "ScaleInProgress"]
    assert [one["reason"] for one in told] == [
        "3 wanted, 1 ready, 2 starting",
        "3 wanted, 2 ready, 1 starting",
        "3 wanted, 3 ready, 1 draining",
        "3 wanted, 3 ready, 1 draining",
    ]
    assert told[-1]["cleared"]


async def test_a_run_that_waits_for_its_workers_takes_more_of_them_and_says_why(tmp_path: Path) -> None:
    spec = job(steps=3, rollout__autoscale=True, rollout__max_workers=4, rollout__autoscale_steps=2)
    bench = Bench(tmp_path, spec)
    bench.rollouts.slowness = 0.2
    await bench.attempt()
    (decision,) = bench.journal("scaling")
    assert (decision["from"], decision["to"], decision["why"]) == (1, 2, "autoscale")
    assert "the learner waited for completions for" in decision["reason"]
    assert bench.rollouts.scaled == [(2, 1)]
    assert [bench.rows.rows[step]["rollout/workers_wanted"] for step in (1, 2, 3)] == [1.0, 2.0, 2.0]


async def test_a_run_that_asked_for_more_than_the_cluster_has_goes_back_to_what_it_got_once_no_node_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(scaling, "monotonic", lambda: now[0])
    journal = Journal(tmp_path / "journal.jsonl", 1)
    rollouts = Counted(said=counted(wanted=1, ready=1))
    spec = job(rollout__autoscale=True, rollout__max_workers=8, rollout__autoscale_steps=2)
    keeper = Scaling(spec=spec, orders=StandingOrders(), rollouts=rollouts, journal=journal, changed=lambda: None)
    waiting = StepLoad(seconds=100.0, waited=90.0, busy=90.0, ready_batches=0.0)
    scaled = []
    for ready, pending in ((1, 0), (1, 0), (2, 0), (2, 0), *[(3, 1)] * 8):
        now[0] += 100.0
        rollouts.said = counted(wanted=ready + pending, ready=ready, pending=pending, asked="each asks for 1 CPU")
        keeper.step(waiting if ready < 2 else replace(waiting, waited=80.0))
        scaled.append(len(rollouts.scaled))
    journal.close()
    said = [(one["from"], one["to"], one["why"]) for one in read_journal(journal.path)]
    assert said == [(1, 2, "autoscale"), (2, 4, "autoscale"), (4, 3, "capacity")]
    assert rollouts.scaled == [(2, 1), (4, 1), (3, 1)]
    assert scaled.index(3) - scaled.index(2) == 7, "short for 600 s, and not only for the steps of a decision"


async def test_an_error_of_the_scaling_task_ends_the_run_and_is_not_swallowed(tmp_path: Path) -> None:
    class Broken(FakeRollouts):
        def count(self) -> WorkerCount:
            raise RuntimeError("of the pool's own")

    bench = Bench(tmp_path, job(), rollouts=Broken())
    with pytest.raises(RuntimeError, match="of the pool's own"):
        await bench.attempt()


async def test_a_body_that_fails_ends_what_runs_beside_it() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    async def fails() -> None:
        async with beside(work(), "work"):
            await asyncio.sleep(0)
            raise TrainingFailed("the body")

    with pytest.raises(TrainingFailed, match="the body"):
        await fails()
    assert ended.is_set()
    with pytest.raises(TimeoutError):
        async with beside(work(), "work"), asyncio.timeout(0.01):
            await asyncio.sleep(3600)


# --- what was under way on a worker that is taken away ----------------------------------------------------------------


@dataclass
class Draining(FakeRollouts):
    """Delivers `before` completions of each of the first `drains` calls of a group, and gives the rest back."""

    version: PolicyVersion | None = field(default_factory=lambda: PolicyVersion(1, 0))
    before: int = 1
    drains: int = 1
    calls: dict[str, int] = field(default_factory=dict)

    async def generate(self, request: Any) -> AsyncIterator[tuple[CompletionMeta, Any]]:
        call = self.calls[request.group_id] = self.calls.get(request.group_id, 0) + 1
        delivered = 0
        async for completion in super().generate(request):
            if call <= self.drains and delivered == self.before:
                raise WorkerDrained("rollout-1 was scaled away")
            delivered += 1
            yield completion


async def test_only_what_a_drained_worker_had_not_finished_is_asked_for_again_under_the_same_seeds(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path / "journal.jsonl", 1)
    plain = FakeRollouts(version=PolicyVersion(1, 0))
    (undisturbed,) = await collect(Collector(job(), plain, FakeVerifiers(), journal), taken(1))
    rollouts = Draining()
    (group,) = await collect(Collector(job(), rollouts, FakeVerifiers(), journal), taken(1))
    journal.close()
    assert [[sample.index for sample in request.samples] for request in rollouts.requests] == [[0, 1, 2, 3], [1, 2, 3]]
    texts = [completion.payload.text for completion in group.completions]
    assert texts == [completion.payload.text for completion in undisturbed.completions]
    assert group.reissues == 1
    (record,) = [one for one in read_journal(journal.path) if one["kind"] == "reissued"]
    assert (record["missing"], record["reason"]) == ([1, 2, 3], "rollout-1 was scaled away")


async def test_no_prompt_is_blamed_however_often_its_worker_is_scaled_away(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", 1)
    rollouts = Draining(before=0, drains=20)
    groups = await collect(Collector(job(), rollouts, FakeVerifiers(), journal), taken(6))
    journal.close()
    assert [(len(group.completions), group.failed) for group in groups] == [(4, None)] * 6
    assert [one for one in read_journal(journal.path) if one["kind"] == "condition"] == []


async def test_groups_that_wait_for_room_have_it_as_soon_as_a_worker_joins(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", 1)
    rollouts = FakeRollouts(version=PolicyVersion(1, 0), hang={"t:0:0"})
    spec = job(rollout__max_num_seqs=2, rollout__group_deadline_s=60.0)
    collector = Collector(spec, rollouts, FakeVerifiers(), journal)
    first, second = [asyncio.create_task(collect(collector, [prompt])) for prompt in taken(2)]
    await asyncio.sleep(0.05)
    assert not second.done(), "room for four completions, and four hang"
    rollouts.workers = 2
    collector.room_changed()
    (group,) = await asyncio.wait_for(second, 5)
    assert len(group.completions) == 4
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    journal.close()
