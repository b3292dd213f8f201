"""Is anything lost or doubled when processes are killed at random, and what does a death cost?

One run of three rollout workers on the tiny model, one step ahead, over any number of goes of some minutes each. A go
kills (SIGKILL) grading processes, rollout workers, verifiers, the learner and the driver at random moments, and ends
with the driver's death; the next one goes on where it was. The auditor reads the whole journal after each attempt.

    round    all three up --> some steps --> one worker killed and left alone --> some steps --> grading processes
             killed until its replacement is there --> rollout workers and others killed, one step between two -->
             the learner killed

    capacity      from the SIGKILL of a worker that was left alone (no other worker, learner or driver is killed until
                  then) to the `worker_ready` of the one that takes its place
    throughput    tokens a second of steps during which nothing was killed, with all three workers up, and with two and
                  the third's replacement starting beside them on the same cores
    memory        resident size of the driver over its longest attempt without its first minute: slope by least squares
                  and its standard error

    python benchmarks/soak.py FOLDER [--minutes 7] [--kills 200] [--seed 1] [--rounds-per-driver 0]
    python benchmarks/soak.py FOLDER --finish         # three steps more, to the run's end, and the last audit

What was killed is written to FOLDER as it happens, results/soak.json after each go.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from report import report

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "chaos"), str(TESTS / "integration")]

if TYPE_CHECKING:
    from chaos_run import ChaosRun

    from sapo_ray.audit import Report

WORKERS = 3
STEPS = 1_000_000
"""Never reached: the run goes on until it is told to finish, and may be taken up again after that."""
QUIET_STEPS = 6
"""With all workers, and with one fewer, of each round; nothing is killed meanwhile."""
BURST = 6
"""Kills of a round that wait for nothing but a step."""
BURST_WEIGHTS = {"rollout": 4.0, "grader": 1.0, "verifier": 2.0}
WARM_UP_S = 60.0
Row = dict[str, Any]


class Go:
    """Some minutes of kills of the run in a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        from campaign import Campaign

        self.path = folder / f"go-{len(list(folder.glob('go-*.json')))}.json"
        self.run = run_of(folder)
        self.campaign = Campaign(self.run, seed, WORKERS)
        self.alone: list[tuple[float, str]] = []
        self.load: list[float] = []
        self.began = self.end = time.time()

    def go(self, seconds: float, kills: int, rounds_per_driver: int) -> Report:
        """Rounds for so long after the first step, or until so many kills; then the driver."""
        campaign, run, rounds = self.campaign, self.run, 0
        campaign.begin(partial(run.resume, f"steps={STEPS}") if run.run_dir.exists() else run.train)
        self.end = time.time() + seconds
        try:
            while time.time() < self.end and campaign.kills.total() < kills:
                self.round()
                rounds += 1
                if rounds_per_driver and rounds % rounds_per_driver == 0:
                    campaign.strike("driver")
                self.save()
            campaign.watch(campaign.chance.uniform(0.0, 2.0))
            campaign.hit("driver")
            run.gone()
        finally:
            self.save()
        return run.audited()

    def round(self) -> None:
        """See the module's text."""
        campaign, run, chance = self.campaign, self.run, self.campaign.chance
        self.until_full()
        run.steps_on(QUIET_STEPS)
        campaign.watch(chance.uniform(0.0, 1.0))
        if victim := campaign.hit("rollout"):
            self.alone.append((campaign.struck[-1][0], victim))
            run.steps_on(QUIET_STEPS)
            self.until_full()
        for _ in range(BURST if time.time() < self.end else 0):
            campaign.watch(chance.uniform(0.0, 1.0))
            [fault] = chance.choices(list(BURST_WEIGHTS), list(BURST_WEIGHTS.values()))
            if fault == "rollout" and len(run.workers_ready()) < 2:
                fault = "grader"
            campaign.hit(fault)
            run.steps_on(1)
        campaign.watch(chance.uniform(0.0, 1.0))
        campaign.strike("learner")
        run.steps_on(1)
        self.load.append(psutil.getloadavg()[0])

    def until_full(self) -> None:
        """Kill grading processes until all rollout workers are there; a step is taken between two, for a run whose
        grading processes all die while they start has no verdicts, and ends."""
        while len(self.run.workers_ready()) < WORKERS:
            self.campaign.watch(self.campaign.chance.uniform(0.0, 1.0))
            self.campaign.strike("grader")
            self.run.steps_on(1)

    def save(self) -> None:
        """All that is not in the run's journal."""
        content = {
            "struck": self.campaign.struck,
            "alone": self.alone,
            "memory": self.campaign.memory,
            "load": self.load,
            "seconds": time.time() - self.began,
        }
        self.path.write_text(json.dumps(content))


