"""Processes of a real run are killed, stopped and fed damaged weights at random moments; the auditor finds nothing.

The bounded form: one run, one fault of each kind, seeded. `make chaos` goes on for as long as it is told (long.py).
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from chaos_run import ChaosRun

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

SEED = 20261123


def test_whatever_is_killed_stopped_or_damaged_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    run = ChaosRun(tmp_path, ("steps=400", "rollout.workers=2"), faults={"CHAOS_HANG": "rollout-0@3"})

    def struck(role: str, number: int = signal.SIGKILL) -> None:
        time.sleep(chance.uniform(0.0, 1.0))
        assert run.kill(role, chance.choice, number), role

    try:
        run.train()
        run.until(lambda: run.events("worker_behind"), "a worker that hangs to be left behind", 600)
        run.steps_on(2)
        assert not run.events("worker_lost")
        run.living("rollout")["rollout-0"].resume()
        run.until(lambda: run.events("worker_caught_up"), "it to catch up")
        for role in ("rollout", "grader", "verifier", "learner"):  # the others while the first one's replacement starts
            struck(role)
            run.steps_on(1)
        struck("driver")
        run.gone()
        run.audited()

        run.faults = {"CHAOS_DAMAGE": f"rollout-1@{run.step() + 2}"}
        run.resume(f"steps={run.step() + 6}")
        assert run.end(900) == 0, run.log.read_text()[-4000:]
    finally:
        run.kill_all()

    report = run.audited()
    assert report.totals["lost"] == report.totals["doubled"] == 0
    assert report.totals["outstanding"] == 0
    assert (report.totals["attempts"], report.totals["rollbacks"]) == (2, 2)
    [behind], [back] = run.events("worker_behind"), run.events("worker_caught_up")
    assert behind["worker"] == back["worker"] == "rollout-0"
    assert {row["attempt"] for row in run.events("worker_lost")} == {1, 2}
    refused = [row for row in run.events("takeover_failed") if row["attempt"] == 2]
    assert [row["worker"] for row in refused] == ["rollout-1"]
    assert "arrived damaged" in refused[0]["reason"]
    assert json.loads((run.run_dir / "result.json").read_text())["status"] == "succeeded"
