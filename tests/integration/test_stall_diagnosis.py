"""Faults injected into real runs, one after the other: the diagnosis names the part, and does so within a minute.

The first ones share a run that survives them. `benchmarks/diagnosis.py` runs all and keeps the table.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_run import ROOT
from fake_control import TOKEN, FakeControl
from patient import Patient, first_named, stopped
from small_disk import perhaps_small_disk

from sapo_ray.audit import audit
from sapo_ray.config.load import load_job
from sapo_ray.data.prompts import PromptSource
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.link import Link
from sapo_ray.driver.orders import StandingOrders
from sapo_ray.driver.pulse import Pulse
from sapo_ray.driver.wire import Wire
from sapo_ray.models.tokenizer import load_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]
long = pytest.mark.long


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patient]:
    """One run on a small disk of its own, where that can be mounted."""
    folder = tmp_path_factory.mktemp("patient")
    with perhaps_small_disk(folder, 400):
        patient = Patient(folder)
        patient.train()
        patient.gets_on()
        yield patient
        patient.end_now()
        assert audit(patient.run_dir).findings == []


# --- a run that goes on ----------------------------------------------------------------------------------------------


def test_a_rollout_worker_that_is_stopped_is_named_until_it_goes_on(patient: Patient) -> None:
    with stopped(patient.one("rollout")) as injected:
        found = patient.names("rollout worker stopped", "rollout-0", "stalled", injected)
    assert "no progress for" in found.summary
    patient.well()


def test_a_rollout_worker_that_is_killed_is_named_until_another_has_its_place(patient: Patient) -> None:
    injected = time.time()
    patient.one("rollout").kill()
    found = patient.names("rollout worker killed", "rollout-0", "waiting", injected)
    assert found.summary.endswith("rollout-0.1 is starting in its place"), found
    assert found.cause is not None
    assert found.cause.code == "worker_died"
    patient.well()


def test_a_verifier_that_is_killed_is_named_until_another_has_its_place(patient: Patient) -> None:
    injected = time.time()
    patient.one("verifier").kill()
    patient.names("verifier killed", "verifier-0", "waiting", injected)
    patient.well()


def test_a_learner_rank_that_is_killed_is_named_until_another_has_its_place(patient: Patient) -> None:
    injected = time.time()
    patient.one("learner").kill()
    found = patient.names("learner rank killed", "learner-0", "waiting", injected)
    assert "rank 0 died" in found.summary
    patient.well()


@long
def test_a_verifier_that_is_stopped_is_named_until_it_goes_on(patient: Patient) -> None:
    with stopped(patient.one("verifier")) as injected:
        patient.names("verifier stopped", "verifier-0", "stalled", injected)
    patient.well()


@long
def test_a_learner_rank_that_is_stopped_is_named_until_it_goes_on(patient: Patient) -> None:
    with stopped(patient.one("learner")) as injected:
        patient.names("learner rank stopped", "learner", "stalled", injected)
    patient.well()


@long
def test_a_grading_process_that_is_stopped_is_its_verifiers(patient: Patient) -> None:
    graders = list(patient.living("grader").values())
    injected = time.time()
    for grader in graders:  # which of them grades and which is the spare cannot be told from outside
        grader.suspend()
    patient.names("grading process stopped", "verifier-0", "stalled", injected)
    for grader in graders:
        grader.kill()
    patient.well()


@long
def test_a_reward_function_that_hangs_is_its_verifiers(patient: Patient) -> None:
    injected = time.time()
    patient.reward("3600")
    found = patient.names("reward function hangs", "verifier-0", "stalled", injected)
    assert "time it" in found.remedy
    patient.reward("0")
    for grader in patient.living("grader").values():
        grader.kill()
    patient.well()


@long
def test_a_driver_that_is_stopped_is_named_until_it_goes_on(patient: Patient) -> None:
    with stopped(patient.one("driver")) as injected:
        patient.names("driver stopped", "driver", "stalled", injected)
    patient.well()


def fill(file: Path) -> None:
    """Its file system, to the last byte."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as raw:
        while raw.write(bytes(1 << 20)):
            pass
    assert shutil.disk_usage(file.parent).free == 0


@long
def test_a_disk_that_is_full_is_named_until_there_is_room_again(patient: Patient) -> None:
    if not os.path.ismount(patient.folder):
        pytest.skip("a small file system cannot be mounted here")
    injected, filler = time.time(), patient.folder / "filler"
    fill(filler)
    try:
        found = patient.names("disk full", "storage", "stalled", injected)
        assert "free some space" in found.remedy
        patient.until(lambda: "the run holds" in patient.log.read_text(), "the hold")
    finally:
        filler.unlink()
    patient.well()


# --- the end of that run ---------------------------------------------------------------------------------------------


