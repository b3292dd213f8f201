"""The pool's watch over its actors, with actors that answer or fall silent at will."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.types import Grading, Verdict
from sapo_ray.verifier import pool as pool_module
from sapo_ray.verifier.calls import bounded
from sapo_ray.verifier.pool import VerifierPool

RIGHT = Grading(verdict=Verdict.CORRECT, reward=1.0, reason="match")


class Actor:
    """Its methods never return once it is silent."""

    def __init__(self) -> None:
        self.silent = asyncio.Event()
        for name, value in (("start", None), ("info", None), ("close", None), ("grade", [RIGHT])):
            setattr(self, name, SimpleNamespace(remote=lambda *_, value=value: self._answer(value)))

    async def _answer(self, value: Any) -> Any:
        if self.silent.is_set():
            await asyncio.Event().wait()
        return value


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    made: list[Actor] = []

    def make(*_: Any) -> Actor:
        made.append(Actor())
        return made[-1]

    def remote(_: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))

    for name, seconds in (("WATCH_S", 0.01), ("SILENT_S", 0.05)):
        monkeypatch.setattr(pool_module, name, seconds)
    monkeypatch.setattr(pool_module, "ray", SimpleNamespace(remote=remote, kill=lambda actor: None))
    return made


async def test_a_call_to_an_actor_that_fell_silent_is_graded_by_its_replacement(actors: list[Actor]) -> None:
    pool = VerifierPool(VerifierSpec(workers=1))
    await pool.start()
    actors[0].silent.set()
    async with asyncio.timeout(10):  # the bound of the call alone is over two minutes
        gradings = await pool.grade("", "5", [object()])
        stats = await pool.stats()
    assert gradings == [RIGHT]
    assert (stats.workers_lost, len(actors)) == (1, 2)
    assert "sign of life" in stats.last_failure
    await pool.close()


async def test_an_actor_that_falls_silent_while_nothing_is_graded_is_replaced(actors: list[Actor]) -> None:
    pool = VerifierPool(VerifierSpec(workers=2))
    await pool.start()
    actors[1].silent.set()
    async with asyncio.timeout(10):
        while len(actors) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await pool.close()


async def test_actors_that_answer_are_kept_through_many_watches(actors: list[Actor]) -> None:
    pool = VerifierPool(VerifierSpec(workers=2))
    await pool.start()
    await asyncio.sleep(0.3)
    assert len(actors) == 2
    await pool.close()


@pytest.mark.parametrize("turns", range(4))
async def test_a_cancellation_is_never_lost_to_an_answer_that_comes_with_it(turns: int) -> None:
    """It was, by asyncio.wait_for of Python 3.11: a watch went on, and its pool waited for it for ever."""
    answer = asyncio.get_running_loop().create_future()
    call = asyncio.create_task(bounded(answer, 10, "an answer"))
    await asyncio.sleep(0)
    answer.set_result(1)
    for _ in range(turns):
        await asyncio.sleep(0)
    in_time = not call.done()
    call.cancel()
    await asyncio.wait((call,))
    assert call.cancelled() == in_time


def test_a_call_waits_as_long_as_a_replacement_may_take() -> None:
    assert pool_module.REPLACEMENT_S >= pool_module.START_S