def run_of(folder: Path) -> ChaosRun:
    """The run of a soak."""
    from chaos_run import ChaosRun

    settings = (f"steps={STEPS}", f"rollout.workers={WORKERS}", "rollout.group_deadline_s=60")
    return ChaosRun(folder, settings, faults={"CHAOS_REPLACEMENTS": "1000000", "CHAOS_RESTARTS": "1000000"})


def slot(worker: str) -> str:
    """`rollout-1` of `rollout-1.4`."""
    return worker.partition(".")[0]


def capacities(alone: list[tuple[float, str]], events: list[Row]) -> list[float]:
    """Seconds from each death to the slot's next worker."""
    seconds = []
    for when, victim in alone:
        next_one = (
            event["time"] - when
            for event in events
            if event["what"] == "worker_ready"
            and event["time"] > when
            and slot(event["worker"]) == slot(victim)
            and event["worker"] != victim
        )
        if (found := next(next_one, None)) is not None:
            seconds.append(found)
    return seconds


def notices(struck: list[tuple[float, str, str]], events: list[Row]) -> list[float]:
    """Seconds from the SIGKILL of a rollout worker to its `worker_lost`."""
    lost = [(event["worker"], event["time"]) for event in events if event["what"] == "worker_lost"]
    found = []
    for when, fault, victim in struck:
        after = [time - when for worker, time in lost if worker == victim and -0.05 <= time - when < 120]
        if fault == "rollout" and after:
            found.append(max(0.0, min(after)))
    return found


def throughput(steps: list[Row], events: list[Row], struck: list[tuple[float, str, str]]) -> dict[int, Row]:
    """Living workers -> tokens, seconds, and tokens a second of each undisturbed step with so many."""
    changes: list[tuple[float, int]] = []
    living: dict[int, set[str]] = {}
    for event in events:
        if event["what"] in ("worker_ready", "worker_lost"):
            now = living.setdefault(event["attempt"], set())
            (now.add if event["what"] == "worker_ready" else now.discard)(event["worker"])
            changes.append((event["time"], len(now)))
    times = [when for when, _ in changes] + [when for when, *_ in struck]
    found: dict[int, Row] = {}
    for step in steps:
        begin, end = step["time"] - step["metrics"]["seconds/step"], step["time"]
        before = [number for when, number in changes if when < begin]
        if before and not any(begin <= when <= end for when in times):
            of = found.setdefault(before[-1], {"tokens": 0.0, "seconds": 0.0, "steps": 0})
            of["tokens"] += step["metrics"]["rollout/tokens"]
            of["seconds"] += step["metrics"]["seconds/step"]
            of["steps"] += 1
    return found


def memory_slope(samples: list[tuple[int, float, int]]) -> tuple[float, float, float, float]:
    """(MB an hour, its standard error, MB at the end, minutes) of the driver in its longest attempt."""
    attempts: dict[int, list[tuple[float, float]]] = {}
    for attempt, when, resident in samples:
        attempts.setdefault(attempt, []).append((when, resident / 1e6))
    longest = max(attempts.values(), key=lambda rows: rows[-1][0] - rows[0][0])
    rows = [(when, size) for when, size in longest if when - longest[0][0] >= WARM_UP_S]
    if len(rows) < 3:
        return math.nan, math.nan, longest[-1][1], (longest[-1][0] - longest[0][0]) / 60
    return *slope_of(rows), rows[-1][1], (rows[-1][0] - rows[0][0]) / 60


