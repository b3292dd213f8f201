"""What happens when a learner rank dies, cannot start, or does not finish in time."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
from learner_probe import Learners, ask, job, make_samples
from ray.util.placement_group import placement_group, remove_placement_group

from sapo_ray.errors import DeadlineExceeded, ModelError, ResourceError, WorkerLost
from sapo_ray.learner.group import LearnerGroup
from sapo_ray.types import PolicyVersion

pytestmark = pytest.mark.integration


def gone(pids: list[int]) -> bool:
    """Whether all processes ended within 20 s."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if not any(psutil.pid_exists(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_rank_killed_in_the_middle_of_a_step_is_heard_of_at_once(learners: Learners, victim: int) -> None:
    """The survivor sits in a collective that would wait for an hour."""
    group = await learners.with_job(job(learners.model, zero_stage=3, ranks=2, epochs=500))
    pids = group.pids()
    step = asyncio.create_task(group.train(0, make_samples()))
    await asyncio.sleep(1.5)
    assert not step.done()
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(WorkerLost, match=rf"step 0: learner .*rank {victim} died"):
        await step
    assert time.monotonic() - killed < 15
    assert gone(pids), "the survivor is ended, too"


async def test_a_rank_that_died_between_steps_is_heard_of_in_the_next_and_its_room_is_kept_for_new_ranks(
    learners: Learners,
) -> None:
    group = await learners.with_job(job(learners.model, zero_stage=2, ranks=2))
    before = group.pids()
    waiting = placement_group([{"CPU": ray.cluster_resources()["CPU"] - 1}])  # somebody who would take what gets free
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(WorkerLost, match="rank 1 died"):
        await asyncio.wait_for(group.publish(PolicyVersion(1, 1)), 30)
    with pytest.raises(AssertionError, match="closed after a failure"):
        await group.train(0, make_samples())
    await group.restart()
    assert len(group.pids()) == 2
    assert set(group.pids()).isdisjoint(before)
    assert not waiting.wait(0.1)
    remove_placement_group(waiting)
    await group.train(0, make_samples())


async def test_a_step_over_its_deadline_names_itself_and_ends_the_group(learners: Learners) -> None:
    group = await learners.with_job(job(learners.model, ranks=1, epochs=500, deadlines={"step_s": 1.0}))
    pids = group.pids()
    with pytest.raises(DeadlineExceeded, match=r"step 3: learner \w+.*\(deadlines.step_s\): rank \[0\] not done"):
        await group.train(3, make_samples())
    assert gone(pids)


async def test_a_cancelled_step_ends_the_group(learners: Learners) -> None:
    group = await learners.with_job(job(learners.model, ranks=1, epochs=500))
    pids = group.pids()
    step = asyncio.create_task(group.train(0, make_samples()))
    await asyncio.sleep(0.5)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert gone(pids)


async def test_an_error_in_one_rank_comes_with_its_traceback(learners: Learners) -> None:
    group = await learners.with_job(job(learners.model, ranks=1))
    samples = make_samples()
    wrong = [dataclasses.replace(samples[0], tokens=samples[0].tokens + 1), *samples[1:]]
    with pytest.raises(WorkerLost, match=r"(?s)rank 0 failed:.*tensors.py.*_check"):
        await group.train(0, wrong)


async def test_a_model_that_does_not_load_is_named_at_the_start(ray_session: None, tmp_path: Path) -> None:
    group = LearnerGroup(job(tmp_path), str(tmp_path / "missing"))
    with pytest.raises(ModelError, match=r"model.path 'missing' cannot be loaded"):
        await group.start()
    await group.close()


async def test_settings_that_need_gpus_are_refused_where_there_are_none(
    learners: Learners, addition_model: Path
) -> None:
    group = await learners.with_job(job(addition_model, ranks=1))
    for settings, message in [
        ({"transport": "nccl"}, "learner.transport: nccl needs GPUs"),
        ({"offload_optimizer": True, "zero_stage": 2}, "learner.offload_optimizer needs ZeRO stage 1-3 on GPUs"),
    ]:
        said = await ask(group, "refused_settings", job(addition_model, ranks=1, **settings))
        assert message in said[0]


async def test_no_room_for_the_ranks_says_what_was_asked_and_what_is_free(
    ray_session: None, addition_model: Path
) -> None:
    group = LearnerGroup(job(addition_model, ranks=1000, deadlines={"start_s": 2.0}), str(addition_model))
    with pytest.raises(ResourceError, match=r"no room for learner.ranks: 1000 .*asks for \{'CPU': 1.0\}.*free"):
        await group.start()
