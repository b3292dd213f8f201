"""Faults that need no engine, injected into the real parts: what they write down names who is stuck."""

from __future__ import annotations

import asyncio
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_control import TOKEN, FakeControl
from fakes import job
from small_disk import small_disk

from sapo_ray.api.diagnosis import Diagnosis
from sapo_ray.config.load import resolve
from sapo_ray.diagnosis import diagnose, vitals
from sapo_ray.diagnosis.run_dir import evidence
from sapo_ray.diagnosis.vitals import Activity
from sapo_ray.driver import pulse as pulses
from sapo_ray.driver import run
from sapo_ray.driver.journal import Journal, read_journal
from sapo_ray.driver.link import Link
from sapo_ray.driver.orders import StandingOrders
from sapo_ray.driver.pulse import Pulse
from sapo_ray.driver.wire import Wire
from sapo_ray.errors import DataError, ModelError, ResourceError
from sapo_ray.models.builtin import make_addition_model

ROOT = Path(__file__).parents[3]


def named(run_dir: Path) -> Diagnosis:
    return diagnose(evidence(run_dir, time.time()))


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hiccups of a second count."""
    monkeypatch.setattr(vitals, "FLOOR_S", 1.0)
    monkeypatch.setattr(vitals, "LOOP_S", 1.0)
    monkeypatch.setattr(pulses, "WRITE_S", 0.1)
    monkeypatch.setattr(pulses, "BEAT_S", 0.1)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.jsonl", 1)
    journal.event("transition", state="running")
    journal.sync_now()
    yield journal
    journal.close()


@pytest.fixture
def pulse(quick: None, journal: Journal) -> Iterator[Pulse]:
    pulse = Pulse()
    pulse.open(journal)
    yield pulse
    pulse.close()


def told(journal: Journal) -> list[tuple[str, bool]]:
    journal.sync_now()
    return [
        (one["component"], one.get("cleared", False))
        for one in read_journal(journal.path)
        if one.get("condition") == "Stalled"
    ]


def test_work_that_takes_much_longer_than_usual_is_a_condition_until_it_goes_on(pulse: Pulse, journal: Journal) -> None:
    for _ in range(3):
        with pulse.at("learner", "train", "training step 1"):
            pass
    assert told(journal) == []
    with pulse.at("learner", "train", "training step 2"):
        until(lambda: named(journal.path.parent).verdict == "stalled")
        assert named(journal.path.parent).component == "learner"
        until(lambda: told(journal) == [("learner", False)])
    until(lambda: told(journal) == [("learner", False), ("learner", True)])
    assert named(journal.path.parent).verdict == "healthy"


async def test_a_worker_of_a_pool_is_named_by_what_the_pool_says_of_it(pulse: Pulse, journal: Journal) -> None:
    began = time.time()
    stuck = Activity(name="rollout-1", kind="sample", task="sampling 8 completions", since=began, progress=began)
    beats = asyncio.create_task(pulse.beat(lambda: [stuck]))
    pulse.took("sample", 0.1)
    with pulse.at(vitals.POOL, "sample", "the groups of step 2"):
        while (found := await asyncio.to_thread(named, journal.path.parent)).verdict == "healthy":
            await asyncio.sleep(0.1)
            assert time.time() - began < 20
    beats.cancel()
    assert (found.component, found.components[0].usual_s) == ("rollout-1", 0.1)


async def test_a_loop_that_is_blocked_is_named_by_the_thread_that_is_not(pulse: Pulse, journal: Journal) -> None:
    beats = asyncio.create_task(pulse.beat())
    await asyncio.sleep(0.5)
    time.sleep(2.5)  # noqa: ASYNC251 - the fault
    found = named(journal.path.parent)
    beats.cancel()
    assert (found.verdict, found.component) == ("stalled", "driver")
    assert told(journal) == [("driver", False)]


def test_a_control_plane_that_does_not_answer_is_named(
    quick: None, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPO_LINK_INTERVAL_S", "0.05")
    monkeypatch.setenv("SAPO_LINK_FLUSH_S", "0.1")
    control = FakeControl().start()
    link, pulse = Link(Wire(control.url, "job-1", 1, TOKEN), StandingOrders()), Pulse()
    link.open(journal)
    pulse.open(journal, link.activity)
    until(lambda: len(control.events()) == 1)
    control.stop()
    until(lambda: named(journal.path.parent).verdict == "stalled")
    assert named(journal.path.parent).component == "control plane"
    link.close()
    pulse.close()


def test_a_driver_that_is_gone_or_stopped_is_named_by_what_it_does_not_write_any_more(tmp_path: Path) -> None:
    """In a process of its own, killed and stopped for real."""
    body = (
        "import sys, time; from pathlib import Path; from sapo_ray.driver.journal import Journal\n"
        "from sapo_ray.driver.pulse import Pulse\n"
        "journal = Journal(Path(sys.argv[1]) / 'journal.jsonl', 1); journal.event('transition', state='running')\n"
        "journal.sync_now(); Pulse().open(journal); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", body, str(tmp_path)])
    try:
        until(lambda: (tmp_path / vitals.FILE).exists(), 60)
        assert named(tmp_path).verdict == "healthy"
        process.send_signal(signal.SIGSTOP)
        later = time.time() + vitals.WRITTEN_S + 2
        found = diagnose(evidence(tmp_path, later))
        assert (found.verdict, found.component) == ("stalled", "driver")
        assert json.loads((tmp_path / vitals.FILE).read_text())["host"] == platform.node()
    finally:
        process.kill()
        process.wait()
    found = diagnose(evidence(tmp_path, later))
    assert (found.verdict, found.component) == ("failed", "driver")


def small_job(run_dir: Path, **changes: Any) -> Any:
    base = job(run_dir=str(run_dir)).model_dump(mode="json")
    return resolve(base | changes)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    gone = small_job(tmp_path / "run", model={"path": str(tmp_path / "gone")})
    with pytest.raises(ModelError):
        run.train(gone)
    found = named(tmp_path / "run")
    assert (found.verdict, found.component) == ("failed", "model")
    assert found.cause is not None
    assert str(tmp_path / "gone") in found.cause.text


def test_a_model_that_is_damaged_is_named_before_any_engine_starts(tmp_path: Path) -> None:
    make_addition_model(tmp_path / "model", 0)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    cut = small_job(tmp_path / "run", model={"path": str(tmp_path / "model")})
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        run.train(cut)
    found = named(tmp_path / "run")
    assert (found.verdict, found.component) == ("failed", "model")
    assert "copy it again" in found.summary


def test_a_data_set_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = small_job(
        tmp_path / "run", data={"train": [{"path": str(tmp_path / "gone.jsonl")}], "max_prompt_tokens": 16}
    )
    with pytest.raises(DataError):
        run.train(gone)
    found = named(tmp_path / "run")
    assert (found.verdict, found.component) == ("failed", "data")


def test_a_disk_that_is_full_is_named_though_nobody_could_write_that_down(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        journal = Journal(disk / "journal.jsonl", 1)
        journal.event("transition", state="running")
        journal.sync_now()
        journal.event("sample", text="x" * (2 << 20))
        with pytest.raises(ResourceError):
            journal.sync_now()
        found = named(disk)
        assert (found.verdict, found.component) == ("stalled", "storage")
        assert "free some space" in found.remedy