def slope_of(rows: list[tuple[float, float]]) -> tuple[float, float]:
    """Of (seconds, value): the slope an hour by least squares, and its standard error."""
    whens, values = zip(*rows, strict=True)
    fit = statistics.linear_regression(whens, values)
    left = sum((value - fit.slope * when - fit.intercept) ** 2 for when, value in rows)
    error = math.sqrt(left / (len(rows) - 2)) / (statistics.pstdev(whens) * math.sqrt(len(rows)))
    return fit.slope * 3600, error * 3600


def row_of(name: str, values: list[float]) -> Row:
    """A row of the table."""
    ordered = sorted(values) or [math.nan]
    at: Callable[[int], float] = lambda share: ordered[min(len(ordered) - 1, len(ordered) * share // 100)]  # noqa: E731
    return {"seconds": name, "times": len(values), "median": at(50), "p90": at(90), "largest": ordered[-1]}


def tell(folder: Path, audited: Report) -> None:
    """Write results/soak.json, of all goes so far."""
    goes = [json.loads(path.read_text()) for path in sorted(folder.glob("go-*.json"))]
    struck = [tuple(one) for go in goes for one in go["struck"]]
    alone = [tuple(one) for go in goes for one in go["alone"]]
    memory = [tuple(one) for go in goes for one in go["memory"]]
    run = run_of(folder)
    events, kills, totals = run.journal("worker"), Counter(fault for _, fault, _ in struck), audited.totals
    rates = throughput(run.journal("step"), events, struck)
    nothing = {"tokens": math.nan, "seconds": math.nan, "steps": 0}
    full, fewer = rates.get(WORKERS, nothing), rates.get(WORKERS - 1, nothing)
    slope, error, resident, minutes = memory_slope(memory)
    load = [one for go in goes for one in go["load"]] or [math.nan]
    figures = {f"kills/{fault}": float(count) for fault, count in sorted(kills.items())} | {
        "kills": float(kills.total()),
        "minutes": sum(go["seconds"] for go in goes) / 60,
        "goes": float(len(goes)),
        "attempts": float(totals["attempts"]),
        "rollbacks": float(totals["rollbacks"]),
        "steps": float(totals["steps"]),
        "samples trained on": float(totals["samples"]),
        "findings of the audit": float(len(audited.findings)),
        "samples lost": float(totals["lost"] + totals["samples lost"]),
        "samples doubled": float(totals["doubled"] + totals["samples doubled"]),
        "tokens a second, three workers": full["tokens"] / full["seconds"],
        "tokens a second, two workers": fewer["tokens"] / fewer["seconds"],
        "steps with three workers": float(full["steps"]),
        "steps with two workers": float(fewer["steps"]),
        "throughput kept with two of three": fewer["tokens"] / fewer["seconds"] * full["seconds"] / full["tokens"],
        "driver's memory, MB an hour": slope,
        "driver's memory, standard error of that": error,
        "driver's memory at the end, MB": resident,
        "minutes of its longest attempt": minutes,
        "load, median": statistics.median(load),
    }
    rows = [
        row_of("death of a worker left alone to full capacity", capacities(alone, events)),
        row_of("death of a worker to its loss being known", notices(struck, events)),
    ]
    report("soak", rows, figures)
    print(f"run: {run.run_dir}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=7.0, help="of rounds; the last one is finished")
    parser.add_argument("--kills", type=int, default=200, help="at most, in this go")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds-per-driver", type=int, default=0, help="the driver is killed after so many, too")
    parser.add_argument("--finish", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    options.folder.mkdir(parents=True, exist_ok=True)
    go = Go(options.folder, options.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    try:
        if options.finish:
            go.run.resume(f"steps={go.run.step() + 3}")
            assert go.run.end(900) == 0, go.run.log.read_text()[-4000:]
            audited = go.run.audited()
            assert audited.totals["outstanding"] == 0
        else:
            audited = go.go(60 * options.minutes, options.kills, options.rounds_per_driver)
    finally:
        go.run.kill_all()
    tell(options.folder, audited)


if __name__ == "__main__":
    main()
