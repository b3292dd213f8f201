"""Claims: a grading process grades at least 0.9 times as many answers a second as bare math-verify in a loop, although
every answer may be killed; and poison does not hold up the good answers.

Bare is what a script would do: parse the reference, parse the completion, verify, in this process, with math-verify's
defaults. Against it stand one grading process (requests, deadlines and answers included) as it is, and one with caches
and shortcuts off, which does more mathematics than bare: a reference that is no plain number is also compared with 0,
once for each item here, where a training run does so once for a group. Each round has items of its own and times all
three one after the other; ratios are medians over rounds, by the clock and by processor time: the second is the one to
read on a machine that does other work as well.

    python benchmarks/verifier.py [--rounds 5] [--items 1000] [--deadline 5]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import time
from dataclasses import dataclass
from typing import Any

import psutil
from math_verify import parse, verify
from report import report

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.types import Verdict
from sapo_ray.verifier.jobs import GradingItem
from sapo_ray.verifier.supervisor import GradingProcesses

WORDS = "The total is what remains after the second step, so we add both sums and simplify. " * 6
WAYS = ("math-verify in a loop (bare)", "as it is", "caches and shortcuts off")
POISON = ["9^{9^{9^9}}", "100000000!", r"\binom{10^9}{10^8}", "2^{2^{40}}"]
MIX = {"integer": 50, "decimal": 12, "fraction": 15, "root": 5, "set": 5, "polynomial": 3, "interval": 3, "none": 7}
"""Percent of the items, roughly as answers to GSM8K and MATH look."""
WORKLOADS = {
    "integers and fractions": {"integer": 80, "decimal": 5, "fraction": 15},
    "mixed": MIX,
}
"""The first is fast, so that what a process adds to each item shows; in the second SymPy's slow cases dominate."""


def answer(kind: str, draw: random.Random) -> tuple[str, str]:
    """(reference, the same in another form or a wrong one)."""
    a, b, c = draw.randrange(2, 10_000), draw.randrange(2, 100), draw.randrange(2, 100)
    right = draw.random() < 0.5
    off = 0 if right else 1
    match kind:
        case "integer":
            return str(a), f"{a + off:,}"
        case "decimal":
            return f"{a / 100:.2f}", f"\\frac{{{a + off}}}{{100}}"
        case "fraction":
            return f"\\frac{{{b}}}{{{c}}}", f"\\frac{{{2 * b + off}}}{{{2 * c}}}"
        case "root":
            return f"{b}\\sqrt{{{c}}}", f"\\sqrt{{{b * b * c + off}}}"
        case "set":
            return f"\\{{{a},{b},{c}\\}}", f"\\{{{c},{a + off},{b}\\}}"
        case "polynomial":
            return f"{b}x+{c}", f"{c + off}+{b}x"
        case "interval":
            return f"[{b},{b + c})", f"[{b},{b + c + off})"
        case _:
            return str(a), ""


def items_of(round_number: int, count: int, mix: dict[str, int] = MIX) -> list[GradingItem]:
    draw = random.Random(round_number)
    kinds = draw.choices(list(mix), weights=list(mix.values()), k=count)
    items = []
    for kind in kinds:
        gold, written = answer(kind, draw)
        tail = f"So it is \\boxed{{{written}}}." if written else "I do not know."
        items.append(GradingItem(completion=WORDS + tail, gold=gold))
    return items


@dataclass
class Timing:
    wall: float
    """Seconds."""
    cpu: float
    """Processor seconds of the process that grades; what other work on the machine leaves unmoved."""
    parent: float
    """Processor seconds of the supervisor."""
    correct: int


async def bare(items: list[GradingItem]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    correct = sum(verify(parse(f"\\boxed{{{item.gold}}}"), parse(item.completion)) for item in items)
    return Timing(time.perf_counter() - wall, time.process_time() - cpu, 0.0, correct)


def children_cpu(processes: GradingProcesses) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in processes.pids()]
    return sum(each.user + each.system for each in times)


