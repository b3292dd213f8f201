"""`sapo-ray diagnose`: of a job through the service, of a run by its folder."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scripted_service import JOB_ID, Service, reply, serving
from typer.testing import CliRunner, Result

from sapo_ray.cli import app
from sapo_ray.diagnosis import run_dir
from sapo_ray.diagnosis.vitals import FILE, Vitals

DIAGNOSIS = {
    "verdict": "stalled",
    "component": "rollout-0",
    "summary": "rollout-0: no progress for 41 s where 1.2 s is usual: sampling 16 completions",
    "since": "2026-11-23T10:15:00Z",
    "remedy": "look at its log",
    "cause": {
        "code": "silent",
        "component": "rollout-0",
        "text": "no progress",
        "time": "2026-11-23T10:15:00Z",
        "log": "rollout-0.log",
        "lines": ["INFO [ready]"],
    },
    "components": [],
    "notes": ["VerifierErrors: rate 0.08"],
    "of_tomorrow": 1,
}


def invoke(*arguments: str, url: str = "http://127.0.0.1:1") -> Result:
    environment = {"COLUMNS": "80", "SAPO_URL": url, "SAPO_API_KEY": "sapo_key"}
    return CliRunner(env=environment).invoke(app, ["diagnose", *arguments])


def journalled(folder: Path, *events: dict[str, Any], attempt: int = 1) -> Path:
    lines = [{"time": time.time() - 60, "attempt": attempt, "seq": seq, **event} for seq, event in enumerate(events, 1)]
    ledger = {"time": 1.0, "attempt": attempt, "kind": "issued", "group": "a:1:0"}
    (folder / "journal.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (*lines, ledger)) + '{"torn')
    return folder


def test_a_run_is_running_though_its_journal_is_longer_than_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dir, "JOURNAL_BYTES", 2000)
    steps = [{"kind": "step", "step": step, "steps": 60, "metrics": {}} for step in range(1, 41)]
    journalled(tmp_path, {"kind": "transition", "state": "running"}, *steps)
    known = run_dir.evidence(tmp_path, time.time())
    assert (known.state, known.step, known.steps) == ("running", 40, 60)


def test_a_job_is_diagnosed_by_its_service() -> None:
    with serving(Service()) as service:
        service.on(f"GET /v1/jobs/{JOB_ID}/diagnosis", reply(DIAGNOSIS))
        result = invoke(JOB_ID, url=service.url)
        assert result.exit_code == 1
        for text in (DIAGNOSIS["summary"], "to do    look at its log", "INFO [ready]", "note     VerifierErrors"):
            assert str(text) in result.stdout
        assert json.loads(invoke(JOB_ID, "--json", url=service.url).stdout)["component"] == "rollout-0"


def test_a_run_that_succeeded_needs_nothing(tmp_path: Path) -> None:
    step = {"kind": "step", "step": 5, "steps": 5}
    end = {"kind": "transition", "state": "succeeded", "reason": "all steps were taken"}
    result = invoke(str(journalled(tmp_path, step, end)))
    assert (result.exit_code, result.stdout.split()[0]) == (0, "ended"), result.stdout


def test_a_run_that_failed_names_its_part_and_what_its_log_says(tmp_path: Path) -> None:
    lost = {"kind": "worker", "what": "worker_lost", "worker": "rollout-0", "reason": "rollout-0 died (start): gone"}
    end = {"kind": "transition", "state": "failed", "reason": "TrainingFailed: no rollout worker is left"}
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rollout-0.log").write_text("MemoryError: 3 GiB\n")
    result = invoke(str(journalled(tmp_path, lost, end)), "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["component"], found["cause"]["code"]) == (1, "rollout-0", "out_of_memory")


@pytest.mark.parametrize("alive", [True, False])
def test_a_driver_that_was_killed_is_told_from_one_that_hangs(tmp_path: Path, alive: bool) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    written = time.time() - 40
    record = Vitals(
        attempt=1, pid=os.getpid() if alive else ended.pid, host=platform.node(), written=written, loop=written,
        phase="training", ended=False, components=(),
    )  # fmt: skip
    (tmp_path / FILE).write_text(record.as_json())
    found = json.loads(invoke(str(journalled(tmp_path, {"kind": "transition", "state": "running"})), "--json").stdout)
    assert (found["verdict"], found["component"]) == ("stalled" if alive else "failed", "driver")
    assert ("was killed" in found["summary"]) is not alive


def test_what_is_neither_a_job_nor_a_run_is_one_line(tmp_path: Path) -> None:
    result = invoke(str(tmp_path))
    assert result.exit_code == 1
    assert "is not a run directory" in result.stderr
    result = invoke("job-nonsense")
    assert "is not a run directory" in result.stderr
