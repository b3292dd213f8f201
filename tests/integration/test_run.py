"""Whole runs through the command line, on real engines."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from harness import Command, rows, run, wait_for

from sapo_ray.audit import audit

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SMALL = [
    "preset=quickstart",
    "steps=5",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "evaluation.data=[]",
    "checkpoint.every=2",
    "model.warm_start_accuracy=null",
    "verifier.reward=example_reward:digits",
]
"""The quickstart's parts at a size where a step takes no time, a random model, and a reward that it can earn."""
EXACT = ("learner/loss", "learner/grad_norm", "reward/mean", "length/mean", "policy/entropy", "mismatch/abs_max")


def arguments(run_dir: Path, *settings: str) -> list[str]:
    job = str(ROOT / "configs" / "quickstart.yaml")
    return ["train", job, *(a for s in (*SMALL, f"run_dir={run_dir}", *settings) for a in ("--set", s))]


def published(run_dir: Path, version: str) -> bool:
    lines = rows(run_dir / "journal.jsonl")
    return any((line["kind"], line.get("version")) == ("published", version) for line in lines)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(arguments(folder / "run", f"output.uri=file://{folder}/models/one"), folder / "log")
    return folder / "run"


def test_a_run_directory_holds_what_is_promised(uninterrupted: Path) -> None:
    assert [row["step"] for row in rows(uninterrupted / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    result = json.loads((uninterrupted / "result.json").read_text())
    assert result["status"] == "succeeded"
    assert result["steps"] == 5
    assert {"model", "start", "generation", "training", "publish", "checkpoint", "export"} <= set(result["seconds"])
    assert result["versions"]["ray"] == "2.60.0"
    spec = json.loads((uninterrupted / "spec.json").read_text())
    assert spec["learner"]["lr"] == 5e-4, "resolved: the preset's values are in it"
    assert (uninterrupted / "checkpoints" / "latest").read_text() == "step-000005"
    assert all(
        0 < row["reward/mean"] < 1 and row["learner/grad_norm"] > 0 for row in rows(uninterrupted / "metrics.jsonl")
    )
    texts = rows(uninterrupted / "samples.jsonl")
    assert len(texts) == 5 * 4 * 4
    assert all(row["prompt"].endswith("=") for row in texts)
    assert audit(uninterrupted).findings == []


def test_the_trained_model_is_copied_to_where_the_job_wants_it(uninterrupted: Path) -> None:
    result = json.loads((uninterrupted / "result.json").read_text())
    assert result["output"] == f"file://{uninterrupted.parent}/models/one"
    export, copy = uninterrupted / "export", uninterrupted.parent / "models" / "one"
    files = {path.name: path.read_bytes() for path in export.iterdir()}
    assert {"config.json", "model.safetensors"} <= files.keys()
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == files
    [event] = [row for row in rows(uninterrupted / "journal.jsonl") if row["kind"] == "output"]
    assert event["files"] == len(files)


def test_a_run_that_is_interrupted_and_loses_its_learner_and_its_driver_repeats_the_losses_of_an_uninterrupted_one(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"

    first = Command(arguments(run_dir), reward_pause_s=0.5)
    process = first.start(log)
    wait_for(lambda: len(rows(run_dir / "metrics.jsonl")) >= 1, process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130, log.read_text()[-3000:]
    assert first.leaves_nothing() == [], "after Ctrl-C"
    assert json.loads((run_dir / "result.json").read_text())["status"] == "interrupted"

    second = Command(["resume", str(run_dir)], reward_pause_s=0.5)
    process = second.start(log)
    wait_for(lambda: any(row["step"] >= 3 for row in rows(run_dir / "metrics.jsonl")), process, log)
    engines = second.pids("RolloutWorker"), second.pids("VerifierWorker")
    os.kill(second.pids("LearnerWorker")[0], signal.SIGKILL)
    wait_for(lambda: published(run_dir, "2.3.1"), process, log)
    assert (second.pids("RolloutWorker"), second.pids("VerifierWorker")) == engines
    process.kill()
    process.wait(timeout=30)
    assert second.leaves_nothing() == [], "after kill -9 of the driver"

    run(["resume", str(run_dir)], log)
    rollbacks = [
        (row["attempt"], row["to_step"]) for row in rows(run_dir / "journal.jsonl") if row["kind"] == "rollback"
    ]
    assert rollbacks[1] == (2, 2), "within the second attempt, to the checkpoint of step 2"
    expected = [[row[key] for key in EXACT] for row in rows(uninterrupted / "metrics.jsonl")]
    assert [[row[key] for key in EXACT] for row in rows(run_dir / "metrics.jsonl")] == expected
    assert (run_dir / "attempt").read_text().strip() == "3"


def test_a_finished_run_is_not_resumed_into_zero_steps(uninterrupted: Path, tmp_path: Path) -> None:
    process = Command(["resume", str(uninterrupted)]).start(tmp_path / "log")
    assert process.wait(timeout=120) == 1
    assert (
        "has taken all its 5 steps and succeeded; to train on, --set steps=N with N > 5"
        in (tmp_path / "log").read_text()
    )


def test_a_resume_that_changes_the_recipe_is_refused_by_key(uninterrupted: Path, tmp_path: Path) -> None:
    process = Command(["resume", str(uninterrupted), "--set", "learner.lr=1e-3"]).start(tmp_path / "log")
    assert process.wait(timeout=120) == 1
    assert "learner.lr" in (tmp_path / "log").read_text()


def test_overlapped_training_on_real_engines_stays_within_its_bound(tmp_path: Path) -> None:
    run(arguments(tmp_path / "run", "rollout.max_staleness=1", "guard.max_kl=1e-12"), tmp_path / "log")
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5]
    assert max(row["age/sample_max"] for row in metrics) == 1
    assert sum(row["drops/stale"] for row in metrics) == 0
    assert [row["rollout/ahead"] for row in metrics][0::4] == [1, 0], (
        "whatever its age, a sample's mismatch is too much"
    )
    assert metrics[-1]["age/sample_max"] == 0
    [throttled] = [row for row in rows(tmp_path / "run" / "journal.jsonl") if row.get("condition") == "Throttled"]
    assert throttled["reason"].endswith("> guard.max_kl 1e-12: generation is synchronous (rollout.max_staleness 1)")


def test_overlapped_training_that_loses_a_learner_rank_keeps_its_bound_and_an_exact_ledger(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = ["steps=8", "rollout.max_staleness=1", "learner.ranks=2", "checkpoint.keep=9"]
    command = Command(arguments(run_dir, *settings), reward_pause_s=0.05)
    process = command.start(log)
    wait_for(lambda: len(rows(run_dir / "metrics.jsonl")) >= 3, process, log)
    engines = command.pids("RolloutWorker")
    os.kill(command.pids("LearnerWorker")[1], signal.SIGKILL)
    wait_for(lambda: any(line["kind"] == "rollback" for line in rows(run_dir / "journal.jsonl")), process, log)
    assert command.pids("RolloutWorker") == engines
    assert process.wait(timeout=300) == 0, log.read_text()[-4000:]
    assert command.leaves_nothing() == []

    metrics = rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert max(row["age/sample_max"] for row in metrics) == 1
    assert sum(row["drops/stale"] for row in metrics) == 0

    ledger = rows(run_dir / "journal.jsonl")
    (back,) = [i for i, line in enumerate(ledger) if line["kind"] == "rollback"]
    to_step, after = ledger[back]["to_step"], ledger[back:]
    kept = [line for line in ledger[:back] if line["kind"] == "consumed" and line["step"] <= to_step]
    again = [line for line in after if line["kind"] == "consumed"]
    assert [line["step"] for line in kept + again] == [1, 2, 3, 4, 5, 6, 7, 8]
    consumed = [group for line in kept + again for group in line["groups"]]
    issued = list(dict.fromkeys(line["group"] for line in ledger if line["kind"] == "issued"))
    assert consumed == issued, "each prompt once, in order of issue"
    cut = json.loads((run_dir / "checkpoints" / f"step-{to_step:06d}" / "driver.json").read_text())["outstanding"]
    held = {one["prompt"]["id"] for one in cut if one["complete"]}
    assert held, "groups that were complete at the cut"
    assert held.isdisjoint(line["group"] for line in after if line["kind"] == "graded"), "and are not sampled again"
    versions = {
        span[0] for line in after if line["kind"] == "graded" for c in line["completions"] for span in c["spans"]
    }
    assert all(version.endswith(".1") and version.count(".") == 2 for version in versions)


def smoke(tmp_path: Path, train: Path, test: Path) -> None:
    job = str(ROOT / "configs" / "gsm8k-smoke.yaml")
    settings = [f"run_dir={tmp_path / 'run'}", "data.train.0.config=null", "evaluation.data.0.config=null"]
    settings += [f"data.train.0.path={train}", f"evaluation.data.0.path={test}", "deadlines.start_s=300"]
    run(["train", job, *(a for s in settings for a in ("--set", s))], tmp_path / "log")
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    # A random model never ends its answer and never gives one: cut at the limit, wrong, and no verifier error.
    assert {row["length/max"] for row in metrics} == {48.0}
    assert all(row["length/truncated"] > 0.5 for row in metrics)
    assert {row["verifier/errors"] for row in metrics} == {0.0}
    sample = rows(tmp_path / "run" / "samples.jsonl")[0]
    assert sample["prompt"].endswith("End with #### and the number.<|im_end|>\n<|im_start|>assistant\n")
    assert sample["gold"].isdigit()
    assert sample["verdict"] == "wrong"


def test_gsm8k_smoke_on_its_own_files(shared: Path, tmp_path: Path) -> None:
    smoke(tmp_path, shared / "data" / "gsm8k" / "train.jsonl", shared / "data" / "gsm8k" / "test.jsonl")


def test_gsm8k_smoke_on_problems_of_the_same_format(tmp_path: Path) -> None:
    problems = ROOT / "tests" / "data" / "problems.jsonl"
    smoke(tmp_path, problems, problems)


def test_the_quickstart_learns_and_its_export_is_the_model_that_was_measured(tmp_path: Path) -> None:
    job = str(ROOT / "configs" / "quickstart.yaml")
    run(["train", job, "--set", f"run_dir={tmp_path / 'run'}", "--json"], tmp_path / "log")
    accuracy = json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"]
    assert accuracy["before"]["greedy"]["mean"] < 0.45
    assert accuracy["after"]["greedy"]["mean"] >= 0.90
    assert accuracy["after"]["greedy"]["prompts"] == 512

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sapo_ray.data.addition import heldout_pairs
    from sapo_ray.models.warm_start import measure_accuracy

    export = tmp_path / "run" / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    alone = measure_accuracy(model, tokenizer, heldout_pairs(), temperature=0.0)
    assert alone == pytest.approx(accuracy["after"]["greedy"]["mean"], abs=0.01), "transformers on the export"

    output = run(["eval", job, "--model", str(export), "--json"], tmp_path / "log")
    again = json.loads(output[output.index("{") :])
    assert again["greedy"]["mean"] == accuracy["after"]["greedy"]["mean"], "vLLM on the export, the same greedy answers"
