"""Grading processes under attack. Real processes, real math-verify, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.errors import ConfigError, ResourceError, WorkerLost
from sapo_ray.types import Grading, Verdict
from sapo_ray.verifier.golds import check_gold, find_unusable_golds
from sapo_ray.verifier.jobs import GradingItem
from sapo_ray.verifier.stock import ProcessStock
from sapo_ray.verifier.supervisor import GradingProcesses

DEADLINE_S = 1.0
REPLACEMENT_S = 5.0
ALLOWANCE = 3  # on promised bounds: the machine may be shared
POISON = ["9^{9^{9^9}}", "100000000!", r"\binom{10^9}{10^8}", "2^{2^{40}}", "{" * 60 + "}" * 60]


KILLED_ON_IMPORT = """
import os, pathlib, signal
kills = pathlib.Path(__file__).with_name("kills")
done = kills.read_text() if kills.exists() else ""
if len(done) < {kills}:
    kills.write_text(done + "x")
    os.kill(os.getpid(), signal.SIGKILL)
def act(*, completion, gold, prompt):
    return 1.0
"""


@asynccontextmanager
async def supervised(**settings: Any) -> AsyncIterator[GradingProcesses]:
    processes = GradingProcesses(VerifierSpec(**{"deadline_s": DEADLINE_S, **settings}))
    await processes.start()
    try:
        yield processes
    finally:
        await processes.close()


def boxed(answer: str, gold: str = "5") -> GradingItem:
    return GradingItem(completion=f"\\boxed{{{answer}}}", gold=gold)


def said(*completions: str) -> list[GradingItem]:
    return [GradingItem(completion=completion, gold="5") for completion in completions]


def verdicts(gradings: list[Grading]) -> list[tuple[str, str]]:
    return [(grading.verdict.value, grading.reason) for grading in gradings]


def bound(failures: int, processes: int) -> float:
    """Seconds promised for so many items that each fail twice."""
    return -(-failures // processes) * 2 * (DEADLINE_S + REPLACEMENT_S) * ALLOWANCE


def children() -> set[psutil.Process]:
    """All that was started from here, but for a database server of other tests: that starts what it likes."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() != "postgres":
                found.add(process)
    return found


async def test_poison_among_good_answers_spoils_only_itself() -> None:
    items = [boxed("5")]
    for poison in POISON:
        items += [boxed(poison), boxed("5"), boxed("4"), boxed(r"\frac{10}{2}")]
    items += [
        GradingItem(completion="5" * 2_000_000, gold="5"),
        GradingItem(completion="\\boxed{" * 100_000, gold="5"),
        GradingItem(completion="{" * 100_000 + "\\boxed{5}" + "}" * 100_000, gold="5"),
        GradingItem(completion="\x00\udcff \\boxed{5}\x00", gold="5"),
        boxed("5\x00\ud800"),
        boxed("5"),
    ]
    async with supervised() as processes:
        started = time.monotonic()
        gradings = await processes.grade_many(items)
        seconds = time.monotonic() - started
        stats = processes.stats()
    good = [("error", "timeout"), ("correct", "match"), ("wrong", "mismatch"), ("correct", "match")]
    assert verdicts(gradings) == [
        ("correct", "match"),
        *(good * len(POISON)),
        ("wrong", "no_answer"),
        ("wrong", "no_answer"),
        ("correct", "match"),
        ("correct", "match"),
        ("wrong", "unparseable"),
        ("correct", "match"),
    ]
    assert seconds < bound(failures=len(POISON), processes=2)
    assert stats.killed >= 2 * len(POISON)  # each poison answer twice
    assert stats.errors == {"timeout": len(POISON)}
    assert stats.seconds_lost >= 2 * len(POISON) * DEADLINE_S


async def test_a_hostile_reward_function_spoils_only_itself(misbehaving: str) -> None:
    hostile = ["exit", "segfault", "eat", "deaf", "sleep"]
    items = said("5", *[word for each in hostile for word in (each, "4", "print 5", "read 5")])
    async with supervised(reward=misbehaving, memory_mb=1024) as processes:
        started = time.monotonic()
        gradings = await processes.grade_many(items)
        seconds = time.monotonic() - started
    fine = [("wrong", "reward"), ("correct", "reward"), ("correct", "reward")]
    expected = [("correct", "reward")]
    for reason in ("died", "died", "died", "timeout", "timeout"):
        expected += [("error", reason), *fine]
    assert verdicts(gradings) == expected
    details = [grading.detail for grading in gradings if grading.verdict is Verdict.ERROR]
    assert [d.removeprefix("the grading process ended: ") for d in details] == [
        "exit status 3",
        "killed by SIGSEGV",
        "out of memory",
        "no grading within 1 s",
        "no grading within 1 s",
    ]
    assert seconds < bound(failures=5, processes=2)


