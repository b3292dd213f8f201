"""The pool's decisions, with workers that fail on command instead of engines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import (
    DeadlineExceeded,
    NoWorker,
    ResourceError,
    TrainingFailed,
    WeightsRefused,
    WorkerDrained,
    WorkerLost,
)
from sapo_ray.rollout import membership, remote, replacements
from sapo_ray.rollout import pool as pools
from sapo_ray.rollout.pool import RolloutPool
from sapo_ray.rollout.remote import RemoteWorker, WorkerState
from sapo_ray.types import (
    Canary,
    CompletionMeta,
    GroupRequest,
    PolicyVersion,
    Published,
    SampleRequest,
    Takeover,
    VersionSpan,
    WeightsManifest,
)


class FakeWorker(RemoteWorker):
    """Keeps RemoteWorker's bookkeeping; everything that would reach an actor is decided by the test."""

    made: list[FakeWorker]
    cannot_start: set[str]
    refuses: dict[str, int]
    room: int
    """Slots that the cluster has room for."""

    def __init__(self, spec: JobSpec, model_path: str, worker_id: str, slot: int, gpus: bool) -> None:
        self.id, self.slot, self.state = worker_id, slot, WorkerState.STARTING
        self.takeover: Takeover | None = None
        self.in_flight, self.recalled, self.bringing = 0, "", asyncio.Lock()
        self.last_progress = asyncio.get_running_loop().time()
        self.actor, self._info, self._waits, self._room = worker_id, {}, set(), None
        self.broken: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.go = asyncio.Event()
        self.go.set()
        self.ended = ""
        self.noise: Takeover | None = None
        self.sampled: list[str] = []
        self.took: list[int] = []
        self.made.append(self)

    async def placed(self, wait_s: float) -> bool:
        await asyncio.sleep(0)
        return self.room > self.slot

    async def start(self, noise: Takeover | None, deadline_s: float) -> None:
        self.noise = noise
        await asyncio.sleep(0)
        if self.id in self.cannot_start:
            raise WorkerLost(f"{self.id} cannot start")

    async def heartbeat(self, deadline_s: float) -> None: ...

    async def until_broken(self) -> Any:
        return await self.broken

    async def take_over(self, published: Published, deadline_s: float) -> Takeover:
        await self.go.wait()
        self.took.append(len(published.buckets))
        if self.refuses.get(self.id, -1) == published.manifest.version.number:
            raise WeightsRefused(f"{self.id} refuses")
        return Takeover(
            worker=self.id, version=published.manifest.version, seconds=0.0, canary_max=1e-6, canary_mean=1e-7
        )

    async def generate(self, request: GroupRequest, deadline: float) -> AsyncIterator[tuple[CompletionMeta, Any]]:  # type: ignore[override]
        assert self.takeover is not None
        for sample in request.samples:
            await self.go.wait()
            if self.broken.done():
                raise WorkerLost(f"{self.id} died")
            if self.recalled:
                raise WorkerDrained(f"{self.id} {self.recalled}")
            span = VersionSpan(version=self.takeover.version, start=0, end=1)
            meta = CompletionMeta(
                group_id=request.group_id,
                sample_index=sample.index,
                prompt_tokens=1,
                tokens=1,
                finish_reason="stop",
                spans=(span,),
                worker=self.id,
                seconds=0.0,
            )
            self.sampled.append(request.group_id)
            yield meta, object()

    def recall(self, why: str) -> int:
        if self.state is WorkerState.DRAINING:
            self.go.set()
        return super().recall(why)

    async def stop(self) -> None:
        self.state, self.ended = WorkerState.STOPPED, "stopped"

    async def kill(self) -> None:
        self.ended = "killed"


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeWorker.made, FakeWorker.cannot_start, FakeWorker.refuses, FakeWorker.room = [], set(), {}, 100
    monkeypatch.setattr(membership, "RemoteWorker", FakeWorker)
    monkeypatch.setattr(membership.ray, "cluster_resources", lambda: {"CPU": 4.0})


