"""What a run does while its driver waits for something else."""

import asyncio
from typing import Any, cast

import pytest

from sapo_ray.driver.stages import unless_failed
from sapo_ray.errors import TrainingFailed


async def test_a_pool_that_failed_ends_a_driver_that_waits_elsewhere() -> None:
    ended = asyncio.Event()

    async def waits_for_the_learner() -> Any:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    async def fails() -> TrainingFailed:
        await asyncio.sleep(0.01)
        return TrainingFailed("the last rollout worker is not replaced")

    with pytest.raises(TrainingFailed, match="the last rollout worker is not replaced"):
        await asyncio.wait_for(unless_failed(waits_for_the_learner(), fails()), timeout=30)
    assert ended.is_set()


async def test_a_driver_that_ends_first_is_not_disturbed_and_leaves_no_task() -> None:
    async def ends() -> Any:
        return "outcome"

    async def never() -> TrainingFailed:
        await asyncio.sleep(3600)
        raise AssertionError

    before = asyncio.all_tasks()
    assert cast(str, await unless_failed(ends(), never())) == "outcome"
    assert asyncio.all_tasks() == before
