"""Checkpoints under kill -9, damage and lack of space."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sapo_ray.driver import checkpoint, files
from sapo_ray.driver.checkpoint import Checkpoints, verify
from sapo_ray.errors import CheckpointError, DeadlineExceeded, DiskFull, ResourceError, TrainingFailed, WorkerLost

WRITER = """
import asyncio, sys
from pathlib import Path
from sapo_ray.driver.checkpoint import Checkpoints

async def fill(folder):
    (folder / "a").write_bytes(step.to_bytes(1, "little") * 3_000_000)
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_bytes(step.to_bytes(1, "little") * 3_000_000)

checkpoints = Checkpoints(Path(sys.argv[1]), keep=2, min_free_gb=0)
step = int(sys.argv[2])
print("ready", flush=True)
while True:
    step = step % 250 + 1
    asyncio.run(checkpoints.write(step, fill, lambda: None))
"""


async def text(folder: Path) -> None:
    (folder / "state").write_text(folder.name)


def write(checkpoints: Checkpoints, step: int) -> Path:
    return asyncio.run(checkpoints.write(step, text, lambda: None))


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A writer that checkpoints without pause is killed twelve times, a little later each time."""
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=0)
    write(checkpoints, 1)
    step = 1
    for kill in range(12):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(step)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.01 + 0.017 * kill)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.name == (tmp_path / "latest").read_text()
        verify(newest)
        step = int(newest.name.removeprefix("step-"))


def test_two_newest_are_kept_and_the_pointer_names_the_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=0)
    for step in (10, 20, 30):
        write(checkpoints, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000020", "step-000030"]
    assert checkpoints.newest() == tmp_path / "step-000030"


def test_the_millionth_step_is_newer_than_the_one_before_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=0)
    for step in (999998, 999999, 1000000):
        write(checkpoints, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1000000", "step-999999"]
    (tmp_path / "latest").unlink()
    assert checkpoints.newest() == tmp_path / "step-1000000"


def test_a_pointer_that_names_nothing_is_told_with_the_way_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=0)
    write(checkpoints, 1)
    (tmp_path / "latest").write_text("\0\0")
    with pytest.raises(CheckpointError, match=r"latest names no checkpoint .*remove it"):
        checkpoints.newest()


def test_one_flipped_byte_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=0)
    write(checkpoints, 1)
    damaged = write(checkpoints, 2) / "state"
    damaged.write_text("step-000003"[:11])
    assert checkpoints.newest() == tmp_path / "step-000001"
    with pytest.raises(CheckpointError, match=r"step-000002/state differs from its hash"):
        verify(tmp_path / "step-000002")


def test_when_every_checkpoint_is_damaged_the_error_names_each(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=0)
    for step in (1, 2):
        (write(checkpoints, step) / "state").unlink()
    with pytest.raises(CheckpointError, match=r"step-000002/state is missing; .*step-000001/state is missing"):
        checkpoints.newest()


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", keep=2, min_free_gb=0).newest() is None


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=1e9)
    with pytest.raises(
        ResourceError, match=r"too little disk .* free .*min_free_gb = 1e\+09 GB .*lower checkpoint\.min_free_gb"
    ):
        write(checkpoints, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_the_last_checkpoint_and_no_debris(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=0)
    write(checkpoints, 1)

    async def full(folder: Path) -> None:
        (folder / "state").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match=r"step-000002 cannot be written \(No space left on device\); .* GB free"):
        asyncio.run(checkpoints.write(2, full, lambda: None))
    assert checkpoints.newest() == tmp_path / "step-000001"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_a_folder_that_a_full_disk_does_not_take_is_a_full_disk_and_not_a_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk without inodes has bytes free."""
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=0)
    write(checkpoints, 1)
    mkdir = Path.mkdir

    def no_inodes(path: Path, *args: Any, **named: Any) -> None:
        if path.name.startswith(".writing"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(path, *args, **named)

    monkeypatch.setattr(Path, "mkdir", no_inodes)
    with pytest.raises(DiskFull, match=r"step-000002 cannot be written \(No space left on device\)"):
        write(checkpoints, 2)
    monkeypatch.undo()
    assert write(checkpoints, 2) == checkpoints.newest()


def test_an_old_checkpoint_that_cannot_be_removed_costs_nothing_and_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=0)
    for step in (1, 2):
        write(checkpoints, step)
    rmtree = checkpoint.shutil.rmtree

    def busy(path: Path, *args: Any, **named: Any) -> None:
        if path.name == "step-000001":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rmtree(path, *args, **named)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    assert write(checkpoints, 3) == checkpoints.newest()
    assert "an old checkpoint" in caplog.text
    monkeypatch.undo()
    write(checkpoints, 4)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("lost", [WorkerLost("rank 1 died"), DeadlineExceeded("rank [1] not done in time")])
@pytest.mark.parametrize("full", [False, True])
def test_a_learner_that_is_lost_while_it_saves_is_lost_and_not_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: Exception, full: bool
) -> None:
    """Tried again, a save would ask ranks that are no more."""
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=0)
    write(checkpoints, 1)

    async def dies(folder: Path) -> None:
        if full:
            monkeypatch.setattr(files, "disk_is_full", lambda _: True)
        raise lost

    with pytest.raises(type(lost)) as raised:
        asyncio.run(checkpoints.write(2, dies, lambda: None))
    assert raised.value is lost
    assert checkpoints.newest() == tmp_path / "step-000001"


def test_a_driver_superseded_while_it_fills_a_checkpoint_moves_nothing(tmp_path: Path) -> None:
    """The other attempt comes at any of the moments at which the guard is asked."""
    for refused_at in (1, 2, 3):
        folder = tmp_path / str(refused_at)
        checkpoints = Checkpoints(folder, keep=2, min_free_gb=0)
        write(checkpoints, 1)
        asked = 0

        def guard(refused_at: int = refused_at) -> None:
            nonlocal asked
            asked += 1
            if asked == refused_at:
                raise TrainingFailed("superseded")

        with pytest.raises(TrainingFailed):
            asyncio.run(checkpoints.write(2, text, guard))
        assert (folder / "latest").read_text() == "step-000001"
        assert checkpoints.newest() == folder / "step-000001"
        assert (folder / "step-000002").exists() == (refused_at == 3), "it has its name only if it was allowed to"
        assert not list(folder.glob(".writing-*"))
