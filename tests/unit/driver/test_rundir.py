from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import job

from sapo_ray.driver import run
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.result import finished_steps
from sapo_ray.driver.rundir import hold, new_run_dir, next_attempt, stop_if_superseded, superseded, write_spec
from sapo_ray.driver.tracking import MetricsFile
from sapo_ray.errors import CheckpointError, ConfigError, SapoRayError, Superseded


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    spec = job(run_dir=str(tmp_path))
    write_spec(tmp_path, spec)
    assert new_run_dir(spec) == tmp_path, "a job that failed before its first step may be mended and sent again"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"holds a run already; go on with it by `sapo-ray resume"):
        new_run_dir(spec)


@pytest.mark.parametrize("text", ["", '{"steps": 3', "[]", "\xff", '{"steps": -1}', '{"steps": 1, "modle": {}}'])
def test_a_damaged_job_in_a_run_directory_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "spec.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SapoRayError, match=r"spec\.json cannot be read|stored job"):
        run.resume(tmp_path, [])


@pytest.mark.parametrize("text", ["", "two"])
def test_a_damaged_attempt_number_is_an_error_that_says_what_to_write(tmp_path: Path, text: str) -> None:
    (tmp_path / "attempt").write_text(text)
    for ask in (lambda: next_attempt(tmp_path), lambda: superseded(tmp_path, 1)):
        with pytest.raises(CheckpointError, match=r"attempt cannot be read .*write the number of the newest attempt"):
            ask()


def test_two_processes_cannot_write_to_one_run(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from sapo_ray.driver.rundir import hold\n"
    code += "with hold(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    try:
        with (
            pytest.raises(CheckpointError, match=rf"another process \(pid {other.pid}\) is writing to"),
            hold(tmp_path),
        ):
            pass
    finally:
        other.kill()
        other.communicate()
    with hold(tmp_path):
        pass  # the lock went with the killed process


def test_attempts_count_up_and_supersede_each_other(tmp_path: Path) -> None:
    assert [next_attempt(tmp_path), next_attempt(tmp_path)] == [1, 2]
    assert superseded(tmp_path, 1)
    assert not superseded(tmp_path, 2)


def test_a_driver_that_finds_itself_superseded_writes_nothing_from_then_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", next_attempt(tmp_path))
    journal.event("phase", phase="train")
    stop_if_superseded(tmp_path, journal)
    next_attempt(tmp_path)
    with pytest.raises(Superseded, match=r"attempt 1 of .* was superseded by a later one"):
        stop_if_superseded(tmp_path, journal)
    with pytest.raises(Superseded):
        journal.sync_now()
    assert journal.path.read_bytes() == b""


def test_metrics_of_an_abandoned_lineage_are_taken_out_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.log(step, {"loss": step / 10})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    second = MetricsFile(path, 2)
    second.log(3, {"loss": 9.0})
    second.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
        {"step": 3, "loss": 9.0},
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "succeeded"}', '{"status": "succeeded", "steps": null}'])
def test_a_damaged_result_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"result\.json is damaged"):
        finished_steps(tmp_path)
