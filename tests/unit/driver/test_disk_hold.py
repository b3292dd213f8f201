"""A disk that fills in mid-run: the run holds, says so, and goes on as if nothing had happened once there is room."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_control import orders
from fakes import Bench, FakeLearner, job
from small_disk import fill, small_disk

from sapo_ray.api.link import Orders
from sapo_ray.driver import files, hold, stages
from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.checkpoint import Checkpoints
from sapo_ray.driver.files import write_text
from sapo_ray.driver.hold import DiskHold
from sapo_ray.driver.interrupts import Interrupts
from sapo_ray.driver.journal import Journal, read_journal
from sapo_ray.driver.orders import Ended, StandingOrders
from sapo_ray.driver.pulse import Pulse
from sapo_ray.driver.tracking import MetricsFile, TensorBoard
from sapo_ray.errors import DiskFull, ResourceError, Superseded

SPEC = job(steps=4, checkpoint={"every": 2, "min_free_gb": 0})


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "CHECK_S", 0.1)
    monkeypatch.setattr(hold, "ORDERS_S", 0.01)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real file system of 12 MB; full with less than 64 kB free."""
    monkeypatch.setattr(files, "FULL_BYTES", 64 << 10)
    with small_disk(tmp_path / "disk", 12) as folder:
        yield folder


class FillsTheDisk(FakeLearner):
    """Somebody fills the disk while it works at a step."""

    at: int = 3
    moment: Callable[[], None] = lambda: None

    async def train(self, step: int, samples: list[Any]) -> Any:
        report = await super().train(step, samples)
        if step == self.at:
            self.moment()
        return report


def bench(run_dir: Path, moment: Callable[[], None], at: int = 3) -> Bench:
    run_dir.mkdir(exist_ok=True)
    learner = FillsTheDisk()
    learner.at, learner.moment = at, moment  # type: ignore[method-assign]
    trackers = [MetricsFile(run_dir / "metrics.jsonl", 0), TensorBoard(run_dir / "tensorboard", 0)]
    return Bench(run_dir, SPEC, learner=learner, trackers=trackers)


def told(of: Bench) -> list[dict[str, Any]]:
    if not (of.run_dir / "journal.jsonl").exists():
        return []
    return [record for record in of.journal("condition") if record["condition"] == "DiskFull"]


async def until(condition: Callable[[], bool], task: asyncio.Task[Any]) -> None:
    async with asyncio.timeout(200):
        while not condition():
            assert not task.done(), task.result()
            await asyncio.sleep(0.01)