def test_a_driver_that_is_killed_and_then_a_checkpoint_that_was_damaged_are_named(patient: Patient) -> None:
    injected = time.time()
    assert patient.kill("driver") == "driver"
    patient.gone()
    found = patient.names("driver killed", "driver", "failed", injected)
    assert "was killed" in found.summary

    whole = patient.folder / "whole"
    shutil.copytree(patient.run_dir / "checkpoints", whole, symlinks=True)
    for weights in (patient.run_dir / "checkpoints").glob("step-*/learner/**/*.pt"):
        weights.write_bytes(b"damaged")
    injected = time.time()
    patient.resume()
    assert patient.end() == 1, patient.log.read_text()[-3000:]
    found = patient.names("checkpoint damaged", "checkpoint", "failed", injected)
    assert found.cause is not None
    assert (found.cause.code, "differs from its hash" in found.cause.text) == ("checkpoint_damaged", True)
    shutil.rmtree(patient.run_dir / "checkpoints")
    whole.rename(patient.run_dir / "checkpoints")


@long
def test_a_reward_function_that_raises_is_the_verifiers(patient: Patient) -> None:
    if patient.process.poll() is not None:
        patient.resume()
        patient.gets_on()
    injected = time.time()
    patient.reward("raise")
    found = patient.names("reward function raises", "verifier", "failed", injected)
    assert patient.end() == 1
    assert found.cause is not None
    assert (found.cause.code, "told to raise" in found.cause.text) == ("verifier", True)
    patient.reward("0")


# --- runs that do not begin, or do not last --------------------------------------------------------------------------


def begun(folder: Path, *settings: str, **faults: str) -> Patient:
    """A run that has a fault from its beginning."""
    patient = Patient(folder, *settings, **faults)
    patient.train()
    return patient


@long
def test_an_engine_without_memory_is_named_with_its_own_words(tmp_path: Path) -> None:
    run = begun(tmp_path, "rollout.kv_cache_mb=100000000")  # 100 TB
    found = run.names("engine out of memory", "rollout-0", "failed", run.began)
    assert run.end() == 1
    assert found.cause is not None
    assert found.cause.code == "out_of_memory", found
    assert "rollout.kv_cache_mb" in found.remedy


@long
def test_a_cluster_without_room_is_named(tmp_path: Path) -> None:
    run = begun(tmp_path, SAPO_ROLE_LABEL="sapo-ray.io/role")  # no node bears it
    found = run.names("no node for the learner and the workers", "cluster", "stalled", run.began)
    assert "making room for" in found.summary
    run.end_now()


@long
def test_a_model_whose_weights_are_damaged_is_named(tmp_path: Path, addition_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(addition_model, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    run = begun(tmp_path, f"model.path={model}")
    run.names("model file cut short", "model", "failed", run.began)
    assert run.end() == 1


@long
def test_data_that_are_gone_are_named(tmp_path: Path) -> None:
    run = begun(tmp_path, f'data.train=[{{"path": "{tmp_path}/gone.jsonl"}}]', "data.max_prompt_tokens=16")
    run.names("data set gone", "data", "failed", run.began)
    assert run.end() == 1


@long
def test_weights_that_arrive_damaged_are_named_with_who_refused_them(tmp_path: Path) -> None:
    run = begun(tmp_path, CHAOS_DAMAGE="rollout-0@4")
    refused = run.when("worker", "what", "takeover_failed")
    found = run.names("weights damaged on their way", "rollout-0", "waiting", refused)
    assert found.cause is not None
    assert found.cause.code == "weights_refused", found
    run.well()
    run.end_now()


@long
def test_a_prompt_that_kills_its_workers_is_named_with_them(tmp_path: Path, addition_model: Path) -> None:
    job = load_job(ROOT / "configs" / "quickstart.yaml", [])
    prompts = PromptSource(job.data, load_tokenizer(addition_model), job.seed, [frozenset()])
    poison = [prompts.take().id for _ in range(20)][-1]
    run = begun(tmp_path, CHAOS_POISON=poison)
    found = run.names("poison prompt", "rollout-0", "waiting", run.when("worker", "what", "worker_lost"))
    assert "sample group addition:" in found.summary  # one of those that it was at
    run.until(lambda: any(row["condition"] == "Quarantined" for row in run.journal("condition")), "its quarantine")
    run.well()
    last = run.diagnosis()
    assert last is not None
    assert any(poison in note for note in last.notes), last.notes
    run.end_now()


@long
def test_a_learner_that_diverges_is_named(tmp_path: Path) -> None:
    run = begun(tmp_path, "learner.lr=1e30", "learner.grad_clip=1e30", "learner.max_nonfinite=2")
    found = run.names("gradients not finite", "learner", "failed", run.when("phase", "phase", "train"))
    assert run.end() == 1
    assert json.loads((run.run_dir / "result.json").read_text())["status"] == "failed"
    assert found.cause is not None
    assert found.cause.code == "diverged", found


# --- beside a run ----------------------------------------------------------------------------------------------------


@long
def test_a_control_plane_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's journal, link and pulse as they are, without the engines beside them."""
    monkeypatch.setenv("SAPO_LINK_FLUSH_S", "1")
    control = FakeControl().start()
    journal = Journal(tmp_path / "journal.jsonl", 1)
    journal.event("transition", state="running")
    link, pulse = Link(Wire(control.url, "job-1", 1, TOKEN), StandingOrders()), Pulse()
    link.open(journal)
    pulse.open(journal, link.activity)
    control.wait_for(lambda: len(control.events()) == 1)
    injected = time.time()
    control.stop()
    found = first_named(tmp_path, "control plane gone", "control plane", "stalled", injected)
    assert "training goes on without it" in found.summary
    link.close()
    pulse.close()
    journal.close()