async def test_an_error_is_believed_only_after_a_fresh_process_confirmed_it(misbehaving: str, tmp_path: Path) -> None:
    async with supervised(reward=misbehaving) as processes:
        [grading] = await processes.grade_many(said(f"once {tmp_path / 'mark'} 5"))
        stats = processes.stats()
    assert verdicts([grading]) == [("correct", "reward")]
    assert stats.died == 1
    assert stats.errors == {}


async def test_an_exception_that_keeps_coming_back_is_soon_believed_without_a_fresh_process(misbehaving: str) -> None:
    async with supervised(reward=misbehaving, processes=1) as processes:
        gradings = await processes.grade_many(said(*[f"raise number {n}" for n in range(40)]))
        stats = processes.stats()
    assert verdicts(gradings) == [("error", "crash")] * 40
    assert "ValueError: number 7 (misbehaving.py:" in gradings[7].detail
    # At most the window that was under way when the third confirmation came, never all forty.
    assert 3 <= stats.retired <= 16


async def test_unverifiable_wrong_punishes_the_completion_but_never_for_a_defect_of_the_reward_function(
    misbehaving: str,
) -> None:
    async with supervised(unverifiable="wrong", reward=misbehaving) as processes:
        gradings = await processes.grade_many(said("exit", "sleep", "raise x", "nan", "text", "5"))
        stats = processes.stats()
    assert verdicts(gradings) == [
        ("wrong", "died"),
        ("wrong", "timeout"),
        ("error", "crash"),
        ("error", "reward_not_finite"),
        ("error", "reward_type"),
        ("correct", "reward"),
    ]
    assert [grading.reward for grading in gradings] == [0.0, 0.0, None, None, None, 1.0]
    assert stats.errors == {"died": 1, "crash": 1, "timeout": 1, "reward_not_finite": 1, "reward_type": 1}


async def test_unverifiable_wrong_never_blames_a_completion_for_its_reference() -> None:
    items = [boxed("5", gold=POISON[2]), boxed("5", gold="?!"), boxed("1" * 1001), boxed("5")]
    async with supervised(unverifiable="wrong") as processes:
        gradings = await processes.grade_many(items)
    assert verdicts(gradings) == [
        ("error", "gold_unparseable"),
        ("error", "gold_unparseable"),
        ("wrong", "too_long"),
        ("correct", "match"),
    ]


async def test_a_reference_that_ends_processes_is_remembered() -> None:
    async with supervised(processes=1) as processes:
        gradings = await processes.grade_many([boxed(str(n), gold=POISON[0]) for n in range(8)])
        killed = processes.stats().killed
    assert verdicts(gradings) == [("error", "gold_unparseable")] * 8
    assert killed <= 4  # two for the first; at most what was sent ahead again


async def test_a_killed_process_is_replaced_within_five_seconds_busy_or_idle(misbehaving: str) -> None:
    async with supervised(reward=misbehaving, deadline_s=20) as processes:
        gradings = processes.grade_many(said("sleep 1.5", "sleep 1.5", "sleep 1.5", "4"))
        busy = asyncio.ensure_future(gradings)
        await asyncio.sleep(0.1)
        for pid in processes.pids():
            os.kill(pid, signal.SIGKILL)
        assert verdicts(await busy) == [("correct", "reward")] * 3 + [("wrong", "reward")]
        for pid in processes.pids():
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        await asyncio.sleep(0.05)
        while processes.stats().live < 3:
            assert time.monotonic() - killed < REPLACEMENT_S * ALLOWANCE
            await asyncio.sleep(0.05)
        assert verdicts(await processes.grade_many(said("5"))) == [("correct", "reward")]


async def test_a_leaking_process_is_replaced_before_it_fails(misbehaving: str) -> None:
    async with supervised(reward=misbehaving, processes=1, memory_mb=768) as processes:
        gradings = await processes.grade_many(said(*["leak 5"] * 400))  # 1.6 GB
        stats = processes.stats()
    assert verdicts(gradings) == [("correct", "reward")] * 400
    assert stats.retired >= 2
    assert stats.died == 0


async def test_a_reward_function_that_forks_does_not_shift_the_answers(misbehaving: str) -> None:
    async with supervised(reward=misbehaving, processes=1) as processes:
        gradings = await processes.grade_many(said("5", "fork 5", "4", "5", "4"))
        later = await processes.grade_many(said("4", "5", "4"))
    assert [grading.reward for grading in gradings[2:]] == [0.0, 1.0, 0.0]
    assert [grading.reward for grading in later] == [0.0, 1.0, 0.0]


async def test_a_reward_function_that_writes_into_the_pipes_spoils_only_itself(misbehaving: str) -> None:
    async with supervised(reward=misbehaving) as processes:
        gradings = await processes.grade_many(said("5", "scribble", "4", "5"))
    assert verdicts(gradings) == [("correct", "reward"), ("error", "died"), ("wrong", "reward"), ("correct", "reward")]


async def test_what_a_reward_function_started_dies_with_its_process(misbehaving: str) -> None:
    async with supervised(reward=misbehaving, deadline_s=60) as processes:
        assert verdicts(await processes.grade_many(said("spawn 86399"))) == [("wrong", "reward")]
        [sleeper] = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "86399"]]
    sleeper.wait(timeout=5)


