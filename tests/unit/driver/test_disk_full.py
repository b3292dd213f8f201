"""A disk that fills while a run writes to it: each writer says so in the same words, and what was whole stays."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import job
from ray.exceptions import RayTaskError
from safetensors.torch import save_file
from small_disk import fill, small_disk

from sapo_ray.driver import export as exports
from sapo_ray.driver import run
from sapo_ray.driver.checkpoint import Checkpoints
from sapo_ray.driver.files import write_text
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.tracking import MetricsFile, TensorBoard
from sapo_ray.errors import ResourceError, TrainingFailed

WAY_ON = r"its disk has 0\.0\d GB free: free some space.*`sapo-ray resume`"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MB."""
    with small_disk(tmp_path / "disk", 3) as folder:
        yield folder


async def tiny(folder: Path) -> None:
    (folder / "state").write_text("whole")


@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_a_checkpoint_that_finds_the_disk_full_says_so_and_leaves_the_last_one(small: Path, library: str) -> None:
    checkpoints = Checkpoints(small / "checkpoints", keep=2, min_free_gb=0)
    first = asyncio.run(checkpoints.write(1, tiny, lambda: None))

    async def large(folder: Path) -> None:
        weights = {"a": torch.zeros(1 << 20)}
        torch.save(weights, folder / "w") if library == "torch" else save_file(weights, folder / "w")

    with pytest.raises(ResourceError, match=rf"\.writing-step-000002 cannot be written .*{WAY_ON}"):
        asyncio.run(checkpoints.write(2, large, lambda: None))
    assert checkpoints.newest() == first
    assert sorted(path.name for path in first.parent.iterdir()) == ["latest", "step-000001"]


def test_an_error_that_is_not_the_disks_stays_what_it_was(tmp_path: Path) -> None:
    async def fails(folder: Path) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        asyncio.run(Checkpoints(tmp_path, keep=2, min_free_gb=0).write(1, fails, lambda: None))


def test_the_first_checkpoint_is_refused_by_the_size_it_is_thought_to_have(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, min_free_gb=0, expected=10**18)
    with pytest.raises(ResourceError, match=r"needed are .* and 1000000000\.00 GB for the checkpoint"):
        asyncio.run(checkpoints.write(1, tiny, lambda: None))
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_and_metrics_name_their_path_and_the_way_on(small: Path) -> None:
    board, rows = TensorBoard(small / "tensorboard", 0), MetricsFile(small / "metrics.jsonl", 0)
    fill(small)
    metrics = {f"metric {i}": 1.0 for i in range(60)}

    def log_all(tracker: TensorBoard | MetricsFile) -> None:
        for step in range(100):
            tracker.log(step, metrics)

    trackers: list[tuple[TensorBoard | MetricsFile, str]] = [(board, "tensorboard"), (rows, r"metrics\.jsonl")]
    for tracker, name in trackers:
        with pytest.raises(ResourceError, match=rf"{name} cannot be written \(No space left on device\); {WAY_ON}"):
            log_all(tracker)


def test_a_small_file_is_refused_by_name_and_what_stood_there_stays(small: Path) -> None:
    write_text(small / "result.json", "before")
    fill(small)
    with pytest.raises(ResourceError, match=rf"result\.json cannot be written \(No space.*{WAY_ON}"):
        write_text(small / "result.json", "x" * 100_000)
    assert (small / "result.json").read_text() == "before"


async def test_an_export_that_finds_the_disk_full_is_not_tried_again_by_a_new_attempt(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        save_file({"a": torch.zeros(1 << 20)}, small / "partial")
        raise AssertionError
    except Exception as error:  # noqa: BLE001 - safetensors' own kind, whichever that is
        cause = error

    async def task(*_: Any) -> None:
        raise RayTaskError("export_hf", "its traceback", cause)

    monkeypatch.setattr(exports.ray, "remote", lambda **_: lambda _: SimpleNamespace(remote=task))
    published = SimpleNamespace(manifest=None, buckets=("b",))
    outcome: Any = SimpleNamespace(published=published, abandoned=False, seconds={})
    journal = Journal(small / "journal.jsonl", 1)
    with pytest.raises(ResourceError, match=rf"export cannot be written .*{WAY_ON}") as refused:
        await exports.export(outcome, Path("m"), small / "export", journal, 5.0)
    assert not isinstance(refused.value, run.RECOVERABLE)


def test_what_failed_first_is_what_the_user_sees_also_when_nothing_can_be_written_any_more(
    small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        fill(small)
        raise TrainingFailed("hardly any group can be used")

    monkeypatch.setattr(run, "train_and_export", fails)
    with pytest.raises(TrainingFailed, match="hardly any group can be used"):
        run.train(job(run_dir=str(small / "run")))
    assert "result.json cannot be written" in caplog.text