def pool_of(workers: int, **rollout: Any) -> RolloutPool:
    spec = JobSpec.model_validate(
        {
            "steps": 1,
            "model": {"path": "m"},
            "data": {"train": [{"path": "d"}]},
            "rollout": {"workers": workers, **rollout},
            "deadlines": {"publish_s": 2.0},
        }
    )
    return RolloutPool(spec, "m")


def published(number: int, pushed: bool = False) -> Published:
    manifest = WeightsManifest(
        version=PolicyVersion(1, number),
        fingerprint="0" * 16,
        tensors=(),
        bucket_nbytes=(),
        canary=Canary(sequences=(), logprobs=()),
        transport="nccl" if pushed else "shared_memory",
    )
    return Published(manifest=manifest, buckets=() if pushed else (object(),))


def group(name: str, size: int = 2) -> GroupRequest:
    samples = tuple(SampleRequest(index=i, seed=i) for i in range(size))
    return GroupRequest(group_id=name, prompt_token_ids=(1,), samples=samples, max_new_tokens=4, temperature=1.0)


async def sampled_by(pool: RolloutPool, name: str) -> str:
    (worker,) = {meta.worker async for meta, _ in pool.generate(group(name))}
    return worker


async def until(condition: Callable[[], bool]) -> None:
    """For what takes a few turns of the event loop and no time."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came true")


async def settled(pool: RolloutPool) -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def all_events_of(pool: RolloutPool) -> list[dict[str, Any]]:
    found = []
    while not pool.events.empty():
        found.append(pool.events.get_nowait())
    return found


def events_of(pool: RolloutPool) -> list[tuple[str, str]]:
    return [(event["kind"], event["worker"]) for event in all_events_of(pool)]


async def test_groups_go_to_the_least_loaded_worker_and_stay_there() -> None:
    pool = pool_of(2)
    await pool.start()
    await pool.update(published(0))
    first, second = FakeWorker.made
    first.go.clear()
    slow = asyncio.create_task(sampled_by(pool, "slow"))
    await settled(pool)
    assert [await sampled_by(pool, name) for name in ("a", "b")] == ["rollout-1", "rollout-1"]
    first.go.set()
    assert await slow == "rollout-0"
    assert (first.sampled, second.sampled) == (["slow"] * 2, ["a", "a", "b", "b"])
    await pool.close()


async def test_no_worker_is_used_before_it_took_weights_over() -> None:
    pool = pool_of(1)
    await pool.start()
    waiting = asyncio.create_task(sampled_by(pool, "early"))
    await settled(pool)
    assert FakeWorker.made[0].sampled == []
    await pool.update(published(0))
    assert await waiting == "rollout-0"
    await pool.close()


async def test_a_worker_that_refuses_weights_is_replaced_while_the_update_goes_on_with_the_others() -> None:
    pool = pool_of(2)
    await pool.start()
    await pool.update(published(0))
    FakeWorker.refuses = {"rollout-1": 1}
    takeovers = await pool.update(published(1))
    assert [(t.worker, t.version.number) for t in takeovers] == [("rollout-0", 1)]
    await settled(pool)
    assert FakeWorker.made[1].ended == "killed"
    assert [(w.id, w.version) for w in pool.workers()] == [
        ("rollout-0", PolicyVersion(1, 1)),
        ("rollout-1.1", PolicyVersion(1, 1)),
    ]
    assert events_of(pool) == [
        ("worker_ready", "rollout-0"),
        ("worker_ready", "rollout-1"),
        ("takeover_failed", "rollout-1"),
        ("worker_lost", "rollout-1"),
        ("worker_ready", "rollout-1.1"),
    ]
    await pool.close()


async def test_a_joining_worker_takes_the_newest_weights_even_if_they_change_meanwhile() -> None:
    pool = pool_of(2)
    await pool.start()
    await pool.update(published(0))
    FakeWorker.made[0].broken.set_result(WorkerLost("gone"))
    await until(lambda: len(FakeWorker.made) == 3)
    joining = FakeWorker.made[2]
    joining.go.clear()
    await settled(pool)
    update = asyncio.create_task(pool.update(published(1)))
    await settled(pool)
    joining.go.set()
    await update
    await settled(pool)
    assert {w.id: w.version for w in pool.workers()} == {
        "rollout-1": PolicyVersion(1, 1),
        "rollout-0.1": PolicyVersion(1, 1),
    }
    assert joining.noise is not None
    await pool.close()


async def left_behind(monkeypatch: pytest.MonkeyPatch) -> tuple[RolloutPool, FakeWorker]:
    """Two workers, of which rollout-1 hangs while version 1 is published."""
    monkeypatch.setattr(pools, "BEHIND_S", 0.05)
    pool = pool_of(2)
    await pool.start()
    await pool.update(published(0))
    hanging = FakeWorker.made[1]
    hanging.go.clear()
    assert [takeover.worker for takeover in await pool.update(published(1))] == ["rollout-0"]
    return pool, hanging


async def test_a_worker_that_hangs_while_weights_are_published_is_left_behind_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, hanging = await left_behind(monkeypatch)
    assert (hanging.state, hanging.ended, pool.living()) == (WorkerState.BEHIND, "", 1)
    assert [await sampled_by(pool, name) for name in "abc"] == ["rollout-0"] * 3
    assert [takeover.worker for takeover in await pool.update(published(2))] == ["rollout-0"]
    count = pool.count()
    assert (count.wanted, count.ready, count.starting) == (2, 1, 1)
    assert events_of(pool)[2:] == [("worker_behind", "rollout-1")], "once, however many updates it misses"
    await pool.close()


async def test_a_worker_that_was_left_behind_is_used_again_once_it_has_the_newest_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, hanging = await left_behind(monkeypatch)
    await pool.update(published(2))
    FakeWorker.made[0].in_flight = 1  # so that the next group goes to rollout-1, if it may
    assert await sampled_by(pool, "a") == "rollout-0"
    hanging.go.set()
    await settled(pool)
    assert (hanging.state, hanging.version) == (WorkerState.READY, PolicyVersion(1, 2))
    assert await sampled_by(pool, "b") == "rollout-1"
    monkeypatch.setattr(pools, "BEHIND_S", 60.0)  # whatever else the machine does, nobody is late now
    assert [takeover.worker for takeover in await pool.update(published(3))] == ["rollout-0", "rollout-1"]
    assert events_of(pool)[-1] == ("worker_caught_up", "rollout-1")
    await pool.close()


async def test_what_a_worker_samples_when_it_is_left_behind_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "BEHIND_S", 0.05)
    pool = pool_of(2)
    await pool.start()
    await pool.update(published(0))
    first, hanging = FakeWorker.made
    first.in_flight = 1
    hanging.go.clear()
    running = asyncio.create_task(sampled_by(pool, "running"))
    await settled(pool)
    first.in_flight = 0
    await pool.update(published(1))
    [event] = [event for event in all_events_of(pool) if event["kind"] == "worker_behind"]
    assert (event["worker"], event["given_back"]) == ("rollout-1", 2)
    hanging.go.set()
    with pytest.raises(WorkerDrained, match="rollout-1 did not take weights over in time"):
        await running
    await pool.close()


async def test_a_worker_that_was_left_behind_and_is_lost_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, hanging = await left_behind(monkeypatch)
    hanging.broken.set_result(DeadlineExceeded("rollout-1 did not answer its heartbeat within 60 s"))
    await until(
        lambda: [w.id for w in pool.workers() if w.version == PolicyVersion(1, 1)] == ["rollout-0", "rollout-1.1"]
    )
    assert hanging.ended == "killed"
    await pool.close()


async def test_the_only_worker_is_not_left_behind_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "BEHIND_S", 0.01)
    pool = pool_of(1)
    await pool.start()
    await pool.update(published(0))
    FakeWorker.made[0].go.clear()
    update = asyncio.create_task(pool.update(published(1)))
    await asyncio.sleep(0.1)
    assert not update.done()
    FakeWorker.made[0].go.set()
    assert [takeover.worker for takeover in await update] == ["rollout-0"]
    await pool.close()


async def test_a_worker_that_is_scaled_away_while_it_was_left_behind_may_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, hanging = await left_behind(monkeypatch)
    hanging.in_flight = 1  # or it would be stopped at once
    pool.scale(1, 1)
    await settled(pool)
    assert hanging.state is WorkerState.DRAINING
    hanging.go.set()
    await settled(pool)
    pool.scale(2, 1)
    await settled(pool)
    hanging.in_flight = 0
    FakeWorker.made[0].in_flight = 1
    assert (len(FakeWorker.made), await sampled_by(pool, "a")) == (2, "rollout-1")
    await pool.close()


async def test_the_death_of_a_worker_is_told_to_its_callers_and_costs_no_other_group() -> None:
    pool = pool_of(2)
    await pool.start()
    await pool.update(published(0))
    dying = FakeWorker.made[0]
    dying.go.clear()
    caller = asyncio.create_task(sampled_by(pool, "a"))
    await settled(pool)
    dying.broken.set_result(WorkerLost("killed"))
    dying.go.set()
    with pytest.raises(WorkerLost):
        await caller
    assert await sampled_by(pool, "b") in ("rollout-1", "rollout-0.1")
    await pool.close()


async def test_a_worker_is_replaced_three_times_an_hour_and_then_the_pool_says_why_it_has_none() -> None:
    pool = pool_of(1)
    await pool.start()
    await pool.update(published(0))
    for number in range(4):
        await until(lambda: FakeWorker.made[-1].takeover is not None and FakeWorker.made[-1].ended == "")
        FakeWorker.made[number].broken.set_result(WorkerLost(f"death {number}"))
        await settled(pool)
    assert [worker.id for worker in FakeWorker.made] == ["rollout-0", "rollout-0.1", "rollout-0.2", "rollout-0.3"]
    with pytest.raises(
        TrainingFailed,
        match=r"0 of at least 1 rollout workers .* are left: slot 0 was lost 4 times .*; the last one: death 3",
    ):
        await sampled_by(pool, "a")
    with pytest.raises(TrainingFailed, match=r"rollout workers .* are left"):
        await pool.update(published(1))
    assert events_of(pool)[-2:] == [("worker_not_replaced", "rollout-0.3"), ("pool_failed", "rollout pool")]
    await pool.close()


async def test_the_budget_of_replacements_is_per_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacements, "REPLACEMENT_WINDOW_S", 0.0)
    pool = pool_of(1)
    await pool.start()
    for number in range(6):
        await until(lambda: FakeWorker.made[-1].state is WorkerState.READY)
        FakeWorker.made[number].broken.set_result(WorkerLost("again"))
        await settled(pool)
    assert [worker.id for worker in pool.workers()] == ["rollout-0.6"]
    await pool.close()


async def test_a_replacement_that_cannot_start_counts_as_a_replacement() -> None:
    pool = pool_of(1)
    await pool.start()
    FakeWorker.cannot_start = {"rollout-0.1", "rollout-0.2", "rollout-0.3"}
    FakeWorker.made[0].broken.set_result(WorkerLost("first"))
    await settled(pool)
    with pytest.raises(TrainingFailed, match=r"rollout-0\.3 cannot start"):
        await pool.update(published(0))
    await pool.close()


async def test_a_start_that_fails_ends_the_workers_that_did_start() -> None:
    FakeWorker.cannot_start = {"rollout-1"}
    pool = pool_of(2)
    with pytest.raises(WorkerLost, match="rollout-1 cannot start"):
        await pool.start()
    assert [worker.ended for worker in FakeWorker.made] == ["stopped", "stopped"]


async def test_waiting_for_an_attested_worker_is_bounded_and_named() -> None:
    pool = pool_of(1, group_deadline_s=0.05)
    await pool.start()
    with pytest.raises(NoWorker, match=r"group a within 0\.05 s \(rollout\.group_deadline_s\)"):
        await sampled_by(pool, "a")
    await pool.close()


async def test_the_time_without_a_worker_is_not_taken_from_the_group_that_waits_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[float] = []
    sample = FakeWorker.generate

    def generate(self: FakeWorker, request: GroupRequest, deadline: float) -> AsyncIterator[tuple[CompletionMeta, Any]]:
        limits.append(deadline - asyncio.get_running_loop().time())
        return sample(self, request, deadline)

    monkeypatch.setattr(FakeWorker, "generate", generate)
    pool = pool_of(1, group_deadline_s=20.0)
    await pool.start()
    waiting = asyncio.create_task(sampled_by(pool, "a"))
    await asyncio.sleep(0.3)
    await pool.update(published(0))
    assert await waiting == "rollout-0"
    assert limits == [pytest.approx(20.0, abs=0.1)]
    await pool.close()


async def test_a_worker_that_finishes_nothing_is_lost_even_if_the_caller_gave_up_first() -> None:
    pool = pool_of(1, group_deadline_s=0.05)
    await pool.start()
    await pool.update(published(0))
    FakeWorker.made[0].go.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await sampled_by(pool, "a")
    await settled(pool)
    assert FakeWorker.made[0].ended == "killed"
    await pool.close()


async def test_scaling_up_starts_workers_and_scaling_down_lets_them_finish() -> None:
    pool = pool_of(1)
    await pool.start()
    await pool.update(published(0))
    pool.scale(3, 1)
    await settled(pool)
    assert {w.id: w.version for w in pool.workers()} == dict.fromkeys(
        ("rollout-0", "rollout-1", "rollout-2"), PolicyVersion(1, 0)
    )
    first, second, draining = FakeWorker.made
    first.in_flight = second.in_flight = 1  # so that the next group goes to rollout-2
    draining.go.clear()
    last = asyncio.create_task(sampled_by(pool, "last"))
    await settled(pool)
    pool.scale(2, 1)
    await settled(pool)
    assert (draining.state, draining.ended) == (WorkerState.DRAINING, "")
    draining.go.set()
    assert await last == "rollout-2"
    await settled(pool)
    assert draining.ended == "stopped"
    assert [w.id for w in pool.workers()] == ["rollout-0", "rollout-1"]
    await pool.close()


async def drained(pool: RolloutPool) -> tuple[FakeWorker, asyncio.Task[str]]:
    """rollout-1 of two is draining, with a group under way."""
    await pool.start()
    await pool.update(published(0))
    first, second = FakeWorker.made
    first.in_flight = 1
    second.go.clear()
    running = asyncio.create_task(sampled_by(pool, "running"))
    await settled(pool)
    first.in_flight = 0
    pool.scale(1, 1)
    await settled(pool)
    assert (second.state, second.in_flight) == (WorkerState.DRAINING, 2)
    return second, running


async def test_a_worker_that_does_not_finish_in_time_gives_its_completions_back_and_is_stopped() -> None:
    pool = pool_of(2, drain_timeout_s=0.05)
    draining, running = await drained(pool)
    with pytest.raises(WorkerDrained, match="rollout-1 was scaled away"):
        await running
    await settled(pool)
    assert draining.ended == "stopped"
    assert events_of(pool)[-1] == ("worker_stopped", "rollout-1")
    assert "worker_lost" not in [kind for kind, _ in events_of(pool)]
    assert [await sampled_by(pool, name) for name in ("a", "b")] == ["rollout-0"] * 2
    await pool.close()


async def test_a_pool_that_is_closed_while_a_surplus_worker_ends_leaves_none_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = pool_of(2)
    await pool.start()
    await pool.update(published(0))
    asked, may_end = asyncio.Event(), asyncio.Event()

    async def slowly(self: FakeWorker) -> None:
        self.state = WorkerState.STOPPED
        asked.set()
        await may_end.wait()
        self.ended = "stopped"

    monkeypatch.setattr(FakeWorker, "stop", slowly)
    pool.scale(1, 1)
    await asked.wait()
    closing = asyncio.create_task(pool.close())
    await settled(pool)
    may_end.set()
    await closing
    assert [worker.ended for worker in FakeWorker.made] == ["stopped", "stopped"]


async def test_a_draining_worker_that_is_wanted_again_is_kept_and_takes_the_weights_that_it_missed() -> None:
    pool = pool_of(2)
    draining, running = await drained(pool)
    await pool.update(published(1))
    assert draining.version == PolicyVersion(1, 0)
    pool.scale(2, 1)
    draining.go.set()
    assert await running == "rollout-1"
    await settled(pool)
    assert len(FakeWorker.made) == 2, "no other was started"
    assert (draining.state, draining.version) == (WorkerState.READY, PolicyVersion(1, 1))
    await pool.close()


async def test_a_host_counts_as_long_as_a_worker_is_on_it() -> None:
    pool = pool_of(3)
    await pool.start()
    for worker, host in zip(FakeWorker.made, ("b", "a", "a"), strict=True):
        worker._info = {"address": host}
    await pool.update(published(0))
    assert pool.count().nodes == ("a", "b")
    pool.scale(2, 1)
    await settled(pool)
    assert pool.count().nodes == ("a", "b")
    FakeWorker.made[0].broken.set_result(WorkerLost("gone"))
    await settled(pool)
    assert pool.count().nodes == ("a",), "its replacement has not said where it is"
    await pool.close()


async def test_scaling_up_and_down_and_up_again_ends_at_the_number_wanted_whatever_is_still_starting() -> None:
    pool = pool_of(1)
    await pool.start()
    await pool.update(published(0))
    for workers in (4, 2, 5, 1, 3, 3, 1, 6, 2, 3):
        pool.scale(workers, 1)
        await asyncio.sleep(0)
    await settled(pool)
    count = pool.count()
    assert (count.wanted, count.ready, count.starting, count.pending, count.draining) == (3, 3, 0, 0, 0)
    ended = [worker.ended for worker in FakeWorker.made]
    assert ended.count("") == 3
    assert set(ended) <= {"", "stopped"}
    await pool.close()


async def test_a_worker_without_room_in_the_cluster_stays_wanted_costs_nothing_and_joins_when_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "PLACED_S", 0.0)
    FakeWorker.room = 1
    pool = pool_of(1)
    await pool.start()
    await pool.update(published(0))
    pool.scale(3, 1)
    await settled(pool)
    count = pool.count()
    assert (count.ready, count.pending, count.given_up) == (1, 2, 0)
    assert count.asked == "each asks for 1 CPU, the cluster has 4 in all"
    assert events_of(pool)[-2:] == [("worker_pending", "rollout-1"), ("worker_pending", "rollout-2")]
    FakeWorker.room = 2
    await settled(pool)
    assert (pool.count().ready, pool.count().pending) == (2, 1)
    pool.scale(2, 1)
    await settled(pool)
    assert (pool.count().ready, pool.count().pending) == (2, 0)
    await pool.close()


async def test_a_job_begins_with_the_workers_that_there_is_room_for_if_they_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "PLACED_S", 0.0)
    monkeypatch.setattr(membership, "BEGIN_S", 0.0)
    FakeWorker.room = 2
    pool = pool_of(3, min_workers=2)
    await pool.start()
    await pool.update(published(0))
    assert (pool.count().ready, pool.count().pending) == (2, 1)
    FakeWorker.room = 3
    await settled(pool)
    assert pool.count().ready == 3
    await pool.close()


async def test_a_job_that_has_no_room_for_its_minimum_says_so_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "PLACED_S", 0.0)
    monkeypatch.setattr(membership, "LOOK_S", 0.01)
    FakeWorker.room = 1
    spec = pool_of(3, min_workers=2)._spec.model_copy(deep=True)
    spec = spec.model_copy(update={"deadlines": spec.deadlines.model_copy(update={"start_s": 0.1})})
    pool = RolloutPool(spec, "m")
    with pytest.raises(
        DeadlineExceeded, match=r"room for 1 rollout workers, and at least 2 are needed \(rollout.min_w"
    ):
        await pool.start()
    assert pool.workers() == []
    assert {worker.ended for worker in FakeWorker.made} == {"stopped"}


async def test_a_pool_shrinks_when_a_worker_is_lost_too_often_and_fails_below_its_minimum() -> None:
    pool = pool_of(3, min_workers=2)
    await pool.start()
    await pool.update(published(0))
    FakeWorker.cannot_start = {f"rollout-{slot}.{number}" for slot in (1, 2) for number in (1, 2, 3)}
    FakeWorker.made[2].broken.set_result(WorkerLost("gone"))
    await settled(pool)
    count = pool.count()
    assert (count.wanted, count.ready, count.given_up) == (3, 2, 1)
    assert await sampled_by(pool, "a") == "rollout-0"
    FakeWorker.made[1].broken.set_result(WorkerLost("gone"))
    await settled(pool)
    failure = await pool.until_failed()
    assert str(failure).startswith(
        "1 of at least 2 rollout workers (rollout.min_workers) are left: slot 1 was lost 4 times within an hour"
    )
    await pool.close()


async def test_only_workers_that_were_pushed_to_are_brought_up_without_buckets() -> None:
    pool = pool_of(2)
    await pool.start()
    FakeWorker.made[1].state = WorkerState.STARTING
    assert pool.push_targets() == ["rollout-0"]
    FakeWorker.made[1].state = WorkerState.READY
    assert [t.worker for t in await pool.update(published(0, pushed=True))] == ["rollout-0"]
    assert [await sampled_by(pool, name) for name in ("a", "b")] == ["rollout-0", "rollout-0"]
    await pool.close()


async def test_an_error_inside_the_pool_is_raised_to_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(1)
    await pool.start()

    def fails(*_: object) -> bool:
        raise ResourceError("of the pool's own")

    monkeypatch.setattr(pool, "_may_replace", fails)
    FakeWorker.made[0].broken.set_result(WorkerLost("gone"))
    await settled(pool)
    with pytest.raises(TrainingFailed, match="of the pool's own"):
        await sampled_by(pool, "a")
    await pool.close()


async def test_a_pool_that_failed_samples_and_updates_no_more_although_a_worker_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = pool_of(2)
    await pool.start()
    await pool.update(published(0))

    def fails(*_: object) -> bool:
        raise ResourceError("of the pool's own")

    monkeypatch.setattr(pool, "_may_replace", fails)
    FakeWorker.made[0].broken.set_result(WorkerLost("gone"))
    await settled(pool)
    assert [worker.id for worker in pool.workers()] == ["rollout-1"]
    for call in (sampled_by(pool, "a"), pool.update(published(1))):
        with pytest.raises(TrainingFailed, match="of the pool's own"):
            await call
    await pool.close()


async def test_an_owner_that_waits_for_something_else_learns_that_no_worker_is_left() -> None:
    pool = pool_of(1)
    await pool.start()
    failed = asyncio.create_task(pool.until_failed())
    FakeWorker.cannot_start = {"rollout-0.1", "rollout-0.2", "rollout-0.3"}
    await settled(pool)
    assert not failed.done()
    FakeWorker.made[0].broken.set_result(WorkerLost("first"))
    reason = await asyncio.wait_for(failed, 1)
    assert str(reason) == (
        "0 of at least 1 rollout workers (rollout.min_workers) are left: slot 0 was lost 4 times within an hour; "
        "the last one: rollout-0.3 cannot start"
    )
    await pool.close()


async def test_who_waits_for_a_worker_hears_that_the_pool_is_closed() -> None:
    pool = pool_of(1)
    await pool.start()
    waiting = asyncio.create_task(sampled_by(pool, "a"))
    await settled(pool)
    await pool.close()
    with pytest.raises(TrainingFailed, match="the rollout pool is closed"):
        await asyncio.wait_for(waiting, 1)
    assert "pool_failed" not in {kind for kind, _ in events_of(pool)}


class Gone:
    """A process that ends between being found alive and being killed."""

    def kill(self) -> None:
        raise psutil.NoSuchProcess(pid=4711)


async def test_a_process_that_ends_while_its_worker_is_killed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker(pool_of(1)._spec, "m", "rollout-0", 0, False)
    worker._processes = [Gone()]  # type: ignore[list-item]
    monkeypatch.setattr(remote.ray, "kill", lambda *_, **__: None)
    monkeypatch.setattr(remote.psutil, "wait_procs", lambda processes, timeout: ([], processes))
    await RemoteWorker.kill(worker)


class Room:
    """A placement group that never has room."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def wait(self, seconds: float) -> bool:
        self.closed.wait()
        return False


