"""Saving and loading the learners: the same to the bit, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from learner_probe import Learners, job, make_samples
from small_disk import small_disk

from sapo_ray.errors import CheckpointError, ResourceError
from sapo_ray.types import PolicyVersion

pytestmark = pytest.mark.integration

V1 = PolicyVersion(1, 1)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (3, "float32"), (3, "bfloat16")],
)
async def test_what_follows_a_load_is_the_same_to_the_bit(
    learners: Learners, tmp_path: Path, stage: int, dtype: str
) -> None:
    """Two steps, save, two steps; then fresh engines, load, and the same two steps. Schedule and moments included."""
    spec = job(
        learners.model, zero_stage=stage, ranks=2, dtype=dtype, mini_batches=2, schedule="cosine", lr=5e-3, eps=1e-8
    )
    group = await learners.with_job(spec)
    for step in range(2):
        await group.train(step, make_samples(step))
    await group.save(tmp_path)
    saved = (await group.publish(V1)).manifest.fingerprint
    went_on = [await group.train(step, make_samples(step)) for step in (2, 3)]
    end = (await group.publish(V1)).manifest.fingerprint

    group = await learners.with_job(spec)
    await group.load(tmp_path)
    assert (await group.publish(V1)).manifest.fingerprint == saved
    again = [await group.train(step, make_samples(step)) for step in (2, 3)]
    assert [report.details for report in again] == [report.details for report in went_on]
    assert (await group.publish(V1)).manifest.fingerprint == end
    assert end != saved


async def test_a_killed_group_goes_on_from_its_checkpoint_in_new_processes(learners: Learners, tmp_path: Path) -> None:
    spec = job(learners.model, zero_stage=2, ranks=2)
    group = await learners.with_job(spec)
    await group.train(0, make_samples(0))
    await group.save(tmp_path)
    expected = (await group.train(1, make_samples(1))).details
    old = group.pids()
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    await group.close()
    group = await learners.with_job(spec)
    assert not set(group.pids()) & set(old)
    await group.load(tmp_path)
    assert (await group.train(1, make_samples(1))).details == expected


async def test_another_zero_stage_is_refused_with_the_way_out(learners: Learners, tmp_path: Path) -> None:
    group = await learners.with_job(job(learners.model, zero_stage=0, ranks=1))
    await group.save(tmp_path)
    about = json.loads((tmp_path / "learner.json").read_text())
    (tmp_path / "learner.json").write_text(json.dumps(about | {"zero_stage": 3}))
    with pytest.raises(CheckpointError, match=r"learner.zero_stage is 0, but .* written with 3; set it to 3"):
        await group.load(tmp_path)


async def test_a_folder_without_a_checkpoint_is_refused(learners: Learners, tmp_path: Path) -> None:
    group = await learners.with_job(job(learners.model, ranks=1))
    with pytest.raises(CheckpointError, match=r"no learner checkpoint in .*learner.json cannot be read"):
        await group.load(tmp_path)


async def test_a_damaged_checkpoint_is_refused(learners: Learners, tmp_path: Path) -> None:
    group = await learners.with_job(job(learners.model, zero_stage=2, ranks=1))
    await group.save(tmp_path)
    victim = next(file for file in (tmp_path / "deepspeed").iterdir() if "optim_states" in file.name)
    victim.write_bytes(victim.read_bytes()[:1000])
    group = await learners.with_job(job(learners.model, zero_stage=2, ranks=1))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        await group.load(tmp_path)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system that is too small for a checkpoint."""
    with small_disk(tmp_path / "full", 1) as folder:
        yield folder


async def test_a_disk_that_fills_while_the_ranks_save_costs_no_rank_and_no_bit(
    learners: Learners, full_disk: Path, tmp_path: Path
) -> None:
    group = await learners.with_job(job(learners.model, zero_stage=2, ranks=2))
    await group.train(0, make_samples(0))
    pids, before = group.pids(), (await group.publish(V1)).manifest.fingerprint
    with pytest.raises(ResourceError, match=r"learner rank \d could not write its part of .*full"):
        await group.save(full_disk)
    assert not group.lost
    assert (await group.publish(V1)).manifest.fingerprint == before
    (tmp_path / "roomy").mkdir()
    await group.save(tmp_path / "roomy")
    went_on = await group.train(1, make_samples(1))
    assert group.pids() == pids
    group = await learners.with_job(job(learners.model, zero_stage=2, ranks=2))
    await group.load(tmp_path / "roomy")
    await group.publish(V1)
    assert (await group.train(1, make_samples(1))).details == went_on.details
