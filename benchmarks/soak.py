"""Is anything lost or doubled when processes are killed at random, and what does a death cost?

One run of three rollout workers on the tiny model, one step ahead; grading processes, rollout workers, verifiers and
the driver are killed (SIGKILL) at random moments, some workers are stopped or slowed. The auditor counts what was lost
and doubled; times come from the journal:

    recovery      from `worker_lost` to the `worker_ready` of the worker that takes its place
    notice        from the kill to `worker_lost`
    throughput    tokens a second of steps that fell wholly into times with all three workers, and with exactly two. The
                  replacement starts beside them, on the same cores
    memory        resident size of the driver over the longest attempt, its slope by least squares after a minute

    python benchmarks/soak.py [--kills 200] [--minutes 60] [--seed 1]
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from report import report

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "chaos"), str(TESTS / "integration")]

WORKERS = 3
WARM_UP_S = 60.0


def slot(worker: str) -> str:
    """`rollout-1` of `rollout-1.4`."""
    return worker.partition(".")[0]


def recoveries(events: list[dict[str, Any]]) -> list[float]:
    """Seconds from each loss to the slot's next worker, within its attempt."""
    lost: dict[tuple[int, str], float] = {}
    seconds = []
    for event in events:
        key = (event["attempt"], slot(event["worker"]))
        if event["what"] == "worker_lost":
            lost.setdefault(key, event["time"])
        elif event["what"] == "worker_ready" and key in lost:
            seconds.append(event["time"] - lost.pop(key))
    return seconds


def notices(struck: list[tuple[float, str, str]], events: list[dict[str, Any]]) -> list[float]:
    """Seconds from the SIGKILL of a rollout worker to its `worker_lost`."""
    lost = [(event["worker"], event["time"]) for event in events if event["what"] == "worker_lost"]
    found = []
    for when, fault, victim in struck:
        after = [time - when for worker, time in lost if worker == victim and time >= when - 0.05]
        if fault == "rollout" and after:
            found.append(max(0.0, min(after)))
    return found


def throughput(steps: list[dict[str, Any]], events: list[dict[str, Any]]) -> dict[int, tuple[float, int]]:
    """Living workers -> (tokens a second, steps), over steps during which that number did not change."""
    changes: list[tuple[float, int, int]] = []
    living: dict[int, set[str]] = {}
    for event in events:
        if event["what"] in ("worker_ready", "worker_lost"):
            now = living.setdefault(event["attempt"], set())
            (now.add if event["what"] == "worker_ready" else now.discard)(event["worker"])
            changes.append((event["time"], event["attempt"], len(now)))
    tokens: Counter[int] = Counter()
    seconds: dict[int, float] = {}
    counts: Counter[int] = Counter()
    for step in steps:
        begin = step["time"] - step["metrics"]["seconds/step"]
        before = [number for time, attempt, number in changes if attempt == step["attempt"] and time < begin]
        within = [time for time, attempt, _ in changes if attempt == step["attempt"] and begin <= time <= step["time"]]
        if before and not within:
            tokens[before[-1]] += int(step["metrics"]["rollout/tokens"])
            seconds[before[-1]] = seconds.get(before[-1], 0.0) + step["metrics"]["seconds/step"]
            counts[before[-1]] += 1
    return {number: (tokens[number] / seconds[number], counts[number]) for number in sorted(seconds)}


def memory_slope(samples: list[tuple[int, float, int]]) -> tuple[float, float, float]:
    """(MB an hour, MB at the end, minutes) of the driver in its longest attempt."""
    attempts: dict[int, list[tuple[float, int]]] = {}
    for attempt, when, resident in samples:
        attempts.setdefault(attempt, []).append((when, resident))
    longest = max(attempts.values(), key=lambda rows: rows[-1][0] - rows[0][0])
    rows = [(when, resident) for when, resident in longest if when - longest[0][0] >= WARM_UP_S]
    if len(rows) < 3:
        return float("nan"), longest[-1][1] / 1e6, (longest[-1][0] - longest[0][0]) / 60
    fit = statistics.linear_regression([when for when, _ in rows], [resident / 1e6 for _, resident in rows])
    return fit.slope * 3600, rows[-1][1] / 1e6, (rows[-1][0] - longest[0][0]) / 60


def quantiles(name: str, values: list[float]) -> dict[str, Any]:
    """A row of the table."""
    ordered = sorted(values) or [float("nan")]
    at = {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 90)}
    return {"seconds": name, "times": len(values), **at, "largest": ordered[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0, help="at most")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

    from campaign import Campaign
    from chaos_run import ChaosRun

    folder = Path(tempfile.mkdtemp(prefix="sapo-soak-"))
    settings = ("steps=1000000", f"rollout.workers={WORKERS}", "rollout.group_deadline_s=60")
    run = ChaosRun(folder, settings, faults={"CHAOS_REPLACEMENTS": "1000000"})
    campaign = Campaign(run, options.seed, WORKERS)
    try:
        totals = campaign.go(60 * options.minutes, options.kills).totals
    finally:
        if run.process.poll() is None:
            run.process.kill()
    events = run.journal("worker")
    rates = throughput(run.journal("step"), events)
    slope, resident, minutes = memory_slope(campaign.memory)
    rows = [
        quantiles("worker lost to replacement ready", recoveries(events)),
        quantiles("SIGKILL to worker lost", notices(campaign.struck, events)),
    ]
    full, fewer = rates.get(WORKERS, (float("nan"), 0)), rates.get(WORKERS - 1, (float("nan"), 0))
    figures = {f"kills/{fault}": float(count) for fault, count in sorted(campaign.kills.items())}
    figures |= {
        "kills": float(campaign.kills.total()),
        "attempts": float(totals["attempts"]),
        "steps": float(totals["steps"]),
        "samples trained on": float(totals["samples"]),
        "samples lost": float(totals["lost"] + totals["samples lost"]),
        "samples doubled": float(totals["doubled"] + totals["samples doubled"]),
        "tokens a second, three workers": full[0],
        "tokens a second, two workers": fewer[0],
        "steps with three workers": float(full[1]),
        "steps with two workers": float(fewer[1]),
        "throughput kept with two of three": fewer[0] / full[0],
        "driver's memory, MB an hour": slope,
        "driver's memory at the end, MB": resident,
        "minutes of its longest attempt": minutes,
    }
    report("soak", rows, figures)
    print(f"run: {run.run_dir}")


if __name__ == "__main__":
    main()
