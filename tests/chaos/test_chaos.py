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

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

SEED = 20261123


def test_whatever_is_killed_stopped_or_damaged_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    run = ChaosRun(tmp_path, ("steps=400", "rollout.workers=2", "rollout.group_deadline_s=40"))

    def a_moment() -> None:
        time.sleep(chance.uniform(0.0, 2.0))

    try:
        run.train()
        run.until(lambda: run.step() >= 1, "the first step", 600)
        for role in ("rollout", "grader", "verifier"):
            a_moment()
            assert run.kill(role, chance.choice), role
            run.steps_on()
        run.until(lambda: len(run.events("worker_ready")) == 3, "the worker's replacement", 600)
        a_moment()
        assert run.kill("rollout", chance.choice, signal.SIGSTOP)
        run.until(lambda: len(run.events("worker_lost")) == 2, "the stopped worker to be noticed", 200)
        run.steps_on()
        a_moment()
        run.kill_driver()
        run.audited()

        run.faults = {"CHAOS_DAMAGE": f"rollout-1@{run.step() + 2}"}
        run.resume(f"steps={run.step() + 8}")
        assert run.end(900) == 0, run.log.read_text()[-4000:]
    finally:
        if run.process.poll() is None:
            run.process.kill()

    report = run.audited()
    assert report.totals["lost"] == report.totals["doubled"] == 0
    assert report.totals["outstanding"] == 0
    assert (report.totals["attempts"], report.totals["rollbacks"]) == (2, 1)
    lost = run.events("worker_lost")
    assert {row["attempt"] for row in lost} == {1, 2}
    refused = [row for row in run.events("takeover_failed") if row["attempt"] == 2]
    assert [row["worker"] for row in refused] == ["rollout-1"]
    assert "arrived damaged" in refused[0]["reason"]
    assert json.loads((run.run_dir / "result.json").read_text())["status"] == "succeeded"
