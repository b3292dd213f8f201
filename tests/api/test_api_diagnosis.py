"""`GET /v1/jobs/{id}/diagnosis`: from what the driver delivered and wrote down, for the tenant's own jobs only."""

from __future__ import annotations

import os
import time
from pathlib import Path

from api_parts import deliver, problem, run_dir, started, submitted
from starlette.testclient import TestClient

from sapo_ray.control.store import Store
from sapo_ray.diagnosis.vitals import FILE, Component, Vitals

OOM = "torch.OutOfMemoryError: CUDA out of memory."
LOST = {"kind": "worker", "what": "worker_lost", "worker": "rollout-0", "reason": "rollout-0 died (sample group a)"}


def write_vitals(folder: Path, *, quiet: float, age: float = 0.0) -> None:
    now = time.time()
    part = Component(
        name="rollout-0", kind="sample", task="sampling 16 completions", since=now - quiet, progress=now - quiet,
        usual=1.2, patience=15.0,
    )  # fmt: skip
    record = Vitals(
        attempt=1, pid=os.getpid(), host="h", written=now - age, loop=now - age, phase="generation", ended=False,
        components=(part,),
    )  # fmt: skip
    (folder / FILE).write_text(record.as_json())


def test_a_queued_job_waits_for_its_turn(acme: TestClient) -> None:
    submitted(acme)
    found = acme.get(f"/v1/jobs/{submitted(acme)}/diagnosis").json()
    assert (found["verdict"], found["component"]) == ("waiting", "queue")
    assert "place 2" in found["summary"]


def test_a_running_job_names_the_part_that_does_not_get_on_with_the_last_lines_of_its_log(
    acme: TestClient, store: Store
) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    deliver(acme, job_id, token, 1, {"kind": "transition", "state": "running"})
    folder = run_dir(store, job_id)
    write_vitals(folder, quiet=2.0)
    assert acme.get(f"/v1/jobs/{job_id}/diagnosis").json()["verdict"] == "healthy"
    write_vitals(folder, quiet=30.0)
    (folder / "logs").mkdir()
    (folder / "logs" / "rollout-0.log").write_text("INFO engine is ready; Authorization: Bearer abc\n")
    found = acme.get(f"/v1/jobs/{job_id}/diagnosis").json()
    assert (found["verdict"], found["component"]) == ("stalled", "rollout-0")
    assert found["cause"]["lines"] == ["INFO engine is ready; Authorization: [hidden]"]
    write_vitals(folder, quiet=30.0, age=25.0)
    found = acme.get(f"/v1/jobs/{job_id}/diagnosis").json()
    assert found["component"] == "storage", "the driver was heard a moment ago, and does not write"


def test_a_failed_job_names_what_failed_first(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    folder = run_dir(store, job_id)
    (folder / "logs").mkdir()
    (folder / "logs" / "rollout-0.log").write_text(f"Traceback (most recent call last):\n{OOM}\n")
    end = {"kind": "transition", "state": "failed", "reason": "TrainingFailed: no rollout worker is left"}
    deliver(acme, job_id, token, 1, LOST, {**LOST, "worker": "rollout-0.1"}, end)
    found = acme.get(f"/v1/jobs/{job_id}/diagnosis").json()
    assert (found["verdict"], found["component"], found["cause"]["code"]) == ("failed", "rollout-0", "out_of_memory")
    assert found["cause"]["lines"][-1] == OOM
    assert found["remedy"]


def test_files_that_are_damaged_missing_or_links_cost_nothing_but_what_they_would_have_told(
    acme: TestClient, store: Store, tmp_path: Path
) -> None:
    job_id = submitted(acme)
    deliver(acme, job_id, started(store, job_id), 1, LOST, {"kind": "transition", "state": "failed", "reason": ""})
    folder = run_dir(store, job_id)
    (folder / FILE).write_text('{"components": 3')
    (folder / "logs").mkdir()
    secret = tmp_path / "secret"
    secret.write_text("not for you")
    (folder / "logs" / "driver.log").symlink_to(secret)
    answer = acme.get(f"/v1/jobs/{job_id}/diagnosis")
    assert answer.status_code == 200
    assert "not for you" not in answer.text


def test_a_diagnosis_is_for_the_jobs_tenant_alone(acme: TestClient, rival: TestClient) -> None:
    job_id = submitted(acme)
    problem(rival.get(f"/v1/jobs/{job_id}/diagnosis"), 404, "not_found")
    problem(acme.get("/v1/jobs/job-22222222222222222222/diagnosis"), 404, "not_found")