async def supervised(processes: GradingProcesses, items: list[GradingItem]) -> Timing:
    wall, cpu, parent = time.perf_counter(), children_cpu(processes), time.process_time()
    gradings = await processes.grade_many(items)
    correct = sum(grading.verdict is Verdict.CORRECT for grading in gradings)
    return Timing(time.perf_counter() - wall, children_cpu(processes) - cpu, time.process_time() - parent, correct)


async def throughput(workload: str, rounds: int, count: int) -> list[dict[str, Any]]:
    spec = VerifierSpec(processes=1, deadline_s=60)
    as_it_is, plain = GradingProcesses(spec), GradingProcesses(spec, shortcuts=False)
    await as_it_is.start()
    await plain.start()
    timings: dict[str, list[Timing]] = {name: [] for name in WAYS}
    try:
        for number in range(-1, rounds):  # the first, a short one, warms all three up
            items = items_of(number, count if number >= 0 else count // 5, WORKLOADS[workload])
            for name, timing in zip(
                WAYS,
                (await bare(items), await supervised(as_it_is, items), await supervised(plain, items)),
                strict=True,
            ):
                if number >= 0:
                    timings[name].append(timing)
    finally:
        await as_it_is.close()
        await plain.close()
    return [row(workload, name, count, timings) for name in WAYS]


def row(workload: str, name: str, count: int, timings: dict[str, list[Timing]]) -> dict[str, Any]:
    own, loop = timings[name], timings[WAYS[0]]
    by_cpu = [b.cpu / t.cpu for b, t in zip(loop, own, strict=True)]
    return {
        "workload": workload,
        "one process": name,
        "answers/s": round(count / statistics.median(t.wall for t in own)),
        "answers/cpu s": round(count / statistics.median(t.cpu for t in own)),
        "ratio to bare": round(statistics.median(b.wall / t.wall for b, t in zip(loop, own, strict=True)), 2),
        "ratio, cpu": round(statistics.median(by_cpu), 2),
        "lowest": round(min(by_cpu), 2),
        "highest": round(max(by_cpu), 2),
        "parent us/item": round(1e6 * statistics.median(t.parent for t in own) / count),
        "correct": sum(t.correct for t in own),
        "of": len(own) * count,
    }


async def recovery(deadline_s: float) -> dict[str, float]:
    """Poison among good answers on two processes: when everything was graded, when all processes stood again."""
    items = [*items_of(0, 40), *[GradingItem(completion=f"\\boxed{{{poison}}}", gold="5") for poison in POISON]]
    random.Random(0).shuffle(items)
    processes = GradingProcesses(VerifierSpec(processes=2, deadline_s=deadline_s))
    await processes.start()
    try:
        started = time.perf_counter()
        gradings = await processes.grade_many(items)
        graded = time.perf_counter()
        await _whole(processes, 3)
        whole = time.perf_counter()
        kills = processes.stats().killed
        for pid in processes.pids():
            os.kill(pid, signal.SIGKILL)
        killed = time.perf_counter()
        await processes.grade_many(items_of(1, 1))
        back = time.perf_counter()
        await _whole(processes, 3)
        all_back = time.perf_counter()
    finally:
        await processes.close()
    assert [grading.verdict for grading in gradings].count(Verdict.ERROR) == len(POISON)
    rounds = kills / 2  # two processes die side by side
    return {
        f"{len(POISON)} poison answers, {kills} kills at a deadline of {deadline_s:g} s: all graded after, s": (
            graded - started
        ),
        "of that, per kill beyond its deadline, s": (graded - started) / rounds - deadline_s,
        "processes and spare whole again after the last grading, s": whole - graded,
        "all three processes killed while idle: next grading after, s": back - killed,
        "all three processes killed while idle: whole again after, s": all_back - killed,
    }


async def _whole(processes: GradingProcesses, count: int) -> None:
    deadline = time.monotonic() + 60
    while processes.stats().live < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not {count} grading processes within 60 s")
        await asyncio.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--deadline", type=float, default=5.0)
    options = parser.parse_args()
    fast, mixed = WORKLOADS
    rows = [
        *asyncio.run(throughput(fast, options.rounds, options.items)),
        *asyncio.run(throughput(mixed, options.rounds, options.items // 10)),
    ]
    report("verifier", rows, asyncio.run(recovery(options.deadline)))


if __name__ == "__main__":
    main()