async def test_a_full_disk_holds_a_run_that_says_so_and_goes_on_to_the_same_end(disk: Path, tmp_path: Path) -> None:
    whole = bench(tmp_path / "whole", lambda: None)
    await whole.attempt()

    held = bench(disk / "run", lambda: fill(disk))
    running = asyncio.create_task(held.attempt())
    await until(lambda: bool(told(held)), running)
    await asyncio.sleep(0.5)
    assert not running.done()
    assert "cannot be written (No space left on device); the run holds until there is room" in told(held)[0]["reason"]
    assert (held.run_dir / "checkpoints" / "latest").read_text() == "step-000002"
    assert held.learner.trained == whole.learner.trained[:3], "nothing moves meanwhile"
    (disk / "filler").unlink()
    outcome = await asyncio.wait_for(running, 200)
    assert outcome.steps == 4
    assert [one.get("cleared", False) for one in told(held)] == [False, True]
    assert held.learner.trained == whole.learner.trained
    rows = [json.loads(line)["step"] for line in (held.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4], "each row once"
    assert [record["step"] for record in held.journal("consumed")] == [1, 2, 3, 4]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(held.run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]


class Injected:
    """`os.write` and the preallocation find the disk full for as long as it is told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        for name in ("write", "posix_fallocate"):
            monkeypatch.setattr(os, name, self._refusing(getattr(os, name)))

    def _refusing(self, really: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: int, *rest: Any) -> Any:
            if self.full and file > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return really(file, *rest)

        return call


async def test_a_run_holds_wherever_a_write_finds_the_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Injected(monkeypatch)
    held = bench(tmp_path, lambda: setattr(disk, "full", True))
    running = asyncio.create_task(held.attempt())
    await until(lambda: disk.full, running)
    await asyncio.sleep(0.5)
    assert not running.done()
    assert held.journal("step")[-1]["step"] == 2
    disk.full = False
    assert (await asyncio.wait_for(running, 200)).steps == 4
    assert [one.get("cleared", False) for one in told(held)] == [False, True], "said late, for there was no room at all"
    assert [record["step"] for record in held.journal("step")] == [1, 2, 3, 4]


async def test_a_checkpoint_without_room_for_its_reserve_of_free_space_holds_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job(steps=3, checkpoint={"every": 1, "min_free_gb": 0})
    held = Bench(tmp_path, spec)
    usage = files.shutil.disk_usage
    free: list[int] = []

    def disk_usage(path: Any) -> Any:
        return usage(path)._replace(free=free[0]) if free and "checkpoints" in str(path) else usage(path)

    monkeypatch.setattr(files.shutil, "disk_usage", disk_usage)

    async def no_room() -> None:
        await until(lambda: (tmp_path / "checkpoints" / "step-000001").exists(), running)
        free.append(0)
        await until(lambda: bool(told(held)), running)
        free.clear()

    running = asyncio.create_task(held.attempt())
    await no_room()
    await asyncio.wait_for(running, 200)
    assert "too little disk for a checkpoint" in told(held)[0]["reason"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003"


async def test_orders_to_a_held_run_a_pause_is_answered_and_a_cancel_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Injected(monkeypatch)
    held = bench(tmp_path, lambda: setattr(disk, "full", True))
    running = asyncio.create_task(held.attempt())
    await until(lambda: "the run holds until there is room" in caplog.text, running)
    held.orders.receive(Orders(**orders(state="pause")))
    await until(lambda: "a pause was asked for, but needs a checkpoint" in caplog.text, running)
    held.orders.receive(Orders(**orders(state="cancel")))
    with pytest.raises(ResourceError):  # of the journal that this bench closes on a disk that is still full
        await asyncio.wait_for(running, 200)
    disk.full = False
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000002"


async def test_a_held_run_that_is_to_pause_does_so_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Injected(monkeypatch)
    held = bench(tmp_path, lambda: setattr(disk, "full", True), at=1)
    running = asyncio.create_task(held.attempt())
    await until(lambda: "the run holds" in caplog.text, running)
    held.orders.receive(Orders(**orders(state="pause")))
    await asyncio.sleep(0.05)
    disk.full = False
    outcome = await asyncio.wait_for(running, 200)
    assert (outcome.ending, outcome.steps) == ("paused", 2)


async def test_a_held_run_that_another_attempt_took_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Injected(monkeypatch)
    (tmp_path / "attempt").write_text("1")
    desk = DiskHold(tmp_path, Journal(tmp_path / "journal.jsonl", 1), StandingOrders())

    async def refused() -> None:
        raise DiskFull("full")

    holding = asyncio.create_task(desk.through(refused))
    await asyncio.sleep(0.05)
    (tmp_path / "attempt").write_text("2")
    with pytest.raises(Superseded):
        await asyncio.wait_for(holding, 200)
    assert not disk.full


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_served_run_whose_driver_was_replaced_while_it_held_goes_on_holding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: int
) -> None:
    (tmp_path / "attempt").write_text(str(attempt))
    journal = Journal(tmp_path / "journal.jsonl", attempt)
    free = iter([0, 0, 10**12])
    monkeypatch.setattr(
        Checkpoints, "check_space", lambda _: None if next(free) else _raise(DiskFull("too little disk"))
    )

    class Reached(Exception): ...

    monkeypatch.setattr(stages, "prepare_inputs", lambda *_: _raise(Reached()))
    served = StandingOrders(Orders(**orders(state="run")))
    held = DiskHold(tmp_path, journal, served)
    second = Attempt(
        spec=SPEC, number=attempt, run_dir=tmp_path, journal=journal, orders=served, hold=held, pulse=Pulse()
    )
    with pytest.raises(DiskFull if attempt == 1 else Reached):
        stages.train_and_export(second, Interrupts())
    journal.sync_now()
    said = [row for row in read_journal(journal.path) if row.get("condition") == "DiskFull"]
    assert [row.get("cleared", False) for row in said] == ([] if attempt == 1 else [False, True])


def test_a_run_that_holds_at_its_start_is_cancelled_at_once(tmp_path: Path) -> None:
    (tmp_path / "attempt").write_text("2")
    desk = DiskHold(tmp_path, Journal(tmp_path / "journal.jsonl", 2), StandingOrders(Orders(**orders(state="cancel"))))
    with pytest.raises(Ended, match="cancelled"):
        desk.wait_at_start(lambda: _raise(DiskFull("too little disk")))


def _raise(error: Exception) -> None:
    raise error


def test_a_start_without_room_for_the_reserve_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Injected(monkeypatch)
    disk.full = True
    journal = Journal(tmp_path / "journal.jsonl", 1)
    desk = DiskHold(tmp_path, journal, StandingOrders())
    with pytest.raises(DiskFull, match=r"\.reserve cannot be written \(No space left on device\)"), desk.ready():
        raise AssertionError
    assert not (tmp_path / ".reserve").exists()


def test_the_reserve_lets_the_journal_speak_on_a_full_disk_and_is_gone_afterwards(disk: Path) -> None:
    (disk / "attempt").write_text("1")
    journal = Journal(disk / "journal.jsonl", 1)
    desk = DiskHold(disk, journal, StandingOrders())

    async def hold_once() -> None:
        tries = iter([DiskFull("no room"), None])

        async def write() -> None:
            if error := next(tries):
                fill(disk)
                journal.event("step", step=1)
                with pytest.raises(DiskFull):
                    journal.sync_now()
                raise error

        task = asyncio.create_task(desk.through(write))
        await until(lambda: "DiskFull" in (disk / "journal.jsonl").read_text(), task)
        (disk / "filler").unlink()
        await asyncio.wait_for(task, 200)

    with desk.ready():
        assert (disk / ".reserve").stat().st_size == 4 << 20
        asyncio.run(hold_once())
        assert (disk / ".reserve").stat().st_size == 4 << 20
    assert not (disk / ".reserve").exists()


def test_other_errors_of_a_file_are_not_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "result.json.tmp").mkdir()
    with pytest.raises(ResourceError) as refused:
        write_text(tmp_path / "result.json", "x")
    assert not isinstance(refused.value, DiskFull)
