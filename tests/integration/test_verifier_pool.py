"""The verifier pool on a real Ray: dispatch, deaths, bounds."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.errors import ConfigError, WorkerLost
from sapo_ray.types import CompletionPayload, Grading
from sapo_ray.verifier import pool as pool_module
from sapo_ray.verifier.pool import VerifierPool

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

POISON = "9^{9^{9^9}}"


def ref(answer: str) -> ray.ObjectRef[Any]:
    payload = CompletionPayload(
        prompt_token_ids=np.array([1], np.int32),
        token_ids=np.array([2, 3], np.int32),
        logprobs=np.zeros(2, np.float32),
        text=f"\\boxed{{{answer}}}",
    )
    return ray.put(payload)


@asynccontextmanager
async def started(**settings: Any) -> AsyncIterator[VerifierPool]:
    pool = VerifierPool(VerifierSpec(**{"deadline_s": 2.0, **settings}))
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def rewards(gradings: list[Grading]) -> list[float | None]:
    return [grading.reward for grading in gradings]


async def until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


async def test_groups_are_graded_in_order_and_spread_over_the_actors() -> None:
    async with started(workers=2, processes=1) as pool:
        calls = [pool.grade("", str(n), [ref(str(n)), ref(str(n + 1)), ref(f"{2 * n}/2")]) for n in range(20)]
        for gradings in await asyncio.gather(*calls):
            assert rewards(gradings) == [1.0, 0.0, 1.0]
        stats = await pool.stats()
        assert await pool.grade("", "5", []) == []
    assert stats.live == 2
    assert stats.in_flight == 0
    assert [info.stats.graded for info in stats.workers] == [30, 30]


async def test_poison_ends_as_an_error_while_its_group_is_graded() -> None:
    async with started() as pool:
        gradings = await pool.grade("", "5", [ref("5"), ref(POISON), ref("4"), ref("10/2")])
        stats = await pool.stats()
    assert rewards(gradings) == [1.0, None, 0.0, 1.0]
    assert gradings[1].reason == "timeout"
    assert stats.errors == {"timeout": 1}


async def test_killing_grading_processes_and_then_the_actor_loses_no_grading() -> None:
    async with started(deadline_s=4.0) as pool:
        [info] = (await pool.stats()).workers
        for pid in info.processes:
            os.kill(pid, signal.SIGKILL)
        assert rewards(await pool.grade("", "5", [ref("5"), ref("4")])) == [1.0, 0.0]

        [info] = (await pool.stats()).workers
        children = [psutil.Process(pid) for pid in info.processes]
        busy = asyncio.ensure_future(pool.grade("", "5", [ref(POISON), ref("5"), ref("4")]))
        await asyncio.sleep(1.0)
        os.kill(info.pid, signal.SIGKILL)
        gradings = await busy
        assert [grading.reason for grading in gradings] == ["timeout", "match", "mismatch"]
        stats = await pool.stats()
        assert (stats.live, stats.workers_lost) == (1, 1)
        assert "ActorDiedError" in stats.last_failure
        _, alive = psutil.wait_procs(children, timeout=15)
        assert alive == []


async def test_an_idle_actor_that_died_is_replaced_when_it_is_noticed() -> None:
    async with started(workers=2, processes=1) as pool:
        first = (await pool.stats()).workers[0]
        os.kill(first.pid, signal.SIGKILL)

        async def replaced() -> bool:
            stats = await pool.stats()
            return stats.workers_lost == 1 and stats.live == 2 and len(stats.workers) == 2

        await until(replaced, 60)
        assert rewards(await pool.grade("", "5", [ref("5")])) == [1.0]


async def test_an_actor_that_is_silent_beyond_the_bound_is_ended_and_its_gradings_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VerifierPool, "_bound", lambda self, worker: 8.0)
    async with started(workers=2, processes=1) as pool:
        first = (await pool.stats()).workers[0]
        os.kill(first.pid, signal.SIGSTOP)
        before = time.monotonic()
        results = await asyncio.gather(*[pool.grade("", "5", [ref("5"), ref("4")]) for _ in range(4)])
        assert time.monotonic() - before < 3 * 16
        assert [rewards(gradings) for gradings in results] == [[1.0, 0.0]] * 4
        assert (await pool.stats()).workers_lost == 1


async def test_without_any_actor_gradings_end_as_errors_and_never_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "REPLACEMENT_S", 3.0)

    async def cannot(self: VerifierPool, worker: Any) -> None:
        raise WorkerLost("no room for another actor")

    async with started() as pool:
        monkeypatch.setattr(VerifierPool, "_start_actor", cannot)
        os.kill((await pool.stats()).workers[0].pid, signal.SIGKILL)
        gradings = await pool.grade("", "5", [ref("5"), ref("4")])
        stats = await pool.stats()
    assert [(grading.verdict.value, grading.reason) for grading in gradings] == [("error", "verifier_unavailable")] * 2
    assert "no room for another actor" in gradings[0].detail
    assert (stats.live, stats.unavailable) == (0, 2)


async def test_a_reward_function_that_cannot_be_used_is_a_config_error_at_start() -> None:
    pool = VerifierPool(VerifierSpec(reward="no_such_module_here:reward", workers=2))
    with pytest.raises(ConfigError, match="cannot import module 'no_such_module_here'"):
        await pool.start()


async def test_closing_leaves_no_process_behind() -> None:
    async with started(workers=2, processes=1) as pool:
        infos = (await pool.stats()).workers
        processes = [psutil.Process(pid) for info in infos for pid in (info.pid, *info.processes)]
    assert len(processes) == 6
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []
    with pytest.raises(WorkerLost, match="closed"):
        await pool.grade("", "5", [ref("5")])
