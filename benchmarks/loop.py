"""Does overlapping generation with training hide the shorter of the two?

Trains the same job twice in one run of this script, with one rollout worker and one learner rank (a core each on a
two-core machine): synchronously, which gives the times of generation and of training by themselves, and with
max_staleness 1, whose step time is compared with the larger of the two and with their sum.

    python benchmarks/loop.py [--steps 12]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

from report import report

from sapo_ray.temporary import temporary_folder

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
PHASES = ("generation", "training", "publish")
WARM_UP = 2
"""First steps, left out: engines warm up in them."""


def step_seconds(staleness: int, steps: int, folder: Path) -> dict[str, float]:
    """Median seconds per step of each phase and of the whole step."""
    from sapo_ray.config.load import load_job
    from sapo_ray.driver.run import train

    job = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    settings = {
        "run_dir": folder / f"staleness-{staleness}",
        "steps": steps,
        "rollout.max_staleness": staleness,
        "rollout.workers": 1,
        "learner.ranks": 1,
        "learner.epochs": 3,  # makes training about as long as generation, where overlapping has most to gain
        "verifier.processes": 1,
        "evaluation.data": "[]",
        "checkpoint.every": 0,
    }
    train(load_job(job, [f"{key}={value}" for key, value in settings.items()]))
    rows = [json.loads(line) for line in (Path(settings["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    medians = {"step": statistics.median(row["seconds/step"] for row in rows[WARM_UP:])}
    for phase in PHASES:
        totals = [row[f"seconds/all_{phase}"] for row in rows]
        medians[phase] = statistics.median(b - a for a, b in zip(totals[WARM_UP - 1 :], totals[WARM_UP:], strict=False))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with temporary_folder() as folder:
        synchronous = step_seconds(0, arguments.steps, folder)
        overlapped = step_seconds(1, arguments.steps, folder)
    generation, training = synchronous["generation"], synchronous["training"]
    report(
        "loop",
        [
            {"what": "synchronous: generation", "seconds": generation},
            {"what": "synchronous: training", "seconds": training},
            {"what": "synchronous: publish", "seconds": synchronous["publish"]},
            {"what": "synchronous: step", "seconds": synchronous["step"]},
            {"what": "overlapped: waiting for the batch", "seconds": overlapped["generation"]},
            {"what": "overlapped: training", "seconds": overlapped["training"]},
            {"what": "overlapped: step", "seconds": overlapped["step"]},
        ],
        {
            "overlapped step / max(generation, training)": overlapped["step"] / max(generation, training),
            "overlapped step / (generation + training)": overlapped["step"] / (generation + training),
        },
    )


if __name__ == "__main__":
    main()