async def test_workers_that_wait_for_room_keep_no_thread_from_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Journal, checkpoints and publishing use threads of the loop, of which a small machine has six."""
    room = Room()
    monkeypatch.setattr(remote, "placement_group", lambda *_, **__: room)
    spec = pool_of(1)._spec
    waiting = [
        asyncio.create_task(RemoteWorker(spec, "m", f"rollout-{slot}", slot, False).placed(1.0)) for slot in range(40)
    ]
    await asyncio.sleep(0)
    try:
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "written"), 30) == "written"
    finally:
        room.closed.set()
        await asyncio.gather(*waiting)


async def test_a_group_that_is_taken_back_is_blamed_for_nothing_though_its_worker_is_used_again_at_once() -> None:
    worker = RemoteWorker(pool_of(1)._spec, "m", "rollout-0", 0, False)
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    deadline = asyncio.get_running_loop().time() + 600
    sampling = asyncio.create_task(worker._until(answer, deadline, group("a")))
    await asyncio.sleep(0)
    worker.recall("did not take weights over in time")
    worker.recalled = ""  # it has caught up in the same moment
    with pytest.raises(WorkerDrained):
        await asyncio.wait_for(sampling, 5)


def pushed_with_buckets(number: int) -> Published:
    return replace(published(number, pushed=True), buckets=(object(), object()))


async def test_after_a_native_push_a_replacement_takes_the_buckets_and_the_others_do_not() -> None:
    pool = pool_of(2)
    await pool.start()
    assert pool.push_targets() == ["rollout-0", "rollout-1"]
    FakeWorker.refuses = {"rollout-1": 0}
    assert [t.worker for t in await pool.update(pushed_with_buckets(0))] == ["rollout-0"]
    await until(lambda: len(pool.workers()) == 2 and all(worker.version for worker in pool.workers()))
    assert {worker.id: worker.took for worker in FakeWorker.made} == {
        "rollout-0": [0],
        "rollout-1": [0],
        "rollout-1.1": [2],
    }
    assert pool.push_targets() == ["rollout-0", "rollout-1.1"]
    await pool.update(pushed_with_buckets(1))
    assert FakeWorker.made[2].took == [2, 0]
    await pool.close()


async def test_the_only_worker_may_die_after_a_native_push() -> None:
    pool = pool_of(1)
    await pool.start()
    pool.push_targets()
    await pool.update(pushed_with_buckets(0))
    FakeWorker.made[0].broken.set_result(WorkerLost("gone"))
    await settled(pool)
    assert await sampled_by(pool, "a") == "rollout-0.1"
    await pool.close()


async def test_nothing_is_pushed_into_a_worker_that_is_taking_older_weights_over() -> None:
    pool = pool_of(2)
    await pool.start()
    pool.push_targets()
    await pool.update(pushed_with_buckets(0))
    FakeWorker.made[1].broken.set_result(WorkerLost("gone"))
    await until(lambda: len(FakeWorker.made) == 3)
    joining = FakeWorker.made[2]
    joining.go.clear()
    await until(lambda: joining.state is WorkerState.READY)
    assert pool.push_targets() == ["rollout-0"]
    update = asyncio.create_task(pool.update(pushed_with_buckets(1)))
    await settled(pool)
    joining.go.set()
    await update
    assert {worker.id: worker.version for worker in pool.workers()} == dict.fromkeys(
        ("rollout-0", "rollout-1.1"), PolicyVersion(1, 1)
    )
    assert joining.took == [2, 2], "first the older ones, which it had begun with"
    await pool.close()


async def test_weights_that_went_through_shared_memory_after_all_come_with_their_buckets() -> None:
    pool = pool_of(1)
    await pool.start()
    pool.push_targets()
    await pool.update(published(0))
    assert FakeWorker.made[0].took == [1]
    await pool.close()
