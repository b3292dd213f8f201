"""Ctrl-C and SIGTERM, more than once: what was started is ended whatever the user does meanwhile."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from sapo_ray.driver import lifecycle
from sapo_ray.driver.journal import Journal, read_journal
from sapo_ray.driver.lifecycle import close_all, start_together
from sapo_ray.errors import WorkerLost

PROGRAM = Path(__file__).with_name("interrupted_run.py")


def told_to_end(run_dir: Path, signal: str, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), str(run_dir), signal, how]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(("signal", "code", "how"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_three_signals_end_every_part_in_order_once(tmp_path: Path, signal: str, code: int, how: str) -> None:
    ended = told_to_end(tmp_path / "run", signal, "orderly")
    lines = ended.stdout.splitlines()
    assert sorted(lines[:3]) == ["learner start ended", "rollouts start ended", "verifiers start ended"]
    assert sorted(lines[3:6]) == ["learner closed", "rollouts closed", "verifiers closed"]
    assert lines[6:] == ["ray ended"]
    assert ended.stderr.count("ending, please wait") == 2
    assert f"{how}; everything it started was ended" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.returncode == code
    states = [r["state"] for r in read_journal(tmp_path / "run" / "journal.jsonl") if r["kind"] == "transition"]
    assert states == ["starting", "interrupted"]


def test_what_could_not_be_ended_is_not_said_to_be(tmp_path: Path) -> None:
    ended = told_to_end(tmp_path / "run", "SIGTERM", "stuck")
    assert "not everything it started was ended: learner (RuntimeError('rank 0 does not end'))" in ended.stderr
    assert "everything it started was ended\n" not in ended.stderr
    assert ended.returncode == 143


async def test_a_start_that_fails_ends_the_other_starts_before_it_is_raised() -> None:
    order: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise WorkerLost("rank 0 cannot start")

    async def starts() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.01)
            order.append("the other start ended")

    with pytest.raises(WorkerLost, match="rank 0 cannot start"):
        await start_together(starts(), fails())
    assert order == ["the other start ended"]


async def test_a_close_that_hangs_is_given_up_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "CLOSE_S", 0.1)
    journal = Journal(tmp_path / "journal.jsonl", 1)

    async def hangs() -> None:
        await asyncio.sleep(600)

    async def closes() -> None: ...

    await close_all(journal, rollouts=hangs(), verifiers=closes())
    journal.close()
    told = [(r["condition"], r["part"], r["reason"]) for r in read_journal(journal.path)]
    assert told == [("CloseFailed", "rollouts", "it did not end within 0.1 s")]


async def test_who_is_cancelled_while_closing_closes_first(tmp_path: Path) -> None:
    closed: list[str] = []

    async def closes() -> None:
        await asyncio.sleep(0.05)
        closed.append("learner")

    journal = Journal(tmp_path / "journal.jsonl", 1)
    closing = asyncio.create_task(close_all(journal, learner=closes()))
    for _ in range(3):
        await asyncio.sleep(0)
        closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert closed == ["learner"]
    journal.close()
