"""A driver as a control plane starts it, up to the engines: assignment, attempt, job, secrets, exit codes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_control import TOKEN, FakeControl, orders
from fakes import job

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver import main as drivers
from sapo_ray.driver import run as runs
from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.journal import Journal, read_journal
from sapo_ray.driver.orders import Ended
from sapo_ray.driver.rundir import begin_attempt, hold, write_spec
from sapo_ray.errors import NoRoom, Superseded, WorkerLost


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeControl]:
    monkeypatch.setenv("SAPO_LINK_INTERVAL_S", "0.05")
    monkeypatch.setenv("SAPO_LINK_REFUSED_S", "0.3")
    monkeypatch.setattr(drivers, "RETRY_S", 0.05)
    (tmp_path / "token").write_text(TOKEN + "\n")
    control = FakeControl(assignment={"run_dir": str(tmp_path / "run"), "spec": job().model_dump(mode="json")}).start()
    handler = signal.getsignal(signal.SIGTERM)
    yield control
    signal.signal(signal.SIGTERM, handler)
    control.stop()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[JobSpec]:
    """In place of engines: the jobs that would have been trained."""
    jobs: list[JobSpec] = []

    def trains(attempt: Attempt, _: Any) -> Any:
        jobs.append(attempt.spec)
        raise Ended("paused")

    monkeypatch.setattr(runs, "train_and_export", trains)
    return jobs


def start(control: FakeControl, folder: Path, attempt: int = 1) -> int:
    where = ["--job", "job-1", "--attempt", str(attempt), "--control", control.url]
    return drivers.main([*where, "--token-file", str(folder / "token")])


def ends(control: FakeControl, attempt: int = 1) -> list[tuple[str, str]]:
    return [(event["state"], event["reason"]) for event in control.events(attempt) if "reason" in event]


def test_the_assigned_job_is_run_under_its_number_and_its_end_is_heard(
    control: FakeControl, tmp_path: Path, trained: list[JobSpec]
) -> None:
    assert start(control, tmp_path, attempt=3) == 0
    assert [(spec.steps, spec.run_dir) for spec in trained] == [(3, str(tmp_path / "run"))]
    assert (tmp_path / "run" / "attempt").read_text() == "3\n"
    first, last = control.events(3)
    assert (first["state"], last["state"]) == ("starting", "paused")
    assert last["result"] == json.loads((tmp_path / "run" / "result.json").read_text())
    assert last["result"]["status"] == "paused"


def test_an_assignment_is_asked_for_until_it_comes(
    control: FakeControl, tmp_path: Path, trained: list[JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    control.faults.extend(["503", "proxy", "nonsense", "login", "login", "login", "refused", "429"])
    assert start(control, tmp_path) == 0
    monkeypatch.setattr(drivers, "ASSIGNMENT_S", 0.2)
    control.stop()
    assert start(control, tmp_path, attempt=2) == drivers.NO_ASSIGNMENT
    control.start()


def test_a_driver_that_is_not_wanted_leaves_the_run_alone(
    control: FakeControl, tmp_path: Path, trained: list[JobSpec]
) -> None:
    control.newest = 2
    assert start(control, tmp_path) == drivers.SUPERSEDED
    (tmp_path / "token").write_text("another")
    assert start(control, tmp_path, attempt=2) == drivers.SUPERSEDED
    assert not (tmp_path / "run").exists()
    assert not trained


def test_a_token_that_is_refused_while_it_trains_ends_the_attempt_with_a_checkpoint_and_its_own_exit_code(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trains(attempt: Attempt, _: Any) -> Any:
        by = attempt.orders
        control.faults.extend(["refused"] * 10_000)
        end = time.monotonic() + 20
        while by.ending is None:
            by.check()
            assert time.monotonic() < end
            time.sleep(0.001)
        raise Ended(by.ending)

    monkeypatch.setattr(runs, "train_and_export", trains)
    assert start(control, tmp_path) == drivers.SUPERSEDED
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "paused"
    records = list(read_journal(tmp_path / "run" / "journal.jsonl"))
    assert [record.get("state", record.get("condition")) for record in records] == [
        "starting",
        "TokenRefused",
        "paused",
    ]


def test_an_attempt_number_is_begun_once_and_never_below_the_newest(tmp_path: Path) -> None:
    begin_attempt(tmp_path, 4)
    begin_attempt(tmp_path, 4)  # nothing was journalled under it yet
    journal = Journal(tmp_path / "journal.jsonl", 4)
    journal.event("transition", state="starting", text="x" * 100_000)
    journal.close()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"torn')
    with pytest.raises(Superseded, match=r"attempt 4 of .* had begun before"):
        begin_attempt(tmp_path, 4)
    with pytest.raises(Superseded, match=r"attempt 3 of .* was superseded: attempt 4 has the run"):
        begin_attempt(tmp_path, 3)
    assert (tmp_path / "journal.jsonl").read_text().endswith('{"torn'), "it may be another's, in mid-write"
    begin_attempt(tmp_path, 5)
    assert (tmp_path / "attempt").read_text() == "5\n"


def test_a_job_that_this_version_refuses_fails_where_its_user_sees_it(control: FakeControl, tmp_path: Path) -> None:
    control.assignment["spec"] = control.assignment["spec"] | {"stepz": 3}
    assert start(control, tmp_path) == drivers.FAILED
    ((state, reason),) = ends(control)
    assert state == "failed"
    assert "stepz" in reason


def test_a_resumed_job_keeps_its_recipe_and_may_have_another_name_and_other_workers(
    control: FakeControl, tmp_path: Path, trained: list[JobSpec]
) -> None:
    assert start(control, tmp_path) == 0
    control.newest, control.orders = 2, orders(rollout_workers=3)
    control.assignment["spec"] = job(name="renamed").model_dump(mode="json")
    assert start(control, tmp_path, attempt=2) == 0
    assert [(spec.name, spec.rollout.workers) for spec in trained] == [("job", 1), ("job", 3)]
    assert control.events(2)[0]["changes"] == ["rollout.workers"]

    control.newest = 3
    control.assignment["spec"] = job(seed=9).model_dump(mode="json")
    assert start(control, tmp_path, attempt=3) == drivers.FAILED
    assert "a resumed run cannot change seed" in ends(control, 3)[0][1]


def test_secrets_are_in_the_environment_of_the_driver_and_nowhere_else(
    control: FakeControl,
    tmp_path: Path,
    trained: list[JobSpec],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JOB_SECRET", "before")
    control.assignment["secrets"] = {"JOB_SECRET": "s3cr3t-value"}
    assert start(control, tmp_path) == 0
    assert os.environ["JOB_SECRET"] == "s3cr3t-value"
    written = "".join(path.read_text() for path in (tmp_path / "run").iterdir() if path.is_file())
    out, err = capfd.readouterr()
    for secret in ("s3cr3t-value", TOKEN):
        assert secret not in written + out + err + json.dumps(control.events())


@pytest.mark.parametrize("error", [WorkerLost, ValueError])
def test_a_secret_that_an_error_message_brings_along_is_masked_wherever_it_would_be_written(
    control: FakeControl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: type[Exception],
) -> None:
    def trains(attempt: Attempt, _: Any) -> Any:
        attempt.journal.event(
            "condition", condition="Odd", reason="sent s3cr3t-value", more=[{"header": 's3cr3t-"value"'}]
        )
        raise error("401 for token s3cr3t-value")

    monkeypatch.setattr(runs, "train_and_export", trains)
    values = {"HF_TOKEN": "s3cr3t-value", "QUOTED": 's3cr3t-"value"', "SHORT": "on"}
    for name in values:
        monkeypatch.setenv(name, "before")
    control.assignment["secrets"] = values
    control.assignment["spec"] = job(secrets=list(values)).model_dump(mode="json")
    assert start(control, tmp_path) == drivers.FAILED
    written = "".join(path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file())
    out, err = capfd.readouterr()
    assert "s3cr3t" not in written + out + err + json.dumps(control.events())
    assert control.events()[-1]["reason"] == f"{error.__name__}: 401 for token ***"
    odd = next(event for event in control.events() if event["kind"] == "condition")
    assert (odd["reason"], odd["more"]) == ("sent ***", [{"header": "***"}])


@pytest.mark.parametrize(("error", "state"), [(WorkerLost("rank 0 died"), "interrupted"), (ValueError("x"), "failed")])
def test_an_end_that_another_attempt_may_outlive_is_told_from_one_that_it_would_repeat(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    def trains(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(runs, "train_and_export", trains)
    assert start(control, tmp_path) == drivers.FAILED
    assert ends(control) == [(state, f"{type(error).__name__}: {error}")]


def test_a_learner_without_room_is_waited_for_by_further_attempts_but_not_by_the_first(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trains(*_: Any) -> Any:
        raise NoRoom("no room for learner.ranks: 2")

    monkeypatch.setattr(runs, "train_and_export", trains)
    assert start(control, tmp_path) == drivers.FAILED
    control.newest = 2
    assert start(control, tmp_path, attempt=2) == drivers.FAILED
    reason = "NoRoom: no room for learner.ranks: 2"
    assert [ends(control, number) for number in (1, 2)] == [[("failed", reason)], [("interrupted", reason)]]


def test_a_driver_superseded_while_it_trains_leaves_result_and_journal_to_the_next(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "run" / "result.json"

    def trains(attempt: Attempt, _: Any) -> Any:
        result.write_text("of attempt 2")
        control.newest = 2
        while True:
            attempt.journal.event("phase", phase="train")
            time.sleep(0.001)

    monkeypatch.setattr(runs, "train_and_export", trains)
    assert start(control, tmp_path) == drivers.SUPERSEDED
    assert result.read_text() == "of attempt 2"
    records = list(read_journal(tmp_path / "run" / "journal.jsonl"))
    assert [record["state"] for record in records if record["kind"] == "transition"] == ["starting"]


def test_a_run_that_its_last_driver_does_not_let_go_of_is_not_touched(
    control: FakeControl, tmp_path: Path, trained: list[JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drivers, "PREDECESSOR_S", 0.1)
    write_spec(tmp_path / "run", job())
    with hold(tmp_path / "run"):
        assert start(control, tmp_path) == drivers.FAILED
    assert not trained
    assert not (tmp_path / "run" / "journal.jsonl").exists()