def test_processes_end_when_their_parent_is_killed() -> None:
    program = """
import asyncio
from sapo_ray.config.spec import VerifierSpec
from sapo_ray.verifier.supervisor import GradingItem, GradingProcesses
async def main():
    processes = GradingProcesses(VerifierSpec(deadline_s=600))
    await processes.start()
    poison = [GradingItem(completion=r"\\boxed{9^{9^{9^9}}}", gold="5")] * 2
    task = asyncio.ensure_future(processes.grade_many(poison))
    await asyncio.sleep(0.5)
    print(*processes.pids(), flush=True)
    await task
asyncio.run(main())
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 3
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


async def test_closing_ends_what_waits_and_leaves_nothing(misbehaving: str) -> None:
    before = children()
    async with supervised(reward=misbehaving, deadline_s=600) as processes:
        waiting = asyncio.ensure_future(processes.grade_many(said("sleep", "sleep", "5", "5")))
        await asyncio.sleep(0.3)
    with pytest.raises(WorkerLost, match=r"ended while grading|closed"):
        await waiting
    with pytest.raises(WorkerLost, match="not running"):
        await processes.grade_many(said("5"))
    assert children() <= before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"reward": "misbehaving:nothing"}, ConfigError, "has no function 'nothing'"),
        ({"reward": "broken_reward:f"}, ConfigError, "no_such_module_here"),
        ({"memory_mb": 64}, (ResourceError, WorkerLost), "raise verifier.memory_mb|memory_mb = 64 is small"),
    ],
)
async def test_a_verifier_that_cannot_work_says_so_at_start(
    misbehaving: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    processes = GradingProcesses(VerifierSpec(**settings))
    with pytest.raises(error, match=message):
        await processes.start()
    assert processes.stats().live == 0


@pytest.mark.parametrize("kills", [1, 2, 3])
async def test_a_process_that_is_killed_while_it_starts_is_started_again_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    (tmp_path / "killed_on_import.py").write_text(KILLED_ON_IMPORT.format(kills=kills))
    monkeypatch.syspath_prepend(str(tmp_path))
    others = children()
    stock = ProcessStock(VerifierSpec(reward="killed_on_import:act"), shortcuts=False)
    if kills < 3:
        assert await stock.start(0) == []  # nothing but the spare
        assert len(stock.living) == 1
        assert await (await stock.fresh()).answers()
    else:
        with pytest.raises(WorkerLost, match=r"ended while starting \(killed by SIGKILL\)"):
            await stock.start(0)
    assert (tmp_path / "kills").read_text() == "x" * kills
    await stock.close()
    assert children() <= others


async def test_when_no_process_can_be_started_any_more_gradings_end_in_an_error(
    misbehaving: str, tmp_path: Path
) -> None:
    async with supervised(reward=misbehaving, processes=1) as processes:
        (tmp_path / "misbehaving.py").write_text("raise ImportError('gone')")
        gradings = await processes.grade_many(said("exit", "exit", "exit", "5"))
        assert [grading.verdict for grading in gradings[:3]] == [Verdict.ERROR] * 3
        assert gradings[-1].reason == "verifier_unavailable"
        assert "gone" in gradings[-1].detail


async def test_references_that_cannot_be_graded_against_are_found() -> None:
    answers = ["5", r"\frac{1}{", "north", "", r"\log 2", POISON[2], "5", "?!", r"\binom{10}{3}"]
    assert await find_unusable_golds(answers, VerifierSpec(deadline_s=DEADLINE_S)) == [1, 3, 5, 7]


def test_references_are_checked_without_an_event_loop_too() -> None:
    assert check_gold(["1,080", "}", "3/4"]) == [1]


@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.long)])
async def test_dozens_of_kills_leak_neither_processes_nor_files(misbehaving: str, rounds: int) -> None:
    this = psutil.Process()
    others = children()  # of tests before this one: Ray's, say

    def graders() -> set[psutil.Process]:
        return children() - others

    async with supervised(reward=misbehaving, deadline_s=0.3) as processes:

        async def round_of_poison(count: int) -> None:
            gradings = await processes.grade_many(said(*["exit", "sleep", "5", "segfault"] * count))
            assert [g.verdict for g in gradings] == [
                Verdict.ERROR,
                Verdict.ERROR,
                Verdict.CORRECT,
                Verdict.ERROR,
            ] * count
            deadline = time.monotonic() + REPLACEMENT_S * ALLOWANCE
            while processes.stats().live != 3 or len(graders()) > 3:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

        await round_of_poison(2)
        files = this.num_fds()
        assert len(graders()) == 3
        await round_of_poison(rounds)
        stats = processes.stats()
        assert this.num_fds() - files < 20  # 36 kills would leak 36 at least; Ray's own come and go
        assert len(graders()) == 3
    assert stats.killed + stats.died >= 6 * rounds  # three of four, each twice
